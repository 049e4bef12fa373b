"""The page as a program of its own, such as a Space on the Hugging Face Hub."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from ...evaluation import Sweep
from ...inputs import load_adapter
from ..server.engine import Engine
from .page import CSS, make_page, theme


def launch(adapter: str, base: str | None = None, *, sweep: str | None = None, title: str = "", **options: Any) -> None:
    """Load a model and serve its page until stopped.

    Args:
        adapter: directory or Hub id.
        base: of its base; default what the adapter names.
        sweep: directory of a saved sweep.
        title: of the page; default the last part of `adapter`.
        **options: of Gradio's `launch`.

    Raises:
        HoEError: something cannot be loaded.
    """
    model, tokenizer = load_adapter(adapter, base)
    model = model.eval().to("cuda" if torch.cuda.is_available() else "cpu")
    engine = Engine(model, tokenizer)
    engine.start()
    found = None if sweep is None else Sweep.load(sweep)
    page = make_page(engine, title or Path(adapter).name, sweep=found)
    page.launch(theme=theme(), css=CSS, footer_links=[], ssr_mode=False, **options)
