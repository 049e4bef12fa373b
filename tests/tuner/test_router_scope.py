"""`routers=`: taking routers out for a call or a block, seen by this thread or task alone."""

from __future__ import annotations

import asyncio
import threading

import pytest
import torch

import peft_hoe
from peft_hoe import HoEConfig, HoEError, PreferenceError, RouterSpec, StaticMergeError

AT = [0.1, 0.9]  # between the corner and the router: both weigh


def logits(model, tokens, **kwargs):
    with torch.no_grad():
        return model(tokens, **kwargs).logits


@pytest.fixture
def double(hoe_llama):
    """`hoe_llama` in float64."""
    return lambda **settings: hoe_llama(**settings).double()


@pytest.fixture
def by_kind(double, tokens):
    """What a model with a trained router should give at AT, by what is asked of its router."""
    kept = logits(double(trained=True), tokens, preference=AT)
    static = logits(double(trained=False), tokens, preference=AT)
    return {"keep": kept, "static": static, "drop": static}


@pytest.mark.parametrize("routers", ["keep", "static", "drop"])
def test_blocks_and_calls(double, tokens, by_kind, routers):
    model = double(trained=True)
    wanted = by_kind[routers]
    assert not torch.allclose(by_kind["keep"], by_kind["static"], atol=1e-3)
    torch.testing.assert_close(logits(model, tokens, preference=AT, routers=routers), wanted, rtol=1e-10, atol=1e-10)
    with model.use_preference(AT, routers=routers):
        torch.testing.assert_close(logits(model, tokens), wanted, rtol=1e-10, atol=1e-10)
    model.set_preference(AT)
    with peft_hoe.use_preference(model, routers=routers):
        torch.testing.assert_close(logits(model, tokens), wanted, rtol=1e-10, atol=1e-10)
        assert model.preference == {"a": 0.1, "b": 0.9}
    torch.testing.assert_close(logits(model, tokens), by_kind["keep"], rtol=0, atol=0)
    assert model.peft_config["default"].routers[0].trained


def test_inner_blocks_and_calls_that_say_nothing_go_by_the_block(double, tokens, by_kind):
    model = double(trained=True)
    with model.use_preference([1, 0], routers="drop"):
        torch.testing.assert_close(logits(model, tokens, preference=AT), by_kind["drop"], rtol=1e-10, atol=1e-10)
        with model.use_preference(AT):
            torch.testing.assert_close(logits(model, tokens), by_kind["drop"], rtol=1e-10, atol=1e-10)
            torch.testing.assert_close(logits(model, tokens, routers="keep"), by_kind["keep"], rtol=0, atol=0)
        with model.use_preference(AT, routers="keep"):
            torch.testing.assert_close(logits(model, tokens), by_kind["keep"], rtol=0, atol=0)


def test_another_thread_keeps_its_routers(double, tokens, by_kind):
    # A sweep that dropped routers used to flip the adapter's marks: it changed what other threads generated and saved.
    model = double(trained=True)
    seen = {}

    def serve():
        seen["logits"] = logits(model, tokens, preference=AT)
        seen["trained"] = model.peft_config["default"].routers[0].trained

    with model.use_preference(AT, routers="drop"):
        thread = threading.Thread(target=serve)
        thread.start()
        thread.join()
        torch.testing.assert_close(logits(model, tokens), by_kind["drop"], rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(seen["logits"], by_kind["keep"], rtol=0, atol=0)
    assert seen["trained"]


def test_tasks_do_not_see_each_other(double, tokens, by_kind):
    model = double(trained=True)

    async def task(routers):
        with model.use_preference(AT, routers=routers):
            for _ in range(3):
                await asyncio.sleep(0)
                torch.testing.assert_close(logits(model, tokens), by_kind[routers], rtol=1e-10, atol=1e-10)

    async def both():
        await asyncio.gather(task("keep"), task("drop"))

    asyncio.run(both())


def test_generate_sees_them(double, tokens):
    model = double(trained=True)
    settings = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "preference": AT}
    kept = model.generate(tokens, **settings)
    static = double(trained=False).generate(tokens, **settings)
    assert kept.tolist() != static.tolist()
    assert model.generate(tokens, routers="drop", **settings).tolist() == static.tolist()
    with model.use_preference(routers="drop"):
        assert model.generate(tokens, **settings).tolist() == static.tolist()


def test_rows_can_drop_routers(double, tokens):
    model, static = double(trained=True), double(trained=False)
    rows = [[1, 0], AT, [0.3, 0.7]]
    dropped = logits(model, tokens, preference=rows, routers="drop")
    torch.testing.assert_close(dropped, logits(static, tokens, preference=rows), rtol=1e-10, atol=1e-10)


def test_static_is_the_voting_set_and_drop_is_not(double):
    # A router at the centroid that votes for the corners alone: half of each statically, the centroid's expert without it.
    model = double(routers=[RouterSpec([0.5, 0.5], votes_for=["a", "b"], trained=True)])
    plan = model.base_model.steering.plan_for
    assert plan([0.5, 0.5], "static").adapters["default"].static.tolist() == [pytest.approx([0.5, 0.5, 0])]
    assert plan([0.5, 0.5], "drop").adapters["default"].static.tolist() == [[0, 0, 1]]
    assert plan([0.5, 0.5], "keep").adapters["default"].is_live
    assert model.route([0.5, 0.5]).experts == {"r0": 1.0}
    with model.use_preference(routers="drop"):
        assert model.route([0.5, 0.5]).experts == {"centroid": 1.0}


def test_merging_goes_by_the_block(double, tokens, by_kind):
    model = double(trained=True)
    with model.use_preference(AT), pytest.raises(StaticMergeError) as refused:
        model.merge_adapter()
    assert refused.value.routers == ["r0"]
    assert refused.value.value == AT
    layer = model.base_model.model.model.layers[0].mlp.up_proj
    with model.use_preference(AT, routers="drop"):
        assert layer.supports_lora_conversion()
        merged = model.merge_and_unload()
    torch.testing.assert_close(logits(merged, tokens), by_kind["drop"], rtol=1e-10, atol=1e-10)


@pytest.mark.slow
def test_compiled_models_see_them(double, tokens, by_kind):
    model = double(trained=True)
    compiled = torch.compile(model, backend="eager")
    for routers in ("keep", "drop", "keep"):
        torch.testing.assert_close(
            logits(compiled, tokens, preference=AT, routers=routers), by_kind[routers], rtol=1e-10, atol=1e-10
        )
        with model.use_preference(AT, routers=routers):
            torch.testing.assert_close(logits(compiled, tokens), by_kind[routers], rtol=1e-10, atol=1e-10)


def test_what_is_refused(double, tokens):
    model = double()
    for call in (model.use_preference(routers="some").__enter__, lambda: model(tokens, routers="some")):
        with pytest.raises(HoEError, match="routers is 'some'; use one of 'keep', 'static', 'drop'") as refused:
            call()
        assert (refused.value.argument, refused.value.value) == ("routers", "some")
        assert refused.value.allowed == ("keep", "static", "drop")
    with pytest.raises(PreferenceError, match="nothing to use"), model.use_preference():
        pytest.fail("the block was entered")


def test_an_adapter_without_routers_does_not_mind(double, tokens):
    model = double(routers=None)
    assert isinstance(model.peft_config["default"], HoEConfig)
    torch.testing.assert_close(logits(model, tokens, routers="drop"), logits(model, tokens), rtol=0, atol=0)
