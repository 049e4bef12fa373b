"""How well a preference is known after some choices: 200 simulated people for each number of objectives.

Each person's λ is drawn uniformly from the simplex. They choose by a logistic rule that errs in 10 % of the pairs whose
λ-weighted rewards differ by 0.3. The texts' normalised rewards are uniform in [0, 1]. `PreferenceEstimate` proposes the pairs,
and does not know how reliably the person chooses.

    OMP_NUM_THREADS=1 python benchmarks/person_choices.py
"""

from __future__ import annotations

import argparse

import numpy as np

from peft_hoe import PreferenceEstimate

KAPPA = float(np.log(9) / 0.3)
CASES = {2: (5, 10, 20), 3: (10, 20, 40)}


def simulate(n: int, choices: tuple[int, ...], people: int, texts: int, seed: int) -> None:
    """Print the errors and the share of the 80 % regions that hold λ, after each number of choices."""
    rng = np.random.default_rng(seed)
    errors: dict[int, list[float]] = {count: [] for count in choices}
    held: dict[int, list[bool]] = {count: [] for count in choices}
    for person in range(people):
        wanted, rewards = rng.dirichlet(np.ones(n)), rng.random((texts, n))
        estimate = PreferenceEstimate([f"objective {i}" for i in range(n)], seed=person)
        for count in range(1, max(choices) + 1):
            first, second = estimate.propose(rewards)
            prefers = 1 / (1 + np.exp(-KAPPA * wanted @ (rewards[first] - rewards[second])))
            if rng.random() > prefers:
                first, second = second, first
            estimate.choose(rewards[first], rewards[second], again=True)
            if count in choices:
                errors[count].append(float(np.abs(estimate.mean - wanted).max()))
                held[count].append(estimate.region(0.8).contains(wanted))
    for count in choices:
        median, most = np.quantile(errors[count], [0.5, 0.9])
        print(f"| {n} | {count} | {median:.3f} | {most:.3f} | {np.mean(held[count]):.0%} |")


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--people", type=int, default=200)
    parser.add_argument("--texts", type=int, default=100, help="that pairs are proposed from")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    print("| objectives | choices | median L∞ error | 90 % below | 80 % regions that hold λ |")
    print("|---|---|---|---|---|")
    for n, choices in CASES.items():
        simulate(n, choices, arguments.people, arguments.texts, arguments.seed)


if __name__ == "__main__":
    main()
