"""`peft-hoe merges` lists every method."""

from __future__ import annotations

from peft_hoe.cli import main
from peft_hoe.experts.merging import METHODS


def test_every_method_is_listed_with_its_options_and_source(capsys):
    assert main(["merges"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["method", "options", "and", "their", "defaults", "source"]
    assert [line.split()[0] for line in lines[1:]] == list(METHODS)
    assert "density=0.9, gamma=0.01" in next(line for line in lines if line.startswith("breadcrumbs"))
    assert all(method.source in line for line, method in zip(lines[1:], METHODS.values(), strict=True))
