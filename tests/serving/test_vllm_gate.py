from __future__ import annotations

import pytest
import torch

from peft_hoe import HoELayer, RouterSpec, use_preference
from peft_hoe.serving.routed_exporter import room
from peft_hoe.serving.routed_lora import RoutedFormat, routed_factors, routed_votes
from peft_hoe.serving.source import adapter_from_model
from peft_hoe.serving.vllm_gate import fits, gate

RANK = 64
POINTS = ([0.25, 0.75], [0.4, 0.6], [0.6, 0.4])
TOKENS = 40


def in_memory(model, module, layout, points, dtype=torch.float32):
    """A `(M, RANK, d_in)` and B `(M, 1, d_out, RANK)` as an engine keeps them: one adapter a preference."""
    source = adapter_from_model(model)
    factors = [
        routed_factors(source, module, routed_votes(source.config, torch.tensor(p).numpy()), layout) for p in points
    ]
    a = torch.zeros(len(points), RANK, factors[0].a.shape[1], dtype=dtype)
    b = torch.zeros(len(points), 1, factors[0].b.shape[0], RANK, dtype=dtype)
    for slot, each in enumerate(factors):
        a[slot, : each.rank], b[slot, 0, :, : each.rank] = each.a, each.b
    return a, b


def by_engine(a, b, x, memory, layout):
    """What vLLM adds: shrink in float32, gate, expand."""
    at = memory.clamp_min(0)
    inner = torch.einsum("ti,tri->tr", x, a.float()[at])
    gate(inner, b, memory, layout)
    return torch.einsum("tr,tor->to", inner, b[:, 0].float()[at])


def by_layer(model, layer, x, point):
    with torch.no_grad(), use_preference(model, point):
        return layer(x) - layer.base_layer(x)


@pytest.fixture(params=["linear", "norm"])
def routed(request, steerable):
    """A model in float32 with two trained routers, whose experts differ in rank, and its layers."""
    model = steerable(trained=("r0", "r1"), interpolation=request.param, rank_pattern={"q_proj": [3, 5, 2]}).float()
    return model, [layer for layer in model.modules() if isinstance(layer, HoELayer)]


def layout_of(model):
    config = model.peft_config["default"]
    found = room([(config, torch.tensor(POINTS).numpy())])
    assert found is not None
    return found


def test_tokens_of_several_preferences_get_what_the_layer_adds(routed, agree):
    model, layers = routed
    layout = layout_of(model)
    generator = torch.Generator().manual_seed(5)
    for layer in layers:
        x = torch.randn(TOKENS, layer.in_features, generator=generator)
        a, b = in_memory(model, layer.module_name, layout, POINTS)
        memory = torch.randint(-1, len(POINTS), (TOKENS,), generator=generator)
        found = by_engine(a, b, x, memory, layout)
        assert (found[memory == -1] == 0).all()
        for slot, point in enumerate(POINTS):
            agree(found[memory == slot], by_layer(model, layer, x[memory == slot], point))


def test_a_router_by_module_votes_beside_one_by_token(steerable, agree):
    routers = [RouterSpec([0.25, 0.75], kind="module"), RouterSpec([0.75, 0.25])]
    model = steerable(experts=[[1, 0], [0, 1]], routers=routers, trained=("r0", "r1"), interpolation="norm").float()
    for layer in model.modules():
        if isinstance(layer, HoELayer):  # as it trains: biases alone
            layer.hoe_router["default"].weight.data[: len(model.peft_config["default"].routers[0].votes_for)] = 0
    points = [[0.4, 0.6], [0.25, 0.75]]
    config = model.peft_config["default"]
    votes = [routed_votes(config, torch.tensor(point).double().numpy()) for point in points]
    assert [each.by_input for each in votes] == [True, False]  # at its own preference it is alone: an ordinary LoRA
    layout = room([(config, torch.tensor(points).double().numpy())])
    layer = next(layer for layer in model.modules() if isinstance(layer, HoELayer))
    a, b = in_memory(model, layer.module_name, layout, points[:1])
    x = torch.randn(TOKENS, layer.in_features, generator=torch.Generator().manual_seed(9))
    found = by_engine(a, b, x, torch.zeros(TOKENS, dtype=torch.long), layout)
    agree(found, by_layer(model, layer, x, points[0]))


def test_what_is_no_routed_lora_passes_through_bit_for_bit(routed):
    model, layers = routed
    layout, layer = layout_of(model), layers[0]
    a, b = in_memory(model, layer.module_name, layout, [POINTS[0]] * 4)
    generator = torch.Generator().manual_seed(6)
    a[1], b[1] = torch.randn(a[1].shape, generator=generator), torch.randn(b[1].shape, generator=generator)
    a[2], b[2] = 0, 0  # no adapter
    a[3], b[3] = 0, torch.nan  # another's faults are its own
    inner = torch.randn(TOKENS, RANK, generator=generator)
    memory = torch.arange(TOKENS) % 3
    before = inner.clone()
    gate(inner, b, memory, layout)
    assert torch.equal(inner[memory > 0], before[memory > 0])
    assert not torch.equal(inner[memory == 0], before[memory == 0])


def test_a_token_does_not_depend_on_its_neighbours(routed):
    model, layers = routed
    layout, layer = layout_of(model), layers[0]
    _, b = in_memory(model, layer.module_name, layout, POINTS)
    inner = torch.randn(TOKENS, RANK, generator=torch.Generator().manual_seed(7))
    memory = torch.arange(TOKENS) % 3
    alone = inner[:1].clone()
    gate(inner, b, memory, layout)
    gate(alone, b, memory[:1], layout)
    torch.testing.assert_close(inner[:1], alone, rtol=1e-6, atol=1e-6)


def test_sixteen_bits_in_memory_keep_sixteen_bits_of_votes(routed):
    """Votes and routers stand there as two numbers each; alone, bfloat16 would be off by half a percent."""
    model, layers = routed
    layout, layer = layout_of(model), layers[0]
    wide, narrow = (
        in_memory(model, layer.module_name, layout, POINTS, dtype) for dtype in (torch.float32, torch.bfloat16)
    )
    x = torch.randn(TOKENS, layer.in_features, generator=torch.Generator().manual_seed(8))
    memory = torch.arange(TOKENS) % 3
    scales = []
    for a, b in (wide, narrow):
        shrunk = torch.einsum("ti,tri->tr", x, a.float()[memory])
        # The experts' own rounding is not the gate's: the same A x, but for the routers' rows.
        first = layout.columns(b.shape[2])
        shrunk[:, first : first + 10] = 1.0
        gate(shrunk, b, memory, layout)
        scales.append(shrunk[:, first : first + 10])
    assert (scales[0] - scales[1]).abs().max() < 2e-4 * scales[0].abs().max()


def test_a_format_that_no_module_can_hold_leaves_everything_alone():
    layout = RoutedFormat(experts=3, slots=4)
    assert layout.columns(16) == 3  # 4 + 2 * 18 numbers
    assert layout.rank(16, 10) == 3 + 10 + 8
    assert fits(layout, 16, 11)
    assert not fits(layout, 16, 10)
    assert not fits(layout, 5, 64)
    inner = torch.ones(2, 8)
    gate(inner, torch.zeros(1, 1, 16, 8), torch.zeros(2, dtype=torch.long), layout)
    assert (inner == 1).all()
