"""The page: a preference to drag, and what the model writes at it beside its corners and its base."""

from __future__ import annotations

import html
from collections.abc import Iterator, Sequence
from typing import Any

import gradio as gr
import numpy as np
from fastapi import Response

from ...errors import HoEError
from ...tuner.functional import get_preference
from ..server.engine import Engine
from .controls import Controls, told
from .writer import PageTexts, PageWriter, Speaker, Voice

PROMPT = "Once upon a time"
CSS = (
    ".text{white-space:pre-wrap;overflow-wrap:anywhere;min-height:5em;font-size:1rem;line-height:1.6}"
    ".head{font-weight:600;border-bottom:1px solid #ddd;margin-bottom:.4em}.trace{line-height:2.1}"
    ".trace span{padding:.25em 0;border-radius:.2em;white-space:pre-wrap;color:#000}.legend{font-size:.85em}"
    ".legend i{display:inline-block;width:1em;height:1em;margin:0 .35em 0 1em;vertical-align:-.15em}"
)
# Nothing is fetched from elsewhere: the theme's own fonts would be.
FONTS = ("system-ui", "sans-serif")


def make_page(engine: Engine, title: str, *, sweep: Any = None, prompts: Sequence[str] = (PROMPT,)) -> gr.Blocks:
    """A page on an engine that runs.

    Args:
        engine: writes the texts.
        title: of the page.
        sweep: a `Sweep` whose front is shown.
        prompts: offered; the first one is there at the beginning.

    >>> from peft_hoe import demo
    >>> from peft_hoe.serving.page import make_page
    >>> from peft_hoe.serving.server.engine import Engine
    >>> page = make_page(Engine(demo.load_demo_adapter(), demo.load_tokenizer()), "The demo")
    >>> page.title
    'The demo'
    """
    objectives, writer = engine.objectives, PageWriter(engine)
    default = np.array(list(get_preference(engine.model).values()))
    names: list[Speaker] = [Voice.CHOSEN, *objectives, Voice.BASE]
    with gr.Blocks(title=title, analytics_enabled=False) as page:
        gr.Markdown(f"## {title}")
        with gr.Row():
            with gr.Column(min_width=300):
                prompt = gr.Textbox(prompts[0], label="prompt", lines=2, elem_id="prompt")
                controls = Controls(objectives, default)
                with gr.Row():
                    length = gr.Slider(8, 256, value=48, step=8, label="tokens", min_width=120, elem_id="length")
                    temperature = gr.Slider(0, 1.5, value=0, step=0.1, label="temperature", min_width=120)
                button = gr.Button("write", variant="primary", elem_id="write")
            if sweep is not None:
                with gr.Column(min_width=300):
                    front = gr.Plot(show_label=False)
        boxes = []
        with gr.Row():
            for name in names:
                with gr.Column(min_width=250):  # as many beside one another as the window has room for
                    boxes.append(gr.HTML(_box(_head(name), ""), elem_id=_element(name)))

        def write(text: str, tokens: float, heat: float, *values: Any) -> Iterator[list[str]]:
            preference = controls.read(*values)
            try:
                for page_texts in writer.write(text or PROMPT, preference, int(tokens), heat):
                    if page_texts.error:
                        raise gr.Error(page_texts.error)
                    yield _boxes(page_texts, names, told(objectives, preference))
            except HoEError as error:
                raise gr.Error(str(error)) from None

        events = [button.click, prompt.submit, page.load, *controls.changes]
        inputs = [prompt, length, temperature, *controls.inputs]
        gr.on(
            events, write, inputs, boxes, trigger_mode="always_last", show_progress="hidden", api_visibility="private"
        )
        if sweep is not None:
            from .front import draw_front

            def show(*values: Any) -> Any:
                return draw_front(sweep, controls.read(*values))

            gr.on([page.load, *controls.changes], show, controls.inputs, front, show_progress="hidden",
                  trigger_mode="always_last", api_visibility="private")  # fmt: skip
    return page


def theme() -> Any:
    """The page's looks, with fonts that every machine has."""
    return gr.themes.Default(font=FONTS, font_mono=("monospace",))


def mount(app: Any, page: gr.Blocks, path: str) -> Any:
    """Put a page into a FastAPI application, with the two files that browsers ask for besides."""
    app.add_api_route("/manifest.json", lambda: {"name": page.title, "start_url": path}, include_in_schema=False)
    app.add_api_route("/favicon.ico", lambda: Response(status_code=204), include_in_schema=False)
    return gr.mount_gradio_app(app, page, path=path, theme=theme(), css=CSS, footer_links=[], ssr_mode=False)


def _boxes(texts: PageTexts, names: Sequence[Speaker], preference: str) -> list[str]:
    return [
        _box(preference, texts.texts[name], texts.coloured)
        if name is Voice.CHOSEN
        else _box(_head(name), texts.texts[name])
        for name in names
    ]


def _head(name: Speaker) -> str:
    return name.value if isinstance(name, Voice) else name


def _element(name: Speaker) -> str:
    return f"text-{name.value}" if isinstance(name, Voice) else f"text-of-{name}"


def _box(head: str, text: str, coloured: str = "") -> str:
    body = coloured or f'<div class="text">{html.escape(text)}</div>'
    return f'<div class="head">{html.escape(head)}</div>{body}'
