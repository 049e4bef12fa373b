"""The sets of objectives of `fronts.py`, and HoE with routers that are trained once and then reused.

    python benchmarks/fronts_adapters.py --shared DIR --output fronts --pairs positive,rich --seeds 5

trains the routers of `hoe_trained` alone, so that `fronts.py --output fronts` finds them. Settings are those that
`router_training.py` chose on validation prompts; each router has its default voting set. An interrupted run goes on where
it was.
"""

from __future__ import annotations

import itertools
import sys
from pathlib import Path

from figures_setting import Setting, parser
from peft_hoe.router_recipe import default_experts, default_routers
from trained_routers import trained_routers

OBJECTIVES = ("positive", "rich", "dialog")
SETS = {"positive,rich": OBJECTIVES[:2], "positive,dialog": ("positive", "dialog"), "all": OBJECTIVES}


class Problem(Setting):
    """One set of objectives, by its key in `SETS`."""

    def __init__(self, shared: Path, output: Path, key: str, limit: int | None = None) -> None:
        super().__init__(shared, output, SETS[key], limit=limit)
        self.key = key

    def trained_hoe(self, name: str, seed: int, policies: dict[str, str] | None = None, merged: bool = False) -> Path:
        """HoE with routers that are trained on the training prompts; the folder, with its CPU time in `training.json`.

        Args:
            name: of the folder.
            seed: of training.
            policies: in place of the set's own.
            merged: whether the centroid has a merged expert, or a router.
        """
        n = len(self.objectives)
        points = default_routers(n) + ([] if merged else default_experts(n))
        routers = [{"preference": point} for point in points]
        experts = {} if merged else {"experts": []}
        return trained_routers(
            self, self.adapter(f"{name}-untrained", policies, routers=routers, **experts), name, seed
        )


def main() -> None:
    """Train HoE's routers for some sets of objectives and seeds."""
    command = parser(__doc__)
    command.add_argument("--pairs", nargs="+", choices=SETS, default=list(SETS), help="sets of objectives")
    command.add_argument("--seeds", type=int, default=5, help="number of seeds (default 5)")
    arguments = command.parse_args()
    for key, seed in itertools.product(arguments.pairs, range(arguments.seeds)):
        problem = Problem(arguments.shared, arguments.output, key)
        print(f"{key}, seed {seed}: {problem.trained_hoe('hoe_trained', seed)}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
