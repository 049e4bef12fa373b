"""Triton's kernels against a float64 reference, by relative norm; interpreted on the CPU where there is no GPU."""

from __future__ import annotations

import copy

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

from peft_hoe import RouterSpec, record_votes
from peft_hoe.tuner.kernels import fused
from peft_hoe.tuner.kernels.choice import use_kernel
from peft_hoe.tuner.kernels.gate import gated
from peft_hoe.tuner.layer import HoELayer

pytestmark = pytest.mark.usefixtures("triton_here")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CASES = {  # ranks, slots of each router, rows, tokens
    "a step of decoding": ((8, 8, 8), (3,), 1, 1),
    "routers of different sizes": ((2, 5, 0, 3), (4, 2, 1), 1, 7),
    "rows": ((3, 3), (2, 2), 3, 9),
    "rows and ranks": ((1, 140, 2), (3, 1, 2), 2, 8),
    "tiles": ((90, 60), (2,), 2, 66),
    "many experts": ((1,) * 20, (20, 7), 1, 3),
}
EPS = {torch.float32: 2.0**-23, torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7}


@pytest.fixture(params=CASES, ids=CASES.keys())
def case(request, problem):
    ranks, slots, rows, tokens = CASES[request.param]
    return ranks, problem(ranks, slots, rows, tokens)


def given(inner, logits, votes, gram, dtype):
    """As a module hands it over, and the same numbers as float64."""
    inner, logits = inner.to(DEVICE, dtype), logits.to(DEVICE, torch.float32)
    places = None if votes.places is None else votes.places.to(DEVICE)
    votes, gram = votes._replace(mix=votes.mix.float().to(DEVICE), places=places), gram.float().to(DEVICE)
    return (inner, logits, votes, gram), (
        inner.double(), logits.double(), votes._replace(mix=votes.mix.double()), gram.double(),
    )  # fmt: skip


def distance(found, expected):
    return float((found.detach().double() - expected.detach()).norm() / expected.detach().norm())


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    """What a kernel does not write stays NaN."""
    for name in ("empty_like", "empty"):
        make = getattr(torch, name)

        def filled(*args, make=make, **settings):
            made = make(*args, **settings)
            return made.fill_(torch.nan) if made.is_floating_point() else made

        monkeypatch.setattr(torch, name, filled)


@pytest.mark.parametrize("dtype", EPS, ids=str)
@pytest.mark.parametrize("interpolation", ["linear", "norm"])
def test_the_gate(case, dtype, interpolation):
    ranks, numbers = case
    (inner, logits, votes, gram), exact = given(*numbers, dtype)
    gram, exact_gram = (gram, exact[3]) if interpolation == "norm" else (None, None)
    found = fused.gate(inner, logits, votes, gram, ranks, 0.7)
    assert found.dtype == dtype
    bound = 1e-5 if dtype == torch.float32 else 2 * EPS[dtype]
    assert distance(found, gated(*exact[:3], exact_gram, ranks, 0.7)) < bound


@pytest.mark.parametrize("logit", [3e4, 1e30, -1e30])
def test_extreme_logits(problem, logit):
    """No overflow: the largest takes all, and equal ones share."""
    (inner, logits, votes, gram), exact = given(*problem((2, 2, 2), (3, 3), 2, 4), torch.float32)
    logits[:, 1], logits[:, 3:] = logit, logit
    found = fused.gate(inner, logits, votes, gram, (2, 2, 2), 1.0)
    expected = gated(exact[0], logits.double(), exact[2], exact[3], (2, 2, 2), 1.0)
    assert distance(found, expected) < 1e-5


@pytest.mark.parametrize("angle", [1.0, -1.0, -0.999])
def test_extreme_lengths(problem, angle):
    """Experts that are the same, that cancel, and that nearly do; and none with any weight."""
    (inner, logits, votes, _), exact = given(*problem((2, 2), (2,), 1, 4), torch.float32)
    votes = votes._replace(mix=torch.full_like(votes.mix, 0.5))
    for size in (1.0, 0.0):
        gram = size * torch.tensor([[1.0, angle], [angle, 1.0]], device=DEVICE)
        found = fused.gate(inner, logits, votes, gram, (2, 2), 1.0)
        expected = gated(exact[0], exact[1], votes._replace(mix=votes.mix.double()), gram.double(), (2, 2), 1.0)
        assert distance(found, expected) < 1e-5


