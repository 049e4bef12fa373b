"""A sweep needs no extra: what measures and draws is imported when it is asked for."""

from __future__ import annotations

import subprocess
import sys

import pytest

PROGRAM = """
import sys
EXTRAS = ("datasets", "evaluate", "matplotlib", "moocore", "trl")
for name in EXTRAS:
    sys.modules[name] = None  # importing it raises ImportError
import peft_hoe
from peft_hoe import demo

model, tokenizer = demo.load_demo_adapter(), demo.load_tokenizer()
found = peft_hoe.sweep(
    model, tokenizer, demo.load_prompts()[:2], demo.REWARDS, [[1, 0], [0.5, 0.5], [0, 1]], payoff=demo.load_prompts()[2:4],
    decoding={"max_new_tokens": 12}, output_dir=sys.argv[1], progress=False,
)
again = peft_hoe.Sweep.load(sys.argv[1])
assert (again.points == found.points).all() and again.points.shape == (3, 2)
assert again.normalized(again.points).shape == (3, 2)
for ask in (found.metrics, found.plot):
    try:
        ask()
    except (ImportError, peft_hoe.HoEError) as error:
        assert "peft-hoe[eval]" in str(error), error
    else:
        raise AssertionError(ask)
"""


@pytest.mark.slow
def test_sweeping_saving_and_loading_need_no_extra(tmp_path):
    run = subprocess.run([sys.executable, "-c", PROGRAM, str(tmp_path)], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
