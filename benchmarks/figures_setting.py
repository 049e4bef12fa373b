"""What the scripts of `docs/measurements/figures.md` and `docs/measurements/fronts.md` share.

That is the stories model, policies, rewards, one scale, adapters and sweeps.

Adapters are built once and sweeps are kept under the output directory, so that a script that is run again goes on where it was,
and scripts that are given the same directory share what they have in common. Every hypervolume is measured in rewards
normalised by one payoff table: that of the one-hot experts of HoE at build defaults, at the same decoding, on the validation
prompts.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from numpy.typing import NDArray
from safetensors import safe_open

import peft_hoe
from peft_hoe.evaluation import HoEMethod, Sweep
from peft_hoe.evaluation.reporting.comparison import SweepComparison
from peft_hoe.generation.completer import Completer
from peft_hoe.metrics import Interval
from problem import Problem
from stories_rewards import REWARDS

NEW_TOKENS, BATCH = 48, 480


def parser(description: str | None) -> argparse.ArgumentParser:
    """What the scripts have in common on their command lines."""
    found = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("--shared", type=Path, required=True, help="folder with models/ and data/")
    found.add_argument("--output", type=Path, required=True, help="directory to write")
    return found


def parser_of_five(description: str | None) -> argparse.ArgumentParser:
    """The same for five objectives, with a picture."""
    found = parser(description)
    found.add_argument("--policies", type=Path, required=True, help="folder with the policies past and pronouns")
    found.add_argument("--plot", type=Path, help="PNG to write")
    return found


class Setting(Problem):
    """One set of objectives.

    Args:
        shared: folder with models/ and data/.
        output: directory for everything that is kept.
        objectives: names of rewards; each needs a policy.
        policies: folder with further policies `<base>-<objective>`, looked at after that in `shared`.
        limit: use the first prompts only.
        base: folder below models/.
        ending: of every prompt, for a base whose tokens hold the blank that follows a word.
        stop_strings: where texts end besides at the stop tokens.
    """

    def __init__(
        self,
        shared: Path,
        output: Path,
        objectives: Sequence[str],
        policies: Path | None = None,
        limit: int | None = None,
        *,
        base: str = "stories260k",
        ending: str = "",
        stop_strings: tuple[str, ...] = (),
    ) -> None:
        prompts = json.loads((shared / "data/stories/prompts.json").read_text(encoding="utf-8"))
        splits = {split: [prompt + ending for prompt in given] for split, given in prompts.items()}
        splits |= {split: splits[split][:limit] for split in ("test", "validation")}
        folders = (shared / "models/policies", policies)
        super().__init__(
            output / "-".join(objectives), base=shared / "models" / base,
            policies={name: str(_policy(f"{base}-{name}", *folders)) for name in objectives}, rewards=REWARDS,
            prompts=splits, new_tokens=NEW_TOKENS, stop_strings=stop_strings,
        )  # fmt: skip

    def linear(self) -> Path:
        """HoE at build defaults, but with the paper's linear interpolation."""
        return self.adapter("hoe-linear", interpolation="linear")

    def pairs_merged(self, interpolation: str = "norm") -> Path:
        """HoE with a merged expert in the middle of each pair, besides the one at the centroid."""
        n = len(self.objectives)
        middles = [[0.5 if i in pair else 0.0 for i in range(n)] for pair in itertools.combinations(range(n), 2)]
        name = "hoe-pairs" if interpolation == "norm" else f"hoe-pairs-{interpolation}"
        return self.adapter(name, experts=[*middles, [1 / n] * n], interpolation=interpolation)

    def whole(self, path: str | None = None) -> Any:
        """A method that knows no preference: a model without adapter, by default the base."""
        model = self.model(path)
        completer = Completer(model, self.tokenizer, self.decoding())

        def complete(prompts: Sequence[str], preferences: Any) -> list[str]:
            return completer.complete(model, prompts)

        return complete

    def sweep(
        self,
        name: str,
        adapter: Path | None = None,
        *,
        preferences: Any = "grid",
        prompts: Sequence[str] | None = None,
        generate: Any = None,
        folder: str | None = None,
    ) -> Sweep:
        """Greedy, at most `NEW_TOKENS` new tokens, by default the test prompts; of an adapter, or of any other method."""
        if generate is None:
            generate = HoEMethod(self.steered(adapter), self.tokenizer, decoding=self.decoding())
        return peft_hoe.sweep(
            prompts=prompts or self.test, rewards=self.rewards, preferences=preferences, generate=generate, name=name,
            payoff=self.scale(), batch_size=BATCH, output_dir=self.folder / "sweeps" / _folder(folder or name),
            progress=False,
        )  # fmt: skip


def stored_parameters(adapter: Path) -> int:
    """Numbers in an adapter's file."""
    with safe_open(adapter / "adapter_model.safetensors", framework="np") as file:
        return sum(_numel(file.get_slice(key).get_shape()) for key in file.keys())  # noqa: SIM118


def hypervolume(sweep: Sweep) -> Interval:
    """Of a sweep, with its interval over prompts."""
    return sweep.metrics().values["hypervolume"]


def gain(sweep: Sweep, other: Sweep) -> Interval:
    """Hypervolume of `sweep` minus that of `other`, paired over prompts."""
    found: SweepComparison = sweep.compare(other)
    return found.values["hypervolume A - B"]


def cell(interval: Interval, signed: bool = False) -> str:
    """A number with its interval."""
    sign = "+" if signed else ""
    low, high, undefined = float(interval.low), float(interval.high), int(interval.undefined)
    end = f" (undefined in {undefined})" if undefined else ""
    return f"{float(interval.estimate):{sign}.3f} [{low:{sign}.3f}, {high:{sign}.3f}]{end}"


def plain(interval: Interval) -> list[float]:
    """Estimate, low and high, for JSON."""
    return [float(interval.estimate), float(interval.low), float(interval.high)]


def means(row: NDArray[Any]) -> str:
    """Mean rewards."""
    return " / ".join(f"{value:.2f}" for value in row)


def write(path: Path, content: Any) -> None:
    """JSON."""
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def _policy(name: str, *folders: Path | None) -> Path:
    paths = [folder / name for folder in folders if folder is not None]
    for path in paths:
        if path.exists():
            return path
    raise SystemExit(f"there is no policy {name!r} at {[str(path) for path in paths]}; give its folder with --policies")


def _numel(shape: Sequence[int]) -> int:
    product = 1
    for size in shape:
        product *= size
    return product


def _folder(name: str) -> str:
    return "".join(letter if letter.isalnum() else "-" for letter in name.lower())
