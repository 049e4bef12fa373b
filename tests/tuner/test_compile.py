"""torch.compile: no graph break and no recompilation by the preference; blocks and calls still steer."""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.testing import CompileCounter


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


@pytest.fixture
def llama(llama):
    """With one layer: what takes time here is compiling."""

    def make(width=32):
        model = llama(width)
        del model.model.layers[1:]
        model.config.num_hidden_layers = 1
        return model

    return make


@pytest.fixture
def hoe_llama(hoe_llama):
    """In float64, where equal means equal."""
    return lambda **settings: hoe_llama(**settings).double()


@pytest.mark.slow
@pytest.mark.usefixtures("whole_graph")
@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("interpolation", ["linear", "norm"])
def test_set_preference_neither_breaks_the_graph_nor_recompiles(hoe_llama, tokens, trained, interpolation):
    model = hoe_llama(trained=trained, interpolation=interpolation)
    counter = CompileCounter()
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    compiles = []
    for preference in ([1, 0], [0.7, 0.3], [0.25, 0.75], [0.1, 0.9]):  # at the last two the router votes
        model.set_preference(preference)
        with torch.no_grad():
            torch.testing.assert_close(compiled(tokens).logits, model(tokens).logits, rtol=0, atol=1e-10)
        compiles.append(counter.frame_count)
    assert compiles == [1] * 4


@pytest.mark.slow
@pytest.mark.usefixtures("whole_graph")
def test_one_graph_for_all_preferences_and_one_for_rows(hoe_llama, tokens):
    """Twenty preferences that reach different experts and routers; then three batches of rows."""
    model = hoe_llama(trained=True, interpolation="norm", routers=[[0.25, 0.75], [0.6, 0.4]])
    counter = CompileCounter()
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    points = [[i / 19, 1 - i / 19] for i in range(20)]
    with torch.no_grad():
        for preference in points:
            model.set_preference(preference)
            torch.testing.assert_close(compiled(tokens).logits, model(tokens).logits, rtol=0, atol=1e-10)
        assert counter.frame_count == 1
    compiled = torch.compile(model, backend=counter)  # a call's own preference is read outside of graphs
    with torch.no_grad():
        for start in (0, 4, 9, 17):
            rows = points[start : start + 3]
            found = compiled(tokens, preference=rows).logits
            torch.testing.assert_close(found, model(tokens, preference=rows).logits, rtol=0, atol=1e-10)
        assert counter.frame_count == 2


@pytest.mark.slow
@pytest.mark.usefixtures("whole_graph")
@pytest.mark.parametrize("trained", [False, True])
def test_generate_with_a_static_cache(hoe_llama, tokens, trained):
    """transformers compiles the step itself. One graph for the preferences, one for rows, and the tokens of plain generate."""
    transformers = pytest.importorskip("transformers")
    settings = transformers.CompileConfig(backend="aot_eager", mode=None, fullgraph=True)
    settings._compile_all_devices = True
    model = hoe_llama(trained=trained, interpolation="norm")
    common = {
        "input_ids": tokens, "attention_mask": torch.ones_like(tokens), "max_new_tokens": 5, "min_new_tokens": 5,
        "do_sample": False,
    }  # fmt: skip
    rows = [[[1.0, 0.0], [0.25, 0.75], [0.6, 0.4]], [[0.2, 0.8], [0.0, 1.0], [0.9, 0.1]]]
    torch._dynamo.utils.counters.clear()
    for preference, graphs in (([0.25, 0.75], 1), ([0.7, 0.3], 1), ([1.0, 0.0], 1), (rows[0], 2), (rows[1], 2)):
        found = model.generate(**common, preference=preference, cache_implementation="static", compile_config=settings)
        assert torch.equal(found, model.generate(**common, preference=preference))
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs
    assert not torch._dynamo.utils.counters["graph_break"]


@pytest.mark.slow
def test_a_rejected_preference_leaves_a_compiled_model_working(hoe_llama, tokens):
    model = hoe_llama()
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad():
        expected = {key: model(tokens, preference=list(key)).logits for key in ((1, 0), (0, 1))}
        with pytest.raises(Exception, match=r"negative|sums to"):
            compiled(tokens, preference=[2, 0])
        torch.testing.assert_close(compiled(tokens, preference=[1, 0]).logits, expected[1, 0], rtol=0, atol=1e-10)
        model.set_preference([0, 1])
        torch.testing.assert_close(compiled(tokens).logits, expected[0, 1], rtol=0, atol=1e-10)
        torch.testing.assert_close(model(tokens).logits, expected[0, 1], rtol=0, atol=1e-10)


@pytest.mark.slow
def test_calls_and_blocks_steer_a_compiled_model(hoe_llama, tokens):
    model = hoe_llama(trained=True)
    compiled = torch.compile(model, backend="eager")
    rows = [[1, 0], [0.1, 0.9], [0.4, 0.6]]
    with torch.no_grad():
        for preference in ([1, 0], [0.1, 0.9], rows):
            expected = model(tokens, preference=preference).logits
            torch.testing.assert_close(compiled(tokens, preference=preference).logits, expected, rtol=0, atol=1e-10)
            with model.use_preference(preference):
                torch.testing.assert_close(compiled(tokens).logits, expected, rtol=0, atol=1e-10)
        torch.testing.assert_close(compiled(tokens).logits, model(tokens).logits, rtol=0, atol=1e-10)
