"""Kills builds while they run and lets them go on: are the bytes those of a build that was left alone?

    OMP_NUM_THREADS=1 python benchmarks/kills.py --work DIR

A build of two policies and a merged expert on a generated checkpoint (`generated_llama.py`, 2 layers) is ended by SIGKILL
again and again: while it measures the policies, while it makes modules, while it finishes (out of scope weights, configuration,
putting in place), after a random wait within each. Each row of the table is one adapter: how many kills landed in each stage
before it was complete, and whether its files equal those of the build that ran through. Adapters are built until 20 kills have
landed (`--kills`), at least a sixth of them in each stage. Ends with an error where bytes differ or something is left behind.
About 4 minutes on one core.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import shutil
import signal
import sys
import time
import warnings
from pathlib import Path

import torch

import peft_hoe
from fronts_tables import markdown
from generated_llama import make

LAYERS, RANK = 2, 16
STAGES = ("measuring", "making", "finishing")


class Build:
    """A build in a process of its own; a fork, so that imports are paid for once."""

    def __init__(self, work: Path, output: Path) -> None:
        base = make(work / f"base-{LAYERS}", LAYERS)
        policies = {f"p{i}": make(work / f"p{i}-{LAYERS}", LAYERS, i) for i in (1, 2)}
        self.pid = os.fork()
        if self.pid == 0:
            code = 1
            with contextlib.suppress(BaseException):
                peft_hoe.build_adapter(base, policies, output, r=RANK, progress=False)
                code = 0
            os._exit(code)
        self._code: int | None = None

    def poll(self) -> int | None:
        """The exit code, negative for a signal; None while it runs."""
        if self._code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self._code = os.waitstatus_to_exitcode(status) if pid else None
        return self._code

    def wait(self) -> int:
        while (code := self.poll()) is None:
            time.sleep(0.001)
        return code


def stage(folder: Path) -> str | None:
    """What the build that fills a folder is at; None before it begins and after it has ended."""
    place = next((path for path in folder.iterdir() if path.name.startswith(".peft_hoe-")), None)
    if place is None:
        return None
    try:
        made = (place / "state" / "modules.jsonl").read_bytes().count(b"\n")
    except FileNotFoundError:  # not begun; or the whole place has just gone
        return "measuring" if place.exists() else None
    return "making" if made < 7 * LAYERS else "finishing"


def kill_in(wanted: str, process: Build, folder: Path, wait: float) -> str | None:
    """Kill a build some time after it has come to a stage; the stage it was killed in, or None where it ended first."""
    while process.poll() is None and stage(folder) != wanted:
        time.sleep(0.0005)
    time.sleep(wait)
    if process.poll() is not None:
        return None
    os.kill(process.pid, signal.SIGSTOP)  # so that the stage is that of the kill
    landed = stage(folder)
    os.kill(process.pid, signal.SIGKILL)
    return landed if process.wait() == -signal.SIGKILL else None


def contents(folder: Path) -> dict[str, str]:
    """The files; what names the folder itself is left out."""
    return {path.name: path.read_bytes().decode("latin-1").replace(str(folder), "") for path in folder.iterdir()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for checkpoints and adapters")
    parser.add_argument("--kills", type=int, default=20, help="how many; builds are killed once in every stage each")
    parser.add_argument("--seed", type=int, default=0, help="of the waits before a kill")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", peft_hoe.HoEWarning)  # of ties in generated weights
    folder = arguments.work / "kills"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    reference = folder / "whole" / "out"
    reference.parent.mkdir()
    assert Build(arguments.work, reference).wait() == 0
    expected, rng = contents(reference), random.Random(arguments.seed)
    rows: list[list[str]] = []
    sums = dict.fromkeys(STAGES, 0)

    def enough() -> bool:
        return sum(sums.values()) >= arguments.kills and min(sums.values()) >= arguments.kills // 6

    while not enough() and len(rows) < arguments.kills:
        place = folder / str(len(rows))
        place.mkdir()
        landed = dict.fromkeys(STAGES, 0)
        for wanted, longest in zip(STAGES, (0.8, 3.0, 0.15), strict=True):
            found = kill_in(wanted, Build(arguments.work, place / "out"), place, rng.uniform(0, longest))
            if found is not None:
                landed[found] += 1
        if not (place / "out").exists():
            assert Build(arguments.work, place / "out").wait() == 0
        sums = {name: sums[name] + landed[name] for name in STAGES}
        same = contents(place / "out") == expected
        left = [path.name for path in place.iterdir() if path.name != "out"]
        rows.append([place.name, *(str(landed[name]) for name in STAGES), "yes" if same else "NO", str(len(left))])
        print(rows[-1], file=sys.stderr, flush=True)
    print(markdown(["adapter", *(f"kills while {name}" for name in STAGES), "same bytes", "strays left"], rows))
    counts = ", ".join(f"{count} while {name}" for name, count in sums.items())
    print(f"\n{sum(sums.values())} kills landed: {counts}")
    if not enough():
        raise SystemExit("too few kills landed while a build ran; try another --seed")
    if any(row[-2:] != ["yes", "0"] for row in rows):
        raise SystemExit("a build that was killed differs from one that was not, or left something behind")


if __name__ == "__main__":
    main()
