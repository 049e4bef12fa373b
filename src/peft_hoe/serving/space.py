"""The folder of a Space: the page of an adapter, to be pushed to the Hugging Face Hub."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from ..errors import HoEError
from ..files import hoe_settings
from ..inputs import is_path
from ..output_directory import check_output, complete_directory

_APP = '''"""Made by peft-hoe space."""

from peft_hoe.serving.page.launch import launch

launch({adapter!r}, {base!r}, sweep={sweep!r}, title={title!r})
'''
_README = """---
title: {title}
sdk: gradio
sdk_version: {gradio}
app_file: app.py
---

A language model whose preference is dragged, by [peft-hoe](https://pypi.org/project/peft-hoe/). `python app.py` serves the page
on this machine.
"""
_GRADIO = "6.31.0"  # that the page was tested with


def write_space(
    adapter: str, output: Path, *, base: str | None = None, sweep: str | None = None, title: str | None = None
) -> Path:
    """Write a Space.

    Args:
        adapter: directory, which is copied, or Hub id.
        output: new or empty directory.
        base: Hub id of the base; default what the adapter names.
        sweep: directory of a saved sweep of the adapter, which is copied.
        title: of the page; default the last part of `adapter`.

    Raises:
        HoEError: there is no such adapter or sweep, the adapter does not name its base, or the base is a directory, which
            nobody has at the Hub.
    """
    check_output(output, overwrite=None)
    folder = Path(adapter)
    settings = _settings(adapter)
    base = base or settings.get("base_model_name_or_path")
    if base is None and folder.is_dir() or base is not None and (is_path(base) or Path(base).is_dir()):
        raise HoEError(
            f"the base of {adapter} is {base!r}; a Space loads it from the Hub: give its id with --base",
            argument="base",
            value=base,
        )
    if sweep is not None:
        _check_sweep(sweep, settings.get("objectives"))
    name = title or folder.name
    with complete_directory(output) as building:
        if folder.is_dir():
            shutil.copytree(folder, building / "adapter")
        if sweep is not None:
            shutil.copytree(sweep, building / "sweep")
        app = _APP.format(
            adapter="adapter" if folder.is_dir() else adapter, base=base, sweep=sweep and "sweep", title=name
        )
        (building / "app.py").write_text(app, encoding="utf-8")
        version = metadata.version("peft-hoe")
        (building / "requirements.txt").write_text(f"peft-hoe[page]=={version}\n", encoding="utf-8")
        (building / "README.md").write_text(
            _README.format(title=json.dumps(name, ensure_ascii=False), gradio=_GRADIO), encoding="utf-8"
        )
    return output


def _settings(adapter: str) -> dict[str, Any]:
    """What the configuration of an adapter's directory says; nothing is known of one on the Hub."""
    folder = Path(adapter)
    if folder.is_dir():
        return hoe_settings(folder, f"adapter {adapter!r}")
    if is_path(adapter):
        raise HoEError(
            f"there is no folder {adapter!r} for the adapter; give its directory or its id on the Hub",
            argument="adapter", value=adapter,
        )  # fmt: skip
    return {}


def _check_sweep(sweep: str, objectives: Sequence[str] | None) -> None:
    """Refuse what the page would find no sweep of the adapter in."""
    from ..evaluation import Sweep

    found = list(Sweep.load(sweep).objectives)
    if objectives is not None and found != list(objectives):
        raise HoEError(
            f"the sweep {sweep} has objectives {found}, the adapter {list(objectives)}",
            argument="sweep", value=found, allowed=list(objectives),
        )  # fmt: skip