def test_large_and_small_inputs(problem):
    for size in (1e-30, 1e30):
        (inner, logits, votes, gram), exact = given(*problem((2, 2), (2,)), torch.float32)
        found = fused.gate(inner * size, logits, votes, gram, (2, 2), 1.0)
        assert distance(found / size, gated(*exact, (2, 2), 1.0)) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("tokens", "width", "slots"), [(1, 600, 3), (70, 33, 5)])
def test_logits_are_summed_in_float32(dtype, tokens, width, slots):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(tokens, width, generator=generator).to(DEVICE, dtype)
    weight, bias = torch.randn(slots, width, generator=generator), torch.randn(slots, generator=generator)
    weight, bias = weight.to(DEVICE), bias.to(DEVICE)
    found = fused.router_logits(x, weight, bias)
    assert found.dtype == torch.float32
    assert distance(found, x.double() @ weight.double().T + bias.double()) < 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradients_of_the_operators(case, dtype):
    ranks, numbers = case
    (inner, logits, votes, gram), exact = given(*numbers, dtype)
    leaves, exact_leaves = [inner, logits], list(exact[:2])
    for leaf in (*leaves, *exact_leaves):
        leaf.requires_grad_(True)
    found = torch.autograd.grad(fused.gate(inner, logits, votes, gram, ranks, 0.7).double().pow(2).sum(), leaves)
    expected = torch.autograd.grad(gated(*exact, ranks, 0.7).pow(2).sum(), exact_leaves)
    for one, other in zip(found, expected, strict=True):
        if other.norm() > 0:  # one slot alone has all the votes
            assert distance(one, other) < (1e-4 if dtype == torch.float32 else 0.03)


def test_torch_knows_the_operators(problem):
    """Their schemas, what they return without running, and their gradients, as torch itself checks them."""
    (inner, logits, votes, gram), _ = given(*problem((2, 3), (2, 2), 2, 4), torch.float32)
    inner.requires_grad_(True)
    logits.requires_grad_(True)
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    arguments = (inner, logits, votes.mix, votes.places, gram, [2, 3], votes.routers, 0.7)
    torch.library.opcheck(fused._gate, arguments, test_utils=checks)
    x, weight = torch.randn(4, 8).bfloat16().requires_grad_(True), torch.randn(2, 8, requires_grad=True)
    torch.library.opcheck(fused._router_logits, (x, weight, torch.zeros(2, requires_grad=True)), test_utils=checks)


# -- in models: two modules of a layer, since what is interpreted is slow ---

LIVE, ROWS = [0.25, 0.75], [[0.25, 0.75], [0.6, 0.4], [1.0, 0.0]]
MODULES = r"model\.layers\.0\.(self_attn\.q_proj|mlp\.down_proj)"


@pytest.mark.parametrize(
    ("interpolation", "preference"),
    [("linear", LIVE), ("norm", [0.1, 0.9]), ("norm", ROWS)],
    ids=["routed", "two stretches, length kept", "rows, length kept"],
)
def test_a_model_is_the_same_with_either_kernel(hoe_llama, tokens, interpolation, preference):
    """Its logits, its recorded votes, and the gradients of its routers."""
    settings = {"trained": True, "interpolation": interpolation, "router_temperature": 0.7, "target_modules": MODULES}
    model, tokens = hoe_llama(**settings).to(DEVICE), tokens[:, :2].to(DEVICE)
    routers = [module.hoe_router["default"].weight for module in model.modules() if isinstance(module, HoELayer)]
    found = {}
    for kernel in ("plain", "triton"):
        with use_kernel(kernel), record_votes(model) as votes:
            logits = model(tokens, preference=preference).logits
            found[kernel] = [logits, *votes.values(), *torch.autograd.grad(logits.pow(2).mean(), routers)]
    for one, other in zip(found["triton"], found["plain"], strict=True):
        assert distance(one, other.double()) < 1e-4


