"""What needs an extra is imported when it is used."""

from __future__ import annotations

import subprocess
import sys


def test_importing_sweeps_imports_no_extras():
    code = (
        "import sys, peft_hoe; from peft_hoe import Sweep, sweep; import peft_hoe.evaluation as e; assert sweep is e.sweep; "
        "assert Sweep is e.Sweep; print([name for name in ('trl', 'moocore', 'matplotlib', 'evaluate') if name in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
