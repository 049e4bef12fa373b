"""`peft-hoe plan`."""

from __future__ import annotations

from peft_hoe import demo
from peft_hoe.cli import main


def test_the_plan_is_printed(capsys):
    policies = [part for name, path in demo.POLICIES.items() for part in ("--policy", f"{name}={path}")]
    assert main(["plan", str(demo.BASE), *policies, "--rank", "4", "--prune", "none"]) == 0
    printed = capsys.readouterr().out
    assert "cheerful (rank 4), vivid (rank 4), centroid (rank 4)" in printed
    assert "weights in scope once" in printed
