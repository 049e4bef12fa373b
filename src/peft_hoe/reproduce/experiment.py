"""Running an experiment stage by stage, so that nothing is done twice."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ..errors import HoEError
from ..evaluation.reporting.tables import rounded
from ..evaluation.sweeps.sweep import Sweep
from .plan import Plan
from .progress import Progress
from .stages import SUMMARY, Experiment, Stage, stages, sweeps


@dataclass(frozen=True, eq=False)
class Reproduction:
    """What an experiment found.

    Attributes:
        sweeps: `{name: sweep}`, HoE's first, as the folders in `sweeps`.
        report: the page.
        summary: HoE's table and metrics, and how the others compare, as text.

    >>> from peft_hoe.reproduce import Reproduction
    >>> Reproduction.__dataclass_fields__.keys()
    dict_keys(['sweeps', 'report', 'summary'])
    """

    sweeps: dict[str, Sweep]
    report: Path
    summary: str


def reproduce(
    plan: Plan, *, restart: bool = False, progress: bool = True, say: Callable[[str], None] | None = None
) -> Reproduction:
    """Build, train, sweep, compare; the same call after an interruption goes on where it ended.

    Args:
        plan: the settings; `output_dir` must be empty, or hold an experiment with the same ones. Baselines may be added.
        restart: delete the experiment in `output_dir` first.
        progress: show the bars and tables of the stages.
        say: is told each stage as it begins.

    Raises:
        HoEError: the settings differ from those of the experiment in `output_dir`, or a stage fails. What the stages before
            it wrote is kept.

    >>> from peft_hoe import demo
    >>> from peft_hoe.reproduce import Plan, reproduce
    >>> plan = Plan.of(
    ...     "own", base=demo.BASE, policies=demo.POLICIES, prompts=str(demo.embedded.ASSETS / "prompts.json"), output_dir="out",
    ...     rewards={name: f"peft_hoe.demo.rewards:{name}" for name in demo.REWARDS}, routers=[], experts=[],
    ...     preferences=[[1, 0], [0, 1]], decoding={"max_new_tokens": 4}, cpu=True,
    ... )
    >>> found = reproduce(plan, progress=False)
    >>> found.report.name
    'report.html'
    """
    so_far = Progress(plan, restart=restart)
    say = say or (lambda text: None)
    experiment = Experiment(plan, progress)
    planned = stages(plan)
    if not all(stage.is_finished(plan.folder, so_far.finished) for stage in planned):
        try:
            experiment.check()
        except ImportError as error:
            raise HoEError(str(error), value=error.name) from None
        so_far.forget([])  # from here on the folder is an experiment's
    for number, stage in enumerate(planned):
        if stage.is_finished(plan.folder, so_far.finished):
            say(f"{stage.name}: done")
            continue
        say(f"{stage.name}: {stage.summary}")
        if stage.remakes != ():
            so_far.forget([stage.name, *_built_on(stage, planned[:number], so_far)])
        stage.run(experiment)
        so_far.finish(stage.name, stage.note)
    loaded = {name: Sweep.load(plan.folder / "sweeps" / name) for name in sweeps(plan)}
    return Reproduction(loaded, plan.folder / "report.html", (plan.folder / SUMMARY).read_text(encoding="utf-8"))


def _built_on(stage: Stage, before: list[Stage], so_far: Progress) -> list[str]:
    """The finished stages that build on what a stage writes, also such as are not asked for now."""
    if stage.remakes is not None:
        return list(stage.remakes)
    return [name for name in so_far.finished if name not in {one.name for one in before}]


def describe(plan: Plan) -> str:
    """The settings, and what is done and what will be; reads `reproduce.json` and nothing else.

    Raises:
        HoEError: the settings differ from those of the experiment in `output_dir`.

    >>> from peft_hoe import demo
    >>> from peft_hoe.reproduce import Plan, describe
    >>> plan = Plan.of(
    ...     "own", base=demo.BASE, policies=demo.POLICIES, prompts=str(demo.embedded.ASSETS / "prompts.json"), output_dir="out",
    ...     rewards={name: f"peft_hoe.demo.rewards:{name}" for name in demo.REWARDS},
    ... )
    >>> describe(plan).splitlines()[-1].split()[:2]
    ['to', 'do']
    """
    finished = Progress(plan).finished
    lines = [f"{name:16}  {json.dumps(rounded(value))}" for name, value in plan.settings().items() if value is not None]
    return "\n".join([*lines, "", *(_line(plan, stage, finished) for stage in stages(plan))])


def _line(plan: Plan, stage: Stage, finished: dict[str, object]) -> str:
    state = "done" if stage.is_finished(plan.folder, finished) else "to do"
    return f"{state:6} {stage.name}: {stage.summary} -> {plan.folder / stage.output}"
