"""Whether experts of embeddings and norms help, on validation prompts of TinyStories Llamas.

    python benchmarks/build_capture.py --shared DIR
    python benchmarks/build_capture.py --shared DIR --base tinystories-656k --policies POLICIES --objectives positive rich

Adapters of the policies and the midpoint of each pair, built with the defaults but for `capture` and the rank. The score is the
hypervolume of each pair's front at 11 preferences, in rewards normalised to the pair's two policies (the better is 1, the worse
0), reference point -0.1, averaged over pairs; greedy, 48 new tokens. The difference to the row without capture at the same
rank has the standard error of a bootstrap over prompts that both share. Corners are the gains of the single experts over the
base, 1 being the policy's own. POLICIES is the folder `policies` of what `default_fronts.py` writes. About 2 minutes a rank on
one core.
"""

from __future__ import annotations

import argparse
import itertools
import json
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from peft import PeftModel
from transformers import AutoModelForCausalLM

import build_defaults
from build_defaults import Evaluator, hypervolume
from peft_hoe.experts import build_adapter
from peft_hoe.experts.options import CAPTURES

FloatArray = NDArray[np.float64]
CHOICES = ((), ("embeddings",), ("norms",), CAPTURES)
ENDINGS = {"tinystories-656k": " "}  # what its tokens want at the end of a prompt
STOP = "<|end_story|>"


class CutEvaluator(Evaluator):
    """Completions end where the text says so."""

    @torch.no_grad()
    def rewards(self, model: Any, preferences: Sequence[Sequence[float]] | None = None) -> FloatArray:
        """As there."""
        whole, build_defaults.score = build_defaults.score, _cut(build_defaults.score)
        try:
            return super().rewards(model, preferences)
        finally:
            build_defaults.score = whole


def _cut(score: Any) -> Any:
    return lambda texts: score([text.split(STOP)[0] for text in texts])


class Fronts:
    """The fronts of some pairs of objectives.

    Args:
        table: mean rewards of the policies, `(N, 3)`.
        chosen: columns of the N objectives among the three rewards.
    """

    def __init__(self, table: FloatArray, chosen: list[int]) -> None:
        n = len(chosen)
        self.chosen, self.table = chosen, table[:, chosen]
        self.pairs = list(itertools.combinations(range(n), 2))
        self.middles = [[0.5 if k in pair else 0.0 for k in range(n)] for pair in self.pairs]
        self.points = [
            [i / 10 if k == a else 1 - i / 10 if k == b else 0.0 for k in range(n)]
            for a, b in self.pairs
            for i in range(11)
        ]

    def volumes(self, rewards: FloatArray) -> list[float]:
        """Hypervolume of each pair from rewards `(points, prompts, 3)`."""
        means = rewards[:, :, self.chosen].mean(1)
        found = []
        for i, pair in enumerate(self.pairs):
            table = self.table[list(pair)][:, list(pair)]
            low, high = table.min(0), table.max(0)
            found.append(hypervolume((means[11 * i : 11 * i + 11][:, list(pair)] - low) / (high - low)))
        return found

    def difference(self, first: FloatArray, second: FloatArray) -> tuple[float, float]:
        """Mean hypervolume of the second less the first, and its standard error."""
        generator, count = np.random.default_rng(0), first.shape[1]
        drawn = [generator.integers(0, count, count) for _ in range(200)]
        gaps = [np.mean(self.volumes(second[:, d])) - np.mean(self.volumes(first[:, d])) for d in drawn]
        return float(np.mean(self.volumes(second)) - np.mean(self.volumes(first))), float(np.std(gaps))

    def corners(self, rewards: FloatArray, base: FloatArray) -> list[float]:
        """Gain of each single expert over the base, of its policy's."""
        found = []
        for k, column in enumerate(self.chosen):
            place = next(i for i, point in enumerate(self.points) if point[k] == 1.0)
            gain = rewards[place, :, column].mean() - base[column]
            found.append(float(gain / (self.table[k, k] - base[column])))
        return found


def rows(base: Path, policies: dict[str, Path], evaluator: Evaluator, ranks: list[Any]) -> Iterator[str]:
    """The table's lines, as they are found."""
    chosen = [build_defaults.OBJECTIVES.index(name) for name in policies]
    single = [evaluator.rewards(_load(path))[0].mean(0) for path in (base, *policies.values())]
    fronts = Fronts(np.asarray(single[1:]), chosen)
    pairs = [" x ".join(list(policies)[k] for k in pair) for pair in fronts.pairs]
    head = ["r", "capture", "mean HV", "difference", "error", *pairs, *policies]
    yield "| " + " | ".join(head) + " |\n" + "|---" * len(head) + "|"
    for rank in ranks:
        first: FloatArray | None = None
        for capture in CHOICES:
            with tempfile.TemporaryDirectory() as folder:
                adapter = Path(folder) / "adapter"
                build_adapter(base, policies, adapter, experts=fronts.middles, capture=capture, r=rank, progress=False)
                model = PeftModel.from_pretrained(_load(base), adapter).eval()
            rewards = evaluator.rewards(model, fronts.points)
            first = rewards if first is None else first
            difference, error = fronts.difference(first, rewards)
            found = fronts.volumes(rewards)
            cells = [str(rank), " and ".join(capture) or "nothing", f"{np.mean(found):.3f}"]
            cells += [f"{difference:+.3f}", f"{error:.3f}", *(f"{value:.3f}" for value in found)]
            cells += [f"{value:.2f}" for value in fronts.corners(rewards, single[0])]
            yield "| " + " | ".join(cells) + " |"


def _load(path: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(path).eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shared", type=Path, required=True, help="folder with models/ and data/")
    parser.add_argument("--base", default="stories260k", help="folder in models/ (default stories260k)")
    parser.add_argument("--policies", type=Path, help="folder of BASE-OBJECTIVE (default models/policies)")
    parser.add_argument("--objectives", nargs="+", default=list(build_defaults.OBJECTIVES), help="default all three")
    parser.add_argument("--ranks", nargs="*", default=["16"], help="numbers, or full (default 16)")
    parser.add_argument("--limit", type=int, help="use the first prompts only")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    models = arguments.shared / "models"
    prompts = json.loads((arguments.shared / "data/stories/prompts.json").read_text())["validation"]
    prompts = [prompt + ENDINGS.get(arguments.base, "") for prompt in prompts[: arguments.limit]]
    folder = arguments.policies or models / "policies"
    policies = {name: folder / f"{arguments.base}-{name}" for name in arguments.objectives}
    ranks = [int(rank) if rank.isdigit() else rank for rank in arguments.ranks]
    for line in rows(models / arguments.base, policies, CutEvaluator(models / arguments.base, prompts), ranks):
        print(line, flush=True)


if __name__ == "__main__":
    main()
