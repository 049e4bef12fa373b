"""How often "the N nearest experts, then a convex combination" (paper eq. 9 and 10) has no solution.

    python benchmarks/nearest_experts.py [--samples 20000] [--output FILE]

For preferences drawn uniformly from the simplex: the share that lies outside the convex hull of its N nearest experts, for
the expert sets of the paper's appendix D.2 and of its Figure 2, and the largest jump of the weights along random lines for
the nested subdivision that peft_hoe uses.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np

from peft_hoe.routing import PreferenceRouter, in_hull


def corners_and(n: int, *others: list[float]) -> np.ndarray:
    return np.vstack([np.eye(n), np.asarray(others)])


THIRD = [1 / 3] * 3
SETS = {  # name: (LoRA experts, routers)
    "2 objectives (D.2)": (corners_and(2, [0.5, 0.5]), np.array([[0.25, 0.75]])),
    "3 objectives (D.2)": (corners_and(3, THIRD), np.array([[0.25, 0.25, 0.5]])),
    "5 objectives (D.2)": (corners_and(5, [*THIRD, 0, 0]), np.array([[0.2] * 5])),
    "Figure 2": (corners_and(3, THIRD), np.array([[0.5, 0.5, 0], [0.5, 0, 0.5], [0, 0.5, 0.5]])),
}


def share_infeasible(points: np.ndarray, samples: int, generator: np.random.Generator) -> float:
    """Share of preferences outside the hull of their N nearest points."""
    n = points.shape[1]
    outside = 0
    for preference in generator.dirichlet(np.ones(n), samples):
        nearest = np.argsort(np.linalg.norm(points - preference, axis=1), kind="stable")[:n]
        outside += not in_hull(preference, points[nearest])
    return outside / samples


def steepest(experts: np.ndarray, routers: np.ndarray, generator: np.random.Generator) -> float:
    """Largest |change of a weight| per |change of preference| along 25 random lines of 400 steps."""
    router = PreferenceRouter(experts, routers, [str(i) for i in range(len(experts) + len(routers))])
    worst = 0.0
    for _ in range(25):
        start, end = generator.dirichlet(np.ones(experts.shape[1]), 2)
        line = start + np.linspace(0, 1, 401)[:, None] * (end - start)
        weights = np.array([router.weights(point)[0] for point in line])
        worst = max(worst, float(np.abs(np.diff(weights, axis=0)).max() / (np.linalg.norm(end - start) / 400)))
    return worst


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=20000)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    rows = {}
    print(f"{'experts':<20} {'N nearest infeasible':>21} {'nested: steepest weight':>24}")
    for name, (experts, routers) in SETS.items():
        generator = np.random.default_rng(0)
        share = share_infeasible(np.vstack([experts, routers]), arguments.samples, generator)
        slope = steepest(experts, routers, generator)
        rows[name] = {"share_infeasible": share, "steepest": slope}
        print(f"{name:<20} {share:>20.1%} {slope:>24.2f}")
    if arguments.output:
        arguments.output.write_text(json.dumps(rows, indent=2))


if __name__ == "__main__":
    main()
