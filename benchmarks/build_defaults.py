"""Chooses the defaults of `build_adapter` on validation prompts of a TinyStories Llama.

    python benchmarks/build_defaults.py --shared DIR --output build_defaults.json
    python benchmarks/build_defaults.py --shared DIR --output build_defaults_linear.json --interpolation linear

One adapter with the three policies and the midpoint of each pair serves all pairs. Its score is the hypervolume of the
front at 11 preferences, in rewards normalised to the pair's two policies (the better is 1, the worse 0), reference point
-0.1, averaged over pairs. Stages: rescale and merge together at rank 16 and prune 0.4, where the highest mean is
kept; then prune and then rank, where the paper's 0.4 and the configuration's 16 stay unless another value is better by
more than one standard error; ranks again without rescaling, to see what it does to them; then interpolation, until there
the one that is given, where the higher mean is kept. Errors are those of the difference to the stage's best, from a
bootstrap over prompts that both share. Greedy decoding, 48 new tokens. About 15 minutes on one core.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

import peft_hoe
from peft_hoe import HoEConfig
from peft_hoe.config import INTERPOLATIONS
from peft_hoe.experts import Merging, build_adapter
from stories_rewards import REWARDS

OBJECTIVES = ("positive", "rich", "dialog")
PAIRS = tuple(itertools.combinations(range(3), 2))
REFERENCE = -0.1
NEW_TOKENS = 48
PAPER_PRUNE = 0.4
ROWS = 660  # rows generated at once
FloatArray = NDArray[np.float64]


# -- rewards -----------------------------------------------------------------------------------------------------------


def score(texts: Sequence[str]) -> FloatArray:
    """Rewards `(len(texts), 3)` of completions."""
    return np.asarray([REWARDS[name](texts, texts) for name in OBJECTIVES]).T


class Evaluator:
    """Generates for all prompts and scores the completions."""

    def __init__(self, base: Path, prompts: Sequence[str]) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(base, padding_side="left")
        self.prompts = list(prompts)

    @torch.no_grad()
    def rewards(self, model: Any, preferences: Sequence[Sequence[float]] | None = None) -> FloatArray:
        """`(P, prompts, 3)`, one slice for each preference; `(1, prompts, 3)` for a model without preferences."""
        points: list[Any] = list(preferences) if preferences is not None else [None]
        jobs = [(prompt, point) for point in points for prompt in self.prompts]
        rows = []
        for start in range(0, len(jobs), ROWS):
            part = jobs[start : start + ROWS]
            batch = self.tokenizer([prompt for prompt, _ in part], return_tensors="pt", padding=True)
            steering = {} if preferences is None else {"preference": [point for _, point in part]}
            output = model.generate(**batch, **steering, do_sample=False, max_new_tokens=NEW_TOKENS, max_length=None)
            new = output[:, batch["input_ids"].shape[1] :]
            rows.append(score(self.tokenizer.batch_decode(new, skip_special_tokens=True)))
        return np.concatenate(rows).reshape(len(points), len(self.prompts), 3)


# -- hypervolume -------------------------------------------------------------------------------------------------------


def hypervolume(points: FloatArray) -> float:
    """Area that points `(P, 2)` dominate above the reference point; points below it are clipped to it."""
    area, height = 0.0, 0.0
    above = np.clip(np.asarray(points) - REFERENCE, 0, None)
    order = above[np.argsort(-above[:, 0])]
    for i, (_, y) in enumerate(order):
        height = max(height, y)
        following = order[i + 1, 0] if i + 1 < len(order) else 0.0
        area += height * (order[i, 0] - following)
    return area


def front_points(pair: tuple[int, int]) -> list[list[float]]:
    """11 preferences between two of the three objectives."""
    return [[(i / 10 if k == pair[0] else 1 - i / 10 if k == pair[1] else 0.0) for k in range(3)] for i in range(11)]


class Scale:
    """The payoff table: row i holds the mean rewards of policy i, with all its weights."""

    def __init__(self, policies: FloatArray) -> None:
        self.policies = policies  # (3, 3)

    def volume(self, rewards: FloatArray, pair: tuple[int, int]) -> float:
        """Hypervolume of mean rewards `(11, 3)` of a pair."""
        table = self.policies[list(pair)][:, list(pair)]
        low, high = table.min(0), table.max(0)
        return hypervolume((rewards[:, list(pair)] - low) / (high - low))


def volumes(rewards: FloatArray, scale: Scale, prompts: FloatArray | slice = slice(None)) -> list[float]:
    """Hypervolume of each pair from rewards `(33, prompts, 3)`."""
    means = rewards[:, prompts].mean(1)
    return [scale.volume(means[11 * i : 11 * i + 11], pair) for i, pair in enumerate(PAIRS)]


def difference_error(first: FloatArray, second: FloatArray, scale: Scale, replicates: int = 200) -> float:
    """Standard error of the difference of two mean hypervolumes: bootstrap over prompts, shared by both."""
    generator = np.random.default_rng(0)
    drawn = [generator.integers(0, first.shape[1], first.shape[1]) for _ in range(replicates)]
    gaps = [np.mean(volumes(first, scale, d)) - np.mean(volumes(second, scale, d)) for d in drawn]
    return float(np.std(gaps))


# -- the search --------------------------------------------------------------------------------------------------------


class Search:
    """Builds, scores and remembers adapters."""

    def __init__(self, base: Path, policies: dict[str, Path], evaluator: Evaluator, interpolation: str) -> None:
        self.base, self.paths, self.evaluator, self.interpolation = base, policies, evaluator, interpolation
        self.points = [point for pair in PAIRS for point in front_points(pair)]
        single = [evaluator.rewards(self._load(path))[0].mean(0) for path in (base, *policies.values())]
        self.base_rewards, self.scale = single[0], Scale(np.asarray(single[1:]))
        self.rows: list[dict[str, Any]] = []
        self.rewards: dict[str, FloatArray] = {}

    @staticmethod
    def _load(path: Path) -> Any:
        return AutoModelForCausalLM.from_pretrained(path).eval()

    def _record(self, stage: str, settings: dict[str, Any], distinct: FloatArray, where: list[int]) -> None:
        rewards = distinct[where]
        corners = [rewards[10, :, 0].mean(), rewards[0, :, 1].mean(), rewards[11, :, 2].mean()]
        gain = (np.asarray(corners) - self.base_rewards) / (self.scale.policies.diagonal() - self.base_rewards)
        found = volumes(rewards, self.scale)
        row = {
            "stage": stage, **settings, "hypervolume": float(np.mean(found)),
            "pairs": [round(value, 4) for value in found], "corners": [round(float(value), 3) for value in gain],
        }  # fmt: skip
        self.rewards[json.dumps(settings, sort_keys=True)] = rewards
        self.rows.append(row)
        print(format_row(row), file=sys.stderr, flush=True)

    def adapter(self, stage: str, **settings: Any) -> None:
        """Build and score one adapter."""
        if json.dumps(settings, sort_keys=True) in self.rewards:
            known = next(row for row in self.rows if all(row.get(key) == value for key, value in settings.items()))
            self.rows.append({**{key: value for key, value in known.items() if key != "error"}, "stage": stage})
            print(format_row(self.rows[-1]), file=sys.stderr, flush=True)
            return
        density = settings["density"]
        with tempfile.TemporaryDirectory() as folder:
            build_adapter(
                self.base, self.paths, Path(folder) / "adapter", experts=[[0.5, 0.5, 0], [0.5, 0, 0.5], [0, 0.5, 0.5]],
                r=settings["r"], pruning=settings["prune"], rescale=settings["rescale"],
                interpolation=settings["interpolation"],
                merging="linear" if density is None else Merging("ties", {"density": density}), progress=False,
            )  # fmt: skip
            model = PeftModel.from_pretrained(self._load(self.base), Path(folder) / "adapter").eval()
        distinct, where = _distinct(self.points)
        self._record(stage, settings, self.evaluator.rewards(model, distinct), where)

    def soups(self) -> None:
        """For orientation: rewarded soups, every weight of the policies interpolated, no experts."""
        states = [self._load(path).state_dict() for path in self.paths.values()]
        model = self._load(self.base)
        distinct, where = _distinct(self.points)
        rewards = []
        for point in distinct:
            mixed = {name: sum(w * state[name] for w, state in zip(point, states, strict=True)) for name in states[0]}
            model.load_state_dict(mixed)
            rewards.append(self.evaluator.rewards(model)[0])
        self._record("soups", {"r": "dense"}, np.asarray(rewards), where)

    def best(self, stage: str) -> dict[str, Any]:
        """The row of a stage with the highest mean hypervolume."""
        return max((row for row in self.rows if row["stage"] == stage), key=lambda row: row["hypervolume"])

    def close(self, stage: str) -> list[dict[str, Any]]:
        """The rows of a stage within one standard error of its best, in the order they were tried."""
        best, near = self.best(stage), []
        for row in self.rows:
            if row["stage"] == stage:
                row["error"] = difference_error(self.rewards[_key(best)], self.rewards[_key(row)], self.scale)
                if best["hypervolume"] - row["hypervolume"] <= row["error"]:
                    near.append(row)
        return near


SETTINGS = ("r", "prune", "rescale", "density", "interpolation")


def _key(row: dict[str, Any]) -> str:
    return json.dumps({name: row[name] for name in SETTINGS}, sort_keys=True)


def _distinct(points: list[list[float]]) -> tuple[list[list[float]], list[int]]:
    """Corners belong to two pairs: generate once."""
    distinct = [point for i, point in enumerate(points) if point not in points[:i]]
    return distinct, [distinct.index(point) for point in points]


def format_row(row: dict[str, Any]) -> str:
    """One line of the table."""
    density = row.get("density")
    merge = "linear" if density is None else f"ties {density:g}"
    merge = "-" if row["r"] == "dense" else merge
    cells = [
        row["stage"],
        row["r"],
        row.get("prune"),
        row.get("rescale"),
        merge,
        row.get("interpolation", "-"),
        f"{row['hypervolume']:.3f}",
    ]
    cells.append(f"{row['error']:.3f}" if "error" in row else "-")
    cells += [f"{value:.3f}" for value in row["pairs"]] + [f"{value:.2f}" for value in row["corners"]]
    return "| " + " | ".join(str(cell) for cell in cells) + " |"


HEADER = (
    "| stage | r | prune | rescale | merge | interpolation | mean HV | error | pos x rich | pos x dialog | rich x dialog "
    "| positive | rich | dialog |\n" + "|---" * 14 + "|"
)


def search(run: Search, report: Callable[[], None]) -> dict[str, Any]:
    """The stages."""
    run.soups()
    for rescale in (None, "norm", "policy_norm"):
        for density in (None, 0.2, 0.4, 0.6, 0.8, 1.0):
            first = {"r": HoEConfig.r, "prune": PAPER_PRUNE, "interpolation": run.interpolation}
            run.adapter("merge", **first, rescale=rescale, density=density)
            report()
    chosen = {name: run.best("merge")[name] for name in SETTINGS}
    run.close("merge")
    for prune in (None, 0.2, 0.4, 0.6):
        run.adapter("prune", **{**chosen, "prune": prune})
    if PAPER_PRUNE not in [row["prune"] for row in run.close("prune")]:
        chosen["prune"] = run.best("prune")["prune"]
    report()
    for rank in (4, 8, 16, 32, "full"):
        run.adapter("rank", **{**chosen, "r": rank})
    if HoEConfig.r not in [row["r"] for row in run.close("rank")]:
        chosen["r"] = run.best("rank")["r"]
    report()
    for rank in (4, 16, "full"):
        run.adapter("rank, not rescaled", **{**chosen, "r": rank, "rescale": None})
    run.close("rank, not rescaled")
    for interpolation in INTERPOLATIONS:
        run.adapter("interpolation", **{**chosen, "interpolation": interpolation})
    run.close("interpolation")
    return {**chosen, "interpolation": run.best("interpolation")["interpolation"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shared", type=Path, required=True, help="folder with models/ and data/")
    parser.add_argument("--output", type=Path, required=True, help="JSON file to write")
    parser.add_argument(
        "--interpolation", choices=INTERPOLATIONS, default="norm", help="until it is chosen (default norm)"
    )
    parser.add_argument("--limit", type=int, help="use the first prompts only")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    models = arguments.shared / "models"
    prompts = json.loads((arguments.shared / "data/stories/prompts.json").read_text())["validation"]
    base = models / "stories260k"
    policies = {name: models / "policies" / f"stories260k-{name}" for name in OBJECTIVES}
    start = time.time()
    run = Search(base, policies, Evaluator(base, prompts[: arguments.limit]), arguments.interpolation)

    def report(chosen: dict[str, Any] | None = None) -> None:
        content = {
            "peft_hoe": peft_hoe.__version__, "torch": torch.__version__, "prompts": len(run.evaluator.prompts),
            "payoff": run.scale.policies.tolist(), "base": run.base_rewards.tolist(), "reference": REFERENCE,
            "interpolation": run.interpolation, "rows": run.rows, "chosen": chosen, "seconds": round(time.time() - start),
        }  # fmt: skip
        arguments.output.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")

    chosen = search(run, report)
    report(chosen)
    print("\n".join([HEADER, *map(format_row, run.rows)]))
    print(f"\nchosen: {chosen} ({time.time() - start:.0f} s)")


if __name__ == "__main__":
    main()
