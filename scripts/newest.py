"""Run the tests and write the result, with the versions that were installed, into docs/compatibility.md; `make newest` does it.

Arguments go to pytest.
"""

from __future__ import annotations

import platform
import subprocess
import sys
import tempfile
from datetime import date
from importlib import metadata
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "compatibility.md"
START, END = "<!-- written by make newest -->", "<!-- end -->"
PACKAGES = ("torch", "transformers", "peft", "trl", "accelerate", "datasets", "numpy")


def main(arguments: list[str]) -> int:
    """Run, write, and return pytest's status."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-m", "slow or not slow", f"--junit-xml={report}", *arguments]
        status = subprocess.run(command, cwd=ROOT, check=False).returncode
        if not report.exists():
            return status
        cases = list(ElementTree.parse(report).iter("testcase"))
    before, rest = PAGE.read_text().split(START)
    PAGE.write_text(before + START + "\n" + table(cases) + END + rest.partition(END)[2])
    return status


def table(cases: list[ElementTree.Element]) -> str:
    """Markdown: one line of versions and counts, and the tests that failed."""
    failed = [case for case in cases if case.find("failure") is not None or case.find("error") is not None]
    skipped = sum(case.find("skipped") is not None for case in cases)
    cells = {"date": date.today().isoformat(), "Python": platform.python_version()}
    cells |= {name: metadata.version(name) for name in PACKAGES}
    cells |= {"passed": str(len(cases) - len(failed) - skipped), "failed": str(len(failed)), "skipped": str(skipped)}
    lines = [f"| {' | '.join(cells)} |", f"|{'---|' * len(cells)}", f"| {' | '.join(cells.values())} |", ""]
    lines += [f"- failed: `{case.get('classname')}::{case.get('name')}`" for case in failed]
    return "\n".join(lines) + ("\n" if failed else "")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
