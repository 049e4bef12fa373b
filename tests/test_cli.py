"""What all commands share."""

from __future__ import annotations

import warnings
from typing import Any

import pytest

from peft_hoe.cli import main


def test_what_libraries_tell_each_other_is_not_shown_and_other_warnings_are(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(arguments: Any) -> int:
        warnings.warn_explicit("old", FutureWarning, "modeling_utils.py", 1, module="transformers.modeling_utils")
        warnings.warn_explicit("mine", FutureWarning, "script.py", 1, module="script")
        warnings.warn_explicit("true", UserWarning, "modeling_utils.py", 1, module="transformers.modeling_utils")
        return 0

    monkeypatch.setattr("peft_hoe.commands.recipes.run", run)
    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("always")
        assert main(["recipes"]) == 0
    assert [str(warning.message) for warning in shown] == ["mine", "true"]
