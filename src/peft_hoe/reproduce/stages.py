"""The stages of an experiment: each reads what the ones before it wrote, and writes into a place of its own.

| stage | writes |
|---|---|
| build | `adapter` |
| train | `trained` |
| place | `placed` |
| sweep hoe, sweep hoe_dropped | `sweeps/hoe`, `sweeps/hoe_dropped`: trained routers kept, and dropped |
| sweep <baseline> | `sweeps/<baseline>` |
| report | `report.html`, `front.png`, `metrics.json`, `summary.txt` |

With several seeds of training, what is trained has stages of its own for each (`train-seed0`, `sweep hoe-seed0`), and one that
stacks the sweeps (`stack hoe`), see `seeds`.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from ..errors import HoEError
from ..evaluation.baselines import BASELINES
from ..evaluation.reporting.as_json import as_json
from ..evaluation.reporting.page import write_report
from ..evaluation.reporting.tables import aligned, overview
from ..evaluation.sweeps.run import sweep
from ..evaluation.sweeps.sweep import Sweep
from ..experts import Loading, build_adapter
from ..inputs import load_adapter
from .baselines import make_baseline
from .inputs import Prompts, load_prompts, load_rewards
from .placing import FOLDER, STORY, placed, placed_adapter
from .plan import Plan
from .seeds import SWEEPS, is_trained, of_seed, runs, stack
from .training import check_trainer, train

HOE, DROPPED = "hoe", "hoe_dropped"
SUMMARY = "summary.txt"


@dataclass(frozen=True)
class Stage:
    """A step of an experiment, which is done once.

    Attributes:
        name: in `reproduce.json`.
        summary: what it does, for people.
        output: what it writes, in the experiment's folder.
        run: does it.
        note: what `reproduce.json` keeps of it; a finished stage whose note has changed is done again.
        remakes: the stages after it that build on what it writes; None for all of them.
    """

    name: str
    summary: str
    output: str
    run: Callable[[Experiment], None]
    note: Any = None
    remakes: tuple[str, ...] | None = ()

    def is_finished(self, folder: Path, finished: dict[str, Any]) -> bool:
        """Whether it is among the finished ones with this note, and its output is there."""
        return self.name in finished and finished[self.name] == self.note and (folder / self.output).exists()


class Experiment:
    """A plan with what its stages share: prompts and rewards, loaded when they are first needed, and the device.

    Args:
        plan: the settings.
        progress: whether to show bars and tables.
    """

    def __init__(self, plan: Plan, progress: bool) -> None:
        self.plan, self.progress = plan, progress
        self.device = "cuda" if torch.cuda.is_available() and not plan.cpu else "cpu"

    def check(self) -> None:
        """Find what is wrong before hours of work, not after."""
        from .. import metrics  # noqa: F401  # needs moocore

        check_trainer(self.plan)
        _ = self.prompts, self.rewards
        if self.plan.auto is not None and not self.prompts.validation:
            raise HoEError(
                "there are no validation prompts to place experts and routers by; give them (--prompts validation=FILE), or "
                "training prompts, some of which are then held out",
                argument="prompts", allowed=["validation", "train"],
            )  # fmt: skip

    @cached_property
    def prompts(self) -> Prompts:
        """Of training, of the payoff table and of the sweeps."""
        return load_prompts(self.plan)

    @cached_property
    def rewards(self) -> Any:
        """The recipe's and the user's, on the device."""
        return load_rewards(self.plan, self.device)

    def adapter(self, seed: int | None) -> Path:
        """The folder of the adapter that is swept: as it was built, trained (with a seed) or placed, whatever came last."""
        return self.before_placing(seed) if self.plan.auto is None else placed_adapter(self.plan.folder)

    def before_placing(self, seed: int | None = None) -> Path:
        """With trained routers where routers train, else as it was built."""
        return self.plan.folder / (of_seed("trained", seed) if self.plan.trains else "adapter")

    def sweep(self, where: str, model: Any = None, tokenizer: Any = None, **options: Any) -> None:
        """A sweep of the test prompts into a folder of its own; an interrupted one goes on."""
        sweep(
            model, tokenizer, self.prompts.test, self.rewards, self.plan.preferences,
            texts=self.plan.texts, batch_size=self.plan.sweep_batch_size, output_dir=self.plan.folder / SWEEPS / where,
            progress=self.progress, **options,
        )  # fmt: skip


def stages(plan: Plan) -> list[Stage]:
    """What the plan asks for, in the order in which it is done."""
    found = [Stage("build", f"experts from {len(plan.policies)} policies", "adapter", _build, remakes=None)]
    if plan.trains:
        found += [_training(plan, seed) for seed in runs(plan)]
    if plan.auto is not None:
        where = "experts and routers where the front of the validation prompts is weak"
        found.append(Stage("place", where, "placed", _place, remakes=None))
    names = sweeps(plan)
    for name in names:
        found += _sweeping(plan, name)
    note = {"methods": names, "seeds": list(plan.seeds)} if plan.seeds else names
    return [*found, Stage("report", f"{len(names)} methods compared", "report.html", _report, note=note)]


def _training(plan: Plan, seed: int | None) -> Stage:
    """All routers, with one of several seeds, or once."""
    each = f"at most {plan.most_updates}" if plan.updates == "auto" else plan.updates
    what = f"train {len(plan.routers)} routers with {plan.trainer}, {each} updates each"
    after = None if seed is None else (of_seed(f"sweep {HOE}", seed), f"stack {HOE}", "report")
    return Stage(of_seed("train", seed), what, of_seed("trained", seed), _train(seed), remakes=after)


def _sweeping(plan: Plan, name: str) -> list[Stage]:
    """A method's sweep; of one that is trained, a sweep for each seed, and all of them as one."""
    what = {HOE: "HoE", DROPPED: "HoE, its trained routers dropped"}.get(name) or BASELINES[name].summary
    seeds = plan.seeds if name == HOE or (name in BASELINES and is_trained(name)) else ()
    sweep_of = _sweep_baseline if name in BASELINES else _sweep_hoe
    found = [
        Stage(of_seed(f"sweep {name}", seed), what, f"{SWEEPS}/{of_seed(name, seed)}/sweep.json", sweep_of(name, seed))
        for seed in (seeds or (None,))
    ]
    if seeds:
        together = f"the sweeps of {len(seeds)} seeds as one"
        found.append(Stage(f"stack {name}", together, f"{SWEEPS}/{name}/sweep.json", _stack(name), note=list(seeds)))
    return found


