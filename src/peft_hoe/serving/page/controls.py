"""What a preference is chosen with: a slider for two objectives, a triangle for three, sliders for more."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import gradio as gr
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from ...preference import FloatArray

WIDTH, HEIGHT, MARGIN = 360, 330, 34
_TOP, _LEFT, _RIGHT = (WIDTH / 2, MARGIN), (MARGIN, HEIGHT - MARGIN), (WIDTH - MARGIN, HEIGHT - MARGIN)
_CORNERS = np.array([_TOP, _LEFT, _RIGHT])


class Controls:
    """The components of a preference of N objectives, made where it is constructed.

    Args:
        objectives: the N names.
        default: `(N,)`.

    Attributes:
        inputs: components whose values `read` takes.
        changes: the events on which texts are written anew.
    """

    def __init__(self, objectives: Sequence[str], default: FloatArray) -> None:
        self.objectives = list(objectives)
        self.inputs: list[Any]
        self.changes: list[Any]
        if len(objectives) == 3:
            self._triangle(default)
            return
        if len(objectives) == 2:
            label = f"{objectives[0]} (1) or {objectives[1]} (0)"
            self.inputs = [gr.Slider(0, 1, value=float(default[0]), step=0.05, label=label, elem_id="weight-0")]
        else:
            self.inputs = [
                gr.Slider(0, 1, value=float(weight), step=0.05, label=name, elem_id=f"weight-{number}")
                for number, (name, weight) in enumerate(zip(objectives, default, strict=True))
            ]
        self.changes = [slider.change for slider in self.inputs]

    def _triangle(self, default: FloatArray) -> None:
        point = gr.State(default.tolist())
        gr.HTML("click the preference")  # a label of the picture would lie over the name of its upper corner
        picture = gr.Image(
            draw_triangle(self.objectives, default), show_label=False, interactive=False, buttons=[], elem_id="triangle",
            width=WIDTH,
        )  # fmt: skip

        def choose(event: gr.SelectData) -> tuple[list[float], Image.Image]:
            chosen = preference_at(*event.index[:2])
            return chosen.tolist(), draw_triangle(self.objectives, chosen)

        picture.select(choose, None, [point, picture], show_progress="hidden")
        self.inputs = [point]
        self.changes = [point.change]

    def read(self, *values: Any) -> FloatArray:
        """The preference `(N,)` of the components' values; uniform where all weights are 0."""
        if len(self.objectives) == 2:
            return np.array([values[0], 1 - values[0]])
        weights = np.asarray(values[0] if len(self.objectives) == 3 else values, dtype=float)
        return weights / weights.sum() if weights.sum() > 0 else np.full(len(weights), 1 / len(weights))


def preference_at(x: float, y: float) -> FloatArray:
    """The preference `(3,)` of a place in the triangle's picture; from outside the nearest of its edges."""
    system = np.vstack([_CORNERS.T, np.ones(3)])
    weights = np.linalg.solve(system, np.array([x, y, 1.0])).clip(0, None)
    return np.asarray((weights / weights.sum()).round(2) / (weights / weights.sum()).round(2).sum())


def draw_triangle(objectives: Sequence[str], preference: FloatArray) -> Image.Image:
    """The simplex of three objectives with a point in it."""
    picture = Image.new("RGB", (WIDTH, HEIGHT), "white")
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(16)
    draw.polygon([_TOP, _LEFT, _RIGHT], outline="#444444", fill="#f3f6fa")
    for (x, y), name, anchor in zip(_CORNERS, objectives, ("mb", "lt", "rt"), strict=True):
        draw.text((x if anchor == "mb" else (4 if anchor == "lt" else WIDTH - 4), y + (-8 if anchor == "mb" else 8)), name,
                  fill="black", font=font, anchor=anchor)  # fmt: skip
    x, y = preference @ _CORNERS
    draw.ellipse([x - 8, y - 8, x + 8, y + 8], fill="#0072B2", outline="white", width=2)
    return picture


def told(objectives: Sequence[str], preference: FloatArray) -> str:
    """A preference in words."""
    return ", ".join(
        f"{name} {weight:.0%}"
        for name, weight in zip(objectives, preference, strict=True)
        if not math.isclose(weight, 0)
    )
