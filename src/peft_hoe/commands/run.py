"""`peft-hoe run`: any Python program that loads PEFT adapters, with HoE registered."""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from pathlib import Path

from ..errors import HoEError
from ..preference import read_preference
from ..tuner.steering import PREFERENCE_VARIABLE


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.usage = "peft-hoe run [--preference PREFERENCE] -- COMMAND [ARGUMENT ...]"
    parser.add_argument(
        "--preference",
        help="default preference of the HoE adapters that the program loads, such as 0.7,0.3 or helpful=0.7,harmless=0.3",
    )
    parser.add_argument(
        "program",
        nargs=argparse.REMAINDER,
        metavar="COMMAND",
        help="a Python script, `-m MODULE`, or a program such as `python script.py` or `lm_eval`",
    )


def run(arguments: argparse.Namespace) -> int:
    """Replace this process by the program; comes back only with an error.

    Raises:
        HoEError: there is no program, or it cannot be found.
        PreferenceError: the preference cannot be read.
    """
    program = arguments.program[1:] if arguments.program[:1] == ["--"] else arguments.program
    if not program:
        raise HoEError("no command to run; write peft-hoe run -- python script.py", argument="COMMAND")
    if program[0] == "-m" or program[0].endswith(".py"):
        program = [sys.executable, *program]
    environment = dict(os.environ)
    # `python` and its tools are those of the environment that peft_hoe is installed in, activated or not.
    environment["PATH"] = os.pathsep.join([os.path.dirname(sys.executable), os.environ.get("PATH", os.defpath)])
    if shutil.which(program[0], path=environment["PATH"]) is None:
        raise HoEError(f"cannot find the program {program[0]!r}", argument="COMMAND", value=program[0])
    bootstrap = str(Path(__file__).resolve().parent.parent / "bootstrap")
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [bootstrap, os.environ.get("PYTHONPATH")]))
    if arguments.preference is not None:
        read_preference(arguments.preference)
        environment[PREFERENCE_VARIABLE] = arguments.preference
    sys.stdout.flush()
    os.execvpe(program[0], program, environment)