def sweeps(plan: Plan) -> list[str]:
    """The folders of all methods' sweeps, HoE's first."""
    return [HOE, *([DROPPED] if plan.learns else []), *plan.baselines]


def _build(experiment: Experiment) -> None:
    plan = experiment.plan
    build_adapter(
        plan.base, plan.policies, plan.folder / "adapter", experts=plan.experts, routers=plan.routers, r=plan.rank,
        seed=plan.seed, overwrite=True, progress=experiment.progress,
        loading=Loading(keep_shards=True),  # the base and the policies are loaded later
    )  # fmt: skip


def _train(seed: int | None) -> Callable[[Experiment], None]:
    def run(experiment: Experiment) -> None:
        model, tokenizer = load_adapter(str(experiment.plan.folder / "adapter"), experiment.plan.base)
        train(
            experiment.plan, seed, model, tokenizer, experiment.prompts, experiment.rewards, progress=experiment.progress
        )  # fmt: skip

    return run


def _place(experiment: Experiment) -> None:
    placed(
        experiment.plan, experiment.before_placing(), experiment.prompts, experiment.rewards, experiment.device,
        progress=experiment.progress,
    )  # fmt: skip


def _sweep_hoe(name: str, seed: int | None) -> Callable[[Experiment], None]:
    """HoE itself measures the payoff table, of several seeds the first; without routers it is measured on the same scale."""

    def run(experiment: Experiment) -> None:
        plan = experiment.plan
        first = runs(plan)[0]
        model, tokenizer = load_adapter(str(experiment.adapter(first if seed is None else seed)), plan.base)
        options: dict[str, Any] = {"decoding": plan.decoding}
        if name == DROPPED:
            options |= {"routers": "drop", "name": "HoE, routers dropped", "payoff": _scale(plan, HOE)}
        elif seed != first:
            options["payoff"] = _scale(plan, of_seed(HOE, first))
        elif experiment.prompts.validation:
            options["payoff"] = experiment.prompts.validation
        experiment.sweep(of_seed(name, seed), model.eval().to(experiment.device), tokenizer, **options)

    return run


def _sweep_baseline(name: str, seed: int | None) -> Callable[[Experiment], None]:
    def run(experiment: Experiment) -> None:
        plan, given = experiment.plan, (experiment.prompts, experiment.rewards, experiment.device)
        method = make_baseline(name, plan, *given, progress=experiment.progress, seed=seed)
        experiment.sweep(of_seed(name, seed), generate=method, payoff=_scale(plan, HOE))

    return run


def _stack(name: str) -> Callable[[Experiment], None]:
    return lambda experiment: stack(experiment.plan.folder, name, experiment.plan.seeds)


def _scale(plan: Plan, where: str) -> Any:
    return Sweep.load(plan.folder / SWEEPS / where).normalizer


def _report(experiment: Experiment) -> None:
    folder, settings = experiment.plan.folder, experiment.plan.settings()
    first, *others = (Sweep.load(folder / SWEEPS / name) for name in sweeps(experiment.plan))
    measured = first.metrics() if first.has_scale else None
    compared = [first.compare(other) for other in others] if first.has_scale else []
    numbers = as_json(measured, compared) | {"settings": settings}
    (folder / "metrics.json").write_text(json.dumps(numbers, indent=1) + "\n", encoding="utf-8")
    placing = [] if experiment.plan.auto is None else [(folder / FOLDER / STORY).read_text(encoding="utf-8").rstrip()]
    summary = [*placing, first.table()] + ([] if measured is None else [measured.table()])
    if compared:
        summary.append("\n".join("  ".join(row).rstrip() for row in aligned(overview(first.name, compared))))
    (folder / SUMMARY).write_text("\n\n".join(summary) + "\n", encoding="utf-8")
    first.plot(folder / "front.png", others=others)
    write_report(first, folder / "report.html", others=others, compared=compared, settings=settings)
