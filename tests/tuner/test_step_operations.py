"""What a step of a module takes: operations, experts that are read, and no wait for the device."""

from __future__ import annotations

import contextlib
import inspect

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaForCausalLM

from peft_hoe import ExpertSpec, record_votes, use_kernel
from peft_hoe.tuner import steering
from peft_hoe.tuner.cache_owner import cache_name, returned_cache
from peft_hoe.tuner.kernels import choice, fused
from peft_hoe.tuner.layer import HoELayer
from peft_hoe.tuner.step import Step

CACHE = cache_name(inspect.signature(LlamaForCausalLM.forward).parameters)
LIVE, STATIC = [0.25, 0.75], [0.7, 0.3]
ROWS = [LIVE, STATIC, [1.0, 0.0]]


def layers(model):
    return [module for module in model.modules() if isinstance(module, HoELayer)]


@pytest.fixture
def model(hoe_llama):
    """Its second router is at [.75, .25], and its adapter large enough to prepare something for."""
    return hoe_llama(trained=True, routers=[[0.25, 0.75], [0.75, 0.25]], interpolation="norm", r=8).double()


class Operations(TorchDispatchMode):
    """Counts what reaches the dispatcher, views left out."""

    VIEWS = (
        "view", "t", "slice", "unsqueeze", "expand", "detach", "alias", "_unsafe_view", "select", "transpose",
        "split_with_sizes",
    )  # fmt: skip

    def __init__(self, views=VIEWS):
        super().__init__()
        self.views, self.count = views, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func.overloadpacket.__name__ not in self.views
        return func(*args, **(kwargs or {}))


def operations(model, tokens, **settings):
    """How many operations a module takes, on average, beyond the base's."""
    with torch.no_grad():
        model(tokens, **settings)
        with Operations() as counted:
            model(tokens, **settings)
        with model.disable_adapter(), Operations() as base:
            model(tokens)
    return (counted.count - base.count) / 14


def test_operations_of_a_module(hoe_llama, llama, tokens):
    """A step of decoding takes as long as its operations are many, on a GPU and with small batches on a CPU too.

    Beyond the base's product: a LoRA's two products, scaling and addition; statically two products, of which the second adds,
    and scaling. A routed module has its logits, softmax, votes and their spreading besides, and the length.
    """
    lora = get_peft_model(llama(), LoraConfig(r=12, target_modules="all-linear", task_type="CAUSAL_LM")).eval()
    assert operations(lora, tokens) == 4
    for interpolation, static, routed in (("linear", 3, 7), ("norm", 3, 13)):
        model = hoe_llama(trained=True, interpolation=interpolation)
        assert operations(model, tokens, preference=[1.0, 0.0]) == static
        assert operations(model, tokens, preference=STATIC) <= 2 * static  # two stretches
        assert operations(model, tokens, preference=LIVE) <= routed
        assert operations(model, tokens, preference=[[1.0, 0.0], [0.6, 0.4], [0.0, 1.0]]) == static


def test_operations_of_a_module_with_a_kernel(hoe_llama, tokens, monkeypatch):
    """On a GPU a routed module launches no more than a LoRA: two products, logits and the gate, with and without the length.

    The kernels themselves are stood in for: what counts here is what is launched beside them, each of them once.
    """
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(choice, "_installed", lambda: True)
    launched = []

    class Kernels:
        def gate(self, inner, *others):
            launched.append("gate")
            return inner

        def router_logits(self, tokens, weight, bias):
            launched.append("logits")
            return bias.detach()[None]

    monkeypatch.setattr(fused, "_kernels", Kernels)
    for interpolation in ("linear", "norm"):
        for dtype in (torch.float32, torch.bfloat16):
            model = hoe_llama(trained=True, interpolation=interpolation, dtype=dtype)
            with use_kernel("triton"):
                launched.clear()
                rest = operations(model, tokens, preference=LIVE)
                kernels = len(launched) / 28  # of 14 modules, in two forwards
                assert kernels == 1 + (dtype == torch.bfloat16)
                assert rest + kernels <= 4  # as a LoRA


@pytest.mark.parametrize(("interpolation", "count"), [("linear", 6), ("norm", 10)])
def test_a_routed_module_in_operations_of_torch(hoe_llama, tokens, interpolation, count):
    """Two products, logits, softmax, votes over the ranks, a multiplication; for c a norm, two quotients and a bound."""
    model = hoe_llama(trained=True, interpolation=interpolation, width=256)
    with use_kernel("plain"):
        assert operations(model, tokens, preference=LIVE) == count


