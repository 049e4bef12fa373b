"""Runs every check on every architecture, and writes the table of docs/compatibility.md between its marks.

    python scripts/architectures/run.py [NAME ...] [--write]

Exits with 1 where anything is wrong: neither right nor refused by an error of ours that says why.
"""

from __future__ import annotations

import argparse
import logging
import sys
import warnings
from importlib import metadata
from pathlib import Path

import torch
from checks import ABSENT, CHECKS, adapted
from models import ARCHITECTURES, Architecture

import peft_hoe

PAGE = Path(__file__).resolve().parents[2] / "docs" / "compatibility.md"
BEGIN, END = "<!-- architectures: begin -->", "<!-- architectures: end -->"
RIGHT, REFUSED, WRONG = "right", "refused", "WRONG"


def outcome(architecture: Architecture, check: str) -> tuple[str, str]:
    """What one check came to, and what was said."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # such as that fused experts are left out
            found = CHECKS[check](architecture, adapted(architecture))
    except (peft_hoe.HoEError, NotImplementedError) as error:
        return REFUSED, str(error)
    except Exception as error:  # a bare error is a fault as well
        return WRONG, f"{type(error).__name__}: {error}"
    return (found or RIGHT), ""


def table(results: dict[str, dict[str, tuple[str, str]]]) -> list[str]:
    """Markdown: a row for each architecture, and below it what was refused and why."""
    shown = {RIGHT: "✓", ABSENT: "–", WRONG: "wrong"}
    lines = [f"| architecture | {' | '.join(CHECKS)} |", "|---" * (len(CHECKS) + 1) + "|"]
    reasons: list[str] = []
    for name, cells in results.items():
        marks = []
        for state, said in cells.values():
            if state == REFUSED and said not in reasons:
                reasons.append(said)
            marks.append(f"refused ({reasons.index(said) + 1})" if state == REFUSED else shown[state])
        lines.append(f"| {name} | {' | '.join(marks)} |")
    return lines + [""] + [f"{number}. {' '.join(said.split())}" for number, said in enumerate(reasons, 1)]


def main() -> int:
    """Run, print and perhaps write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"default all of: {', '.join(ARCHITECTURES)}")
    parser.add_argument("--write", action="store_true", help="write the table into docs/compatibility.md")
    args = parser.parse_args()
    unknown = sorted(set(args.names) - set(ARCHITECTURES))
    if unknown:
        parser.error(f"there is no architecture {unknown}; there are {list(ARCHITECTURES)}")
    torch.set_num_threads(1)
    logging.disable(logging.CRITICAL)
    results = {}
    for name in args.names or ARCHITECTURES:
        results[name] = {check: outcome(ARCHITECTURES[name], check) for check in CHECKS}
        for check, (state, said) in results[name].items():
            print(f"{name:18} {check:24} {state} {said[:200]}", flush=True)
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in ("torch", "transformers", "peft"))
    block = [BEGIN, f"With {versions}, float64:", "", *table(results), END]
    if args.write:
        page = PAGE.read_text(encoding="utf-8")
        start, end = page.index(BEGIN), page.index(END) + len(END)
        PAGE.write_text(page[:start] + "\n".join(block) + page[end:], encoding="utf-8")
    return int(any(state == WRONG for cells in results.values() for state, _ in cells.values()))


if __name__ == "__main__":
    sys.exit(main())
