"""The page's parts without a browser."""

from __future__ import annotations

import numpy as np
import pytest

from peft_hoe import HoEError

pytest.importorskip("gradio")
from peft_hoe.serving.page.controls import WIDTH, Controls, draw_triangle, preference_at, told
from peft_hoe.serving.page.writer import PageWriter, Voice
from peft_hoe.serving.server.engine import Engine

pytestmark = pytest.mark.filterwarnings("ignore")


def test_places_of_the_triangle_are_preferences():
    assert preference_at(WIDTH / 2, 34) == pytest.approx([1, 0, 0])
    assert preference_at(34, 296) == pytest.approx([0, 1, 0])
    assert preference_at(WIDTH / 2, 296) == pytest.approx([0, 0.5, 0.5])
    assert preference_at(WIDTH / 2, 34 + 262 * 2 / 3) == pytest.approx([1 / 3] * 3, abs=0.01)
    assert preference_at(WIDTH / 2, 329) == pytest.approx([0, 0.5, 0.5])  # below its edge
    assert preference_at(3, 7).sum() == pytest.approx(1)
    picture = draw_triangle(["a", "b", "c"], np.array([0, 0.5, 0.5]))
    assert picture.getpixel((WIDTH // 2, 296)) == (0, 114, 178)  # the point


def test_sliders_of_several_objectives_are_weights():
    import gradio as gr

    with gr.Blocks():
        four = Controls(["a", "b", "c", "d"], np.full(4, 0.25))
        two = Controls(["a", "b"], np.full(2, 0.5))
    assert len(four.inputs) == 4
    assert four.read(1, 1, 0, 0).tolist() == [0.5, 0.5, 0, 0]
    assert four.read(0, 0, 0, 0).tolist() == [0.25] * 4
    assert two.read(0.25).tolist() == [0.25, 0.75]
    assert told(["a", "b"], np.array([0.25, 0.75])) == "a 25%, b 75%"
    assert told(["a", "b"], np.array([1.0, 0.0])) == "a 100%"


def test_a_prompt_with_a_token_that_the_model_does_not_know_is_refused(toys):
    """Before it is written, where it would fail with the texts of all others."""
    engine = Engine(toys.make_policy().eval(), toys.make_padded_tokenizer(), max_length=40)
    assert engine.vocabulary == 32
    with pytest.raises(HoEError, match=r"token 32 .* in the prompt is none of the 32"):
        next(PageWriter(engine).write("w1 [PAD]", np.array([0.25, 0.75]), 6, 0.0))


@pytest.mark.parametrize("names", [("low", "high"), ("chosen", "base")])
def test_all_texts_are_those_written_alone(toys, names):
    """Also where objectives are called as the page calls its other two texts."""
    model, tokenizer = toys.make_policy(objectives=names), toys.make_tokenizer()
    engine = Engine(model.eval(), tokenizer, max_length=40)
    engine.start()
    try:
        writer = PageWriter(engine)
        *_, last = writer.write("w1 w2 w3", np.array([0.25, 0.75]), 6, 0.0)
        assert set(last.texts) == {Voice.CHOSEN, *names, Voice.BASE}
        assert last.error == ""
        assert last.coloured.count("<span") >= 1
        ids = tokenizer("w1 w2 w3", return_tensors="pt")
        expected = {}
        for name, point in {Voice.CHOSEN: [0.25, 0.75], names[0]: [1, 0], names[1]: [0, 1], Voice.BASE: None}.items():
            options = {"max_new_tokens": 6, "do_sample": False}
            if point is None:
                with model.disable_adapter():
                    found = model.generate(**ids, **options)
            else:
                found = model.generate(**ids, preference=point, **options)
            expected[name] = tokenizer.decode(found[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)
        assert {name: text.strip() for name, text in last.texts.items()} == expected
        *_, again = writer.write("w1 w2 w3", np.array([0.5, 0.5]), 6, 0.0)
        assert again.texts[Voice.BASE] == last.texts[Voice.BASE]  # kept
    finally:
        engine.stop(5)


def test_the_front_marks_the_nearest_measurement(make_sweep):
    from peft_hoe import preference_grid
    from peft_hoe.serving.page.front import draw_front

    grid = preference_grid(2)
    sweep = make_sweep(np.sqrt(grid), preferences=grid)
    (axes,) = draw_front(sweep, np.array([0.31, 0.69])).axes
    marked = axes.lines[-1].get_xydata()[0]
    nearest = int(np.abs(grid[:, 0] - 0.31).argmin())
    assert marked == pytest.approx(np.nanmean(sweep.rewards, axis=(0, 2, 3))[nearest])
    grid = preference_grid(3)
    (axes,) = draw_front(make_sweep(np.sqrt(grid), preferences=grid), np.array([1, 0, 0])).axes
    assert len(axes.lines) == len(grid) + 1