def test_routers_by_module_and_by_token_vote_together(hoe_llama, tokens):
    """In the rows of one batch; where none trains, the kernel takes both kinds of votes."""
    routers = [RouterSpec(LIVE, kind="module"), RouterSpec([0.75, 0.25])]
    model = hoe_llama(trained=True, routers=routers, interpolation="norm", target_modules=MODULES).to(DEVICE)
    for module in model.modules():
        if isinstance(module, HoELayer):
            module.hoe_router["default"].weight.data[:2] = 0
    tokens = tokens[:, :2].to(DEVICE)
    rows, found = [[0.4, 0.6], LIVE, [0.6, 0.4]], {}
    for kernel in ("plain", "triton"):
        with use_kernel(kernel), torch.no_grad():
            found[kernel] = model(tokens, preference=rows).logits
    assert distance(found["triton"], found["plain"].double()) < 1e-4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("checkpointing", [None, True, False], ids=["kept", "reentrant", "replayed"])
def test_gradients_of_a_checkpointed_module_are_the_plain_ones_in_float64(hoe_llama, dtype, checkpointing):
    """To its routers and to its input, from the same numbers; experts have none."""
    model = hoe_llama(trained=True, interpolation="norm", target_modules=MODULES, dtype=dtype).to(DEVICE)
    x = torch.randn(3, 2, 32, generator=torch.Generator().manual_seed(0)).to(DEVICE, dtype)
    found = {}
    for kernel, steered in (("triton", model), ("plain", copy.deepcopy(model).double())):
        module = steered.base_model.model.model.layers[0].self_attn.q_proj
        own = x.to(module.base_layer.weight.dtype, copy=True).requires_grad_(True)
        with use_kernel(kernel), steered.use_preference(ROWS):
            y = own * 1
            y = module(y) if checkpointing is None else checkpoint(module, y, use_reentrant=checkpointing)
            y.double().pow(2).sum().backward()
        router = module.hoe_router["default"]
        found[kernel] = [y, own.grad, router.weight.grad, router.bias.grad]
        assert all(weight.grad is None for weight in module.factors("default"))
    for one, other in zip(found["triton"], found["plain"], strict=True):
        assert distance(one, other) < (1e-5 if dtype == torch.float32 else 0.03)


def test_a_16_bit_model(hoe_llama, tokens):
    settings = {"trained": True, "interpolation": "norm", "target_modules": MODULES, "dtype": torch.bfloat16}
    model = hoe_llama(**settings).to(DEVICE)
    found = {}
    for kernel in ("plain", "triton"):
        with use_kernel(kernel), torch.no_grad():
            found[kernel] = model(tokens[:, :2].to(DEVICE), preference=LIVE).logits
    assert distance(found["triton"], found["plain"].double()) < 0.02


@pytest.mark.slow
@pytest.mark.usefixtures("whole_graph")
def test_a_compiled_model_has_one_graph_with_the_operator_in_it(hoe_llama, tokens):
    torch.compiler.reset()
    counter = CompileCounterWithBackend("eager")
    model, tokens = hoe_llama(trained=True, interpolation="norm", target_modules=MODULES).to(DEVICE), tokens[:1, :2]
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    with use_kernel("triton"), torch.no_grad():
        for preference in (LIVE, [0.6, 0.4], [1.0, 0.0]):
            model.set_preference(preference)
            found = compiled(tokens.to(DEVICE)).logits
            assert distance(found, model(tokens.to(DEVICE)).logits.double()) < 1e-4
    assert counter.frame_count == 1
    assert sum("peft_hoe.gate" in str(node.target) for graph in counter.graphs for node in graph.graph.nodes) == 2
    torch.compiler.reset()


@pytest.mark.usefixtures("whole_graph")
@pytest.mark.parametrize("kernel", ["plain", "triton"])
def test_gradients_of_a_compiled_module_with_experts_of_different_ranks(hoe_llama, kernel):
    torch.compiler.reset()
    settings = {"target_modules": MODULES, "rank_pattern": {MODULES: [3, 1, 4]}, "interpolation": "norm"}
    layer = hoe_llama(trained=True, **settings).to(DEVICE).base_model.model.model.layers[0].self_attn.q_proj
    layer.hoe_steering.set_preference(LIVE)
    x = torch.randn(3, 2, 32, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    router, compiled = layer.hoe_router["default"], torch.compile(layer, fullgraph=True, backend="aot_eager")
    with use_kernel(kernel):
        found = torch.autograd.grad(compiled(x).pow(2).sum(), [router.weight, router.bias])
    with use_kernel("plain"):
        expected = torch.autograd.grad(layer.double()(x.double()).pow(2).sum(), [router.weight, router.bias])
    for one, other in zip(found, expected, strict=True):
        assert distance(one, other) < 1e-5
    torch.compiler.reset()