@pytest.mark.parametrize("interpolation", ["linear", "norm"])
@pytest.mark.parametrize("slots", [None, [["a", "b"], "all"]], ids=["even", "uneven"])
def test_the_prepared_product_is_the_votes_and_what_follows(hoe_llama, tokens, interpolation, slots):
    """Without it they are worked out one after the other; votes are recorded either way."""
    routers = [[0.25, 0.75], [0.75, 0.25]]
    if slots:
        routers = [{"preference": p, "votes_for": v} for p, v in zip(routers, slots, strict=True)]
    model = hoe_llama(trained=True, routers=routers, interpolation=interpolation, width=256).double()
    preference = [0.6, 0.4]
    with torch.no_grad():
        prepared = model(tokens, preference=preference).logits
        steps = [step for layer in layers(model) for step in layer._steps._kept.values()]
        assert steps
        assert all(step.mixed is not None for step in steps)
        with record_votes(model) as votes:
            model(tokens, preference=preference)
        for step in steps:
            step.mixed = None
        with record_votes(model) as written_out_votes:
            written_out = model(tokens, preference=preference).logits
    torch.testing.assert_close(prepared, written_out, rtol=0, atol=1e-12)
    torch.testing.assert_close(dict(votes), dict(written_out_votes), rtol=0, atol=1e-12)


def test_operations_do_not_grow_with_the_experts(hoe_llama, tokens):
    """No loop over experts, selected or not."""
    experts = [[i / 20, 1 - i / 20] for i in range(21)]
    settings = {"trained": True, "interpolation": "norm", "width": 512}
    routers = [{"preference": [0.52, 0.48], "votes_for": "all"}]
    few, many = hoe_llama(routers=routers, **settings), hoe_llama(routers=routers, experts=experts, **settings)
    preference = [0.52, 0.48]
    assert operations(many, tokens, preference=preference) == operations(few, tokens, preference=preference)


@pytest.mark.parametrize("ranks", [(1, 1), (2, 1)], ids=["even", "uneven"])
def test_nor_where_hooks_fetch_the_weights(hoe_llama, tokens, ranks):
    """There A and B are called as modules, with all experts."""
    counts = []
    for n in (3, 21):
        experts = [ExpertSpec([i / (n - 1), 1 - i / (n - 1)], r=ranks[i % 2]) for i in range(n)]
        routers = [{"preference": [0.5, 0.5], "votes_for": "all"}]
        model = hoe_llama(trained=True, routers=routers, experts=experts, interpolation="norm")
        for layer in layers(model):
            layer.hoe_A["default"].register_forward_pre_hook(lambda module, args: None)
        with torch.no_grad():
            model(tokens, preference=[0.5, 0.5])
            with Operations(views=()) as counted:
                model(tokens, preference=[0.5, 0.5])
        counts.append(counted.count)
    assert counts[0] == counts[1]


UNREACHED = {  # preference to the ranks of experts a, b and centroid that it does not reach
    "static": (STATIC, slice(4, 8)),
    "routed": (LIVE, slice(0, 4)),
    "rows": ([STATIC, [1.0, 0.0], [0.6, 0.4]], slice(4, 8)),
}


@pytest.mark.parametrize("kind", UNREACHED)
def test_experts_without_votes_cost_nothing(hoe_llama, tokens, kind):
    """NaN in experts that a preference does not reach is never read."""
    model, (preference, unreached) = hoe_llama(trained=True, interpolation="norm"), UNREACHED[kind]
    with torch.no_grad():
        expected = model(tokens, preference=preference).logits
        for layer in layers(model):
            weight_a, weight_b = layer.factors("default")
            weight_a[unreached] = torch.nan
            weight_b[:, unreached] = torch.nan
        torch.testing.assert_close(model(tokens, preference=preference).logits, expected, rtol=0, atol=0)


@pytest.mark.parametrize("preference", [LIVE, STATIC, ROWS], ids=["routed", "static", "rows"])
def test_a_generate_reads_its_preference_once_and_prepares_each_module_once(model, tokens, preference, monkeypatch):
    """And a later one with the same preference prepares nothing."""
    read, prepared = [], []
    parse, make = steering.parse_preference, Step.__init__

    def init(self, *args, **settings):
        prepared.append(self)
        make(self, *args, **settings)

    monkeypatch.setattr(steering, "parse_preference", lambda *args, **rest: read.append(1) or parse(*args, **rest))
    monkeypatch.setattr(Step, "__init__", init)
    for calls in (1, 2):
        model.generate(input_ids=tokens, preference=preference, max_new_tokens=4, min_new_tokens=4, do_sample=False)
        assert (len(read), len(prepared)) == (calls, 14)


class Asked(TorchDispatchMode):
    """Collects what would wait for a device: numbers read from it, and results whose size depends on numbers."""

    def __init__(self):
        super().__init__()
        self.waits = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name in ("_local_scalar_dense", "nonzero", "unique", "is_nonzero", "equal", "masked_select", "item"):
            self.waits.append(name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("preference", [LIVE, STATIC, ROWS], ids=["routed", "static", "rows"])
def test_a_step_does_not_wait_for_the_device(model, tokens, preference):
    """Beyond what the base model does, neither over a text nor in a step of decoding."""
    mask = torch.ones(3, 8, dtype=torch.long)
    waits = {}
    with torch.no_grad():
        model(tokens, preference=preference)
        for steered in (True, False):
            settings = {"preference": preference} if steered else {}
            with contextlib.nullcontext() if steered else model.disable_adapter(), Asked() as asked:
                cache = returned_cache(model(tokens, attention_mask=mask[:, :7], use_cache=True, **settings))
                model(tokens[:, :1], attention_mask=mask, **{CACHE: cache}, **settings)
            waits[steered] = asked.waits
    assert waits[True] == waits[False]
