"""The folder of a Space: the page of an adapter, to be pushed to the Hugging Face Hub."""

from __future__ import annotations

import shutil
from importlib import metadata
from pathlib import Path

from ..errors import HoEError
from ..files import ADAPTER_CONFIG, read_json
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
        sweep: directory of a saved sweep, which is copied.
        title: of the page; default the last part of `adapter`.

    Raises:
        HoEError: the adapter does not name its base, or the base is a directory, which nobody has at the Hub.
    """
    check_output(output, overwrite=False)
    folder = Path(adapter)
    if folder.is_dir():
        base = base or read_json(folder / ADAPTER_CONFIG).get("base_model_name_or_path")
        if not base or Path(base).is_dir():
            raise HoEError(
                f"the base of {adapter} is {base!r}; a Space loads it from the Hub: give its id with --base",
                argument="base",
                value=base,
            )
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
        (building / "README.md").write_text(_README.format(title=name, gradio=_GRADIO), encoding="utf-8")
    return output
