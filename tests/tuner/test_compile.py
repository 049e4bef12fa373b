"""torch.compile: no graph break and no recompilation by the preference; blocks and calls still steer."""

from __future__ import annotations

import pytest
import torch
from packaging import version
from torch._dynamo.testing import CompileCounter


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


# Dynamo of older versions cannot trace PeftModel's forward whole.
whole_graph = pytest.mark.skipif(
    version.parse(torch.__version__) < version.parse("2.8"), reason="torch.compile cannot trace PEFT without a break"
)
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


@pytest.fixture
def llama(llama):
    """With one layer: what takes time here is compiling."""

    def make():
        model = llama()
        del model.model.layers[1:]
        model.config.num_hidden_layers = 1
        return model

    return make


@pytest.fixture
def hoe_llama(hoe_llama):
    """In float64, where equal means equal."""
    return lambda **settings: hoe_llama(**settings).double()


@whole_graph
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
