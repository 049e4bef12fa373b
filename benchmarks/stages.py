"""Long measurements in stages: each leaves a small record, and a stage that has its record is not repeated."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from kept_records import Records
from peft_hoe.evaluation.sweeps.result import installed_versions


@dataclass(frozen=True)
class Stage:
    """What is done once; what it returns is its record.

    Args:
        name: of the record's file.
        minutes: of one quiet core, a guess.
        run: does it.
    """

    name: str
    minutes: float
    run: Callable[[], dict[str, Any]]


def add_arguments(command: argparse.ArgumentParser) -> None:
    """`--only` and `--plan`; the command has `--output`."""
    command.add_argument("--only", nargs="*", default=[""], help="stages whose name begins so")
    command.add_argument("--plan", action="store_true", help="print what is left, with minutes, and do nothing")


def go_on(stages: Iterable[Stage], arguments: argparse.Namespace) -> bool:
    """Do what is left, or print it; whether anything was to be done rather than printed."""
    records = Records(arguments.output / "records", again=False)
    left = [stage for stage in stages if stage.name not in records and stage.name.startswith(tuple(arguments.only))]
    if arguments.plan:
        lines = [f"{stage.minutes:6.1f} min  {stage.name}" for stage in left]
        print("\n".join([*lines, f"{sum(stage.minutes for stage in left):6.1f} min  together"]))
        return False
    for stage in left:
        found = records.get(stage.name, lambda stage=stage: _timed(stage))
        print(f"{stage.name}: {found['cpu_seconds']} s", flush=True)
    return True


def _timed(stage: Stage) -> dict[str, Any]:
    started = time.process_time()
    found = stage.run()
    # What knows its own time, since it goes on where an earlier run ended, has said it.
    return {"cpu_seconds": round(time.process_time() - started), "versions": dict(installed_versions())} | found
