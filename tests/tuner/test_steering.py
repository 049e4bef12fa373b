"""Where a preference comes from, and who sees it."""

from __future__ import annotations

import asyncio
import threading

import pytest
import torch
from peft import PeftModel, get_peft_model, inject_adapter_in_model

import peft_hoe
from peft_hoe import HoEConfig, HoEWarning, PreferenceError


def logits(model, tokens, **kwargs):
    with torch.no_grad():
        return model(tokens, **kwargs).logits


def test_precedence(hoe_llama, tokens):
    model = hoe_llama()
    assert model.preference == {"a": 0.5, "b": 0.5}  # uniform
    at = {key: logits(model, tokens, preference=value) for key, value in {"a": [1, 0], "b": [0, 1]}.items()}
    middle = logits(model, tokens)
    model.set_preference({"a": 1})
    torch.testing.assert_close(logits(model, tokens), at["a"], rtol=0, atol=0)
    with model.use_preference([0, 1]):
        assert model.preference == {"a": 0, "b": 1}
        torch.testing.assert_close(logits(model, tokens), at["b"], rtol=0, atol=0)
        torch.testing.assert_close(logits(model, tokens, preference=[0.5, 0.5]), middle, rtol=0, atol=0)
        with model.use_preference([1, 0]):
            torch.testing.assert_close(logits(model, tokens), at["a"], rtol=0, atol=0)
        torch.testing.assert_close(logits(model, tokens), at["b"], rtol=0, atol=0)
    torch.testing.assert_close(logits(model, tokens), at["a"], rtol=0, atol=0)
    assert not torch.equal(at["a"], at["b"])


def test_the_preference_is_read_only(hoe_llama):
    with pytest.raises(TypeError):
        hoe_llama().preference["a"] = 1


def test_a_bad_preference_changes_nothing(hoe_llama, tokens):
    model = hoe_llama()
    model.set_preference([0.7, 0.3])
    before = logits(model, tokens)
    for bad in ([-1, 2], [float("nan"), 1], [1], [0.5, 0.4], {"c": 1}, [[1, 0], [0, 1]]):
        with pytest.raises(PreferenceError):
            model.set_preference(bad)
        with pytest.raises(PreferenceError):
            logits(model, tokens, preference=bad if bad != [[1, 0], [0, 1]] else [[1, 0]] * 2)
    assert dict(model.preference) == pytest.approx({"a": 0.7, "b": 0.3})
    torch.testing.assert_close(logits(model, tokens), before, rtol=0, atol=0)


def test_an_error_inside_a_forward_leaves_no_preference_behind(hoe_llama, tokens):
    model = hoe_llama()
    before = logits(model, tokens)
    with pytest.raises(IndexError):
        logits(model, torch.full((1, 3), 10_000), preference=[1, 0])
    torch.testing.assert_close(logits(model, tokens), before, rtol=0, atol=0)


def test_wrong_heights_are_refused(hoe_llama, tokens):
    model = hoe_llama()
    for rows in (1, 2, 6):
        with pytest.raises(PreferenceError, match=f"{rows} rows, but the batch has 3"):
            model(tokens, preference=[[1, 0]] * rows)
        with pytest.raises(PreferenceError, match=f"{rows} rows, but the batch has 3"):
            model.generate(tokens, preference=[[1, 0]] * rows)


def test_blocks_left_out_of_order_raise(hoe_llama):
    model = hoe_llama()
    outer, inner = model.use_preference([1, 0]), model.use_preference([0, 1])
    outer.__enter__()
    inner.__enter__()
    with pytest.raises(RuntimeError, match="out of order"):
        outer.__exit__(None, None, None)
    inner.__exit__(None, None, None)
    assert model.preference == {"a": 0.5, "b": 0.5}


def test_a_bad_block_fails_at_its_entry(hoe_llama):
    with pytest.raises(PreferenceError), hoe_llama().use_preference([2, 0]):
        pytest.fail("the block was entered")


@pytest.mark.slow
def test_eight_threads_with_eight_preferences(hoe_llama, tokens):
    model = hoe_llama(trained=True)
    wanted = [[i / 7, 1 - i / 7] for i in range(8)]
    alone = [model.generate(tokens, preference=p, max_new_tokens=12, do_sample=False) for p in wanted]
    assert len({tuple(out.flatten().tolist()) for out in alone}) > 1
    got = [None] * 8
    barrier = threading.Barrier(8)

    def work(i):
        barrier.wait()
        with model.use_preference(wanted[i]):
            first = model.generate(tokens, max_new_tokens=12, do_sample=False)
        second = model.generate(tokens, preference=wanted[i], max_new_tokens=12, do_sample=False)
        got[i] = (first, second)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for expected, (first, second) in zip(alone, got, strict=True):
        torch.testing.assert_close(first, expected)
        torch.testing.assert_close(second, expected)


def test_a_new_thread_starts_with_the_default(hoe_llama, tokens):
    model = hoe_llama()
    default = logits(model, tokens)
    seen = []
    with model.use_preference([1, 0]):
        thread = threading.Thread(target=lambda: seen.append(logits(model, tokens)))
        thread.start()
        thread.join()
    torch.testing.assert_close(seen[0], default, rtol=0, atol=0)


def test_two_tasks_do_not_see_each_other(hoe_llama, tokens):
    model = hoe_llama()
    wanted = [[1, 0], [0, 1]]
    alone = [logits(model, tokens, preference=p) for p in wanted]

    async def task(i):
        with model.use_preference(wanted[i]):
            for _ in range(3):
                await asyncio.sleep(0)
                torch.testing.assert_close(logits(model, tokens), alone[i], rtol=0, atol=0)
            inherited = await asyncio.to_thread(logits, model, tokens)
        torch.testing.assert_close(inherited, alone[i], rtol=0, atol=0)

    async def both():
        await asyncio.gather(task(0), task(1))

    asyncio.run(both())


def test_models_without_a_tuner_object(llama, config, randomise, tokens, tmp_path):
    model = inject_adapter_in_model(config(), llama())
    randomise(model)
    a, b = (logits(model, tokens, preference=p) for p in ([1, 0], [0, 1]))
    assert not torch.equal(a, b)
    peft_hoe.set_preference(model, [1, 0])
    torch.testing.assert_close(logits(model, tokens), a, rtol=0, atol=0)
    assert peft_hoe.get_preference(model) == {"a": 1, "b": 0}
    with peft_hoe.use_preference(model, [0, 1]):
        torch.testing.assert_close(logits(model, tokens), b, rtol=0, atol=0)
        torch.testing.assert_close(model.generate(tokens, max_new_tokens=3), model.generate(tokens, max_new_tokens=3))
    assert peft_hoe.route(model, [1, 0]).experts == {"a": 1.0}


def test_without_a_task_type_calls_are_steered_too(hoe_llama, tokens):
    model = hoe_llama(task_type=None)
    assert type(model) is PeftModel
    a, b = (logits(model, tokens, preference=p) for p in ([1, 0], [0, 1]))
    assert not torch.equal(a, b)
    known = hoe_llama()
    for preference in ([1, 0], [0, 1]):
        settings = {"max_new_tokens": 5, "preference": preference}
        assert torch.equal(model.generate(input_ids=tokens, **settings), known.generate(input_ids=tokens, **settings))


def test_models_without_hoe_say_so(llama):
    with pytest.raises(PreferenceError, match="no HoE adapter"):
        peft_hoe.set_preference(llama(), [1, 0])


def test_several_adapters(hoe_llama, randomise, tokens):
    model = hoe_llama()
    model.add_adapter(
        "other", HoEConfig(objectives=["x", "y", "z"], r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    )
    randomise(model, seed=3)
    first = logits(model, tokens, preference=[1, 0])
    model.set_adapter("other")
    assert set(model.preference) == {"x", "y", "z"}
    other = logits(model, tokens, preference=[0, 0, 1])
    with pytest.raises(PreferenceError, match=r"adapter 'other'.*2 numbers"):
        model(tokens, preference=[1, 0])
    model.base_model.set_adapter(["default", "other"])
    with pytest.raises(PreferenceError):
        model(tokens, preference=[1, 0])
    both = logits(model, tokens, preference={"default": [1, 0], "other": [0, 0, 1]})
    assert not torch.equal(both, first)
    assert not torch.equal(both, other)
    model.set_preference({"default": [0, 1]})
    assert model.peft_config["default"].default_preference == [0, 1]
    assert model.peft_config["other"].default_preference is None
    with pytest.raises(PreferenceError, match="nobody"):
        model.set_preference({"nobody": [1, 0]})
    model.set_adapter("default")
    torch.testing.assert_close(logits(model, tokens, preference=[1, 0]), first, rtol=0, atol=0)
    model.delete_adapter("other")
    torch.testing.assert_close(logits(model, tokens, preference=[1, 0]), first, rtol=0, atol=0)


def test_disabled_adapters_are_the_base(hoe_llama, llama, tokens):
    model = hoe_llama()
    with model.disable_adapter():
        torch.testing.assert_close(logits(model, tokens, preference=[1, 0]), logits(llama(), tokens))
    assert not torch.equal(logits(model, tokens), logits(llama(), tokens))


def test_a_preference_outside_the_hull_is_projected_and_said(llama, randomise, tokens):
    with pytest.warns(HoEWarning, match="no expert serves"):
        config = HoEConfig(
            objectives=["a", "b"], experts=[[1, 0], [0.5, 0.5]], target_modules=["q_proj"], r=2, task_type="CAUSAL_LM"
        )
    model = get_peft_model(llama(), config)
    randomise(model)
    with pytest.warns(HoEWarning, match=r"\[0.0, 1.0\] lies outside.*0.707"):
        outside = logits(model, tokens, preference=[0, 1])
    torch.testing.assert_close(outside, logits(model, tokens, preference=[0.5, 0.5]), rtol=0, atol=0)
    assert model.route([0, 1]).effective == pytest.approx((0.5, 0.5))


def test_misleading_neighbours_answer_for_themselves(hoe_llama, llama, config):
    with pytest.raises(NotImplementedError, match="weighted by a preference"):
        hoe_llama().add_weighted_adapter(["default"], [1.0], "new")
    with pytest.raises(ValueError, match="dot"):
        get_peft_model(llama(), config(), adapter_name="v1.0")
    with pytest.raises(ValueError, match="objectives"):
        get_peft_model(llama(), HoEConfig(target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="HOE"):
        get_peft_model(llama(), config(), mixed=True)
    with pytest.raises(NotImplementedError, match="adapter_names"):
        hoe_llama()(torch.ones(1, 2, dtype=torch.long), adapter_names=["default"])


def test_hotswapping_is_refused(hoe_llama, tmp_path):
    from peft.utils.hotswap import hotswap_adapter

    model = hoe_llama()
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="Hotswapping only supports"):
        hotswap_adapter(model, tmp_path, adapter_name="default")


def test_an_interrupted_forward_leaves_no_preference_behind(hoe_llama, tokens):
    model = hoe_llama()
    before = logits(model, tokens)
    layer = model.base_model.model.model.layers[1].mlp.up_proj

    def interrupt(module, args):
        raise KeyboardInterrupt

    for root in (model, model.base_model.model):  # with and without the tuner's own forward
        hook = layer.base_layer.register_forward_pre_hook(interrupt)
        with pytest.raises(KeyboardInterrupt):
            logits(root, tokens, preference=[1, 0])
        hook.remove()
        torch.testing.assert_close(logits(root, tokens), before, rtol=0, atol=0)


def test_an_adapter_that_could_not_be_added_is_not_there(hoe_llama, config):
    pytest.importorskip("peft", minversion="0.21")  # older versions add it without a target
    model = hoe_llama()
    with pytest.raises(ValueError, match="nope"):
        model.add_adapter("bad", config(target_modules=["nope"]))
    with pytest.raises(PreferenceError, match="bad"):
        model.set_preference({"bad": [1, 0]})


@pytest.mark.filterwarnings("ignore:Already found a `peft_config`")  # peft 0.18
def test_injecting_again_under_the_same_name(hoe_llama, config, tokens):
    base = hoe_llama(routers=[[0.25, 0.75], [0.75, 0.25]]).unload()
    model = get_peft_model(base, config(routers=None))
    assert logits(model, tokens).shape == (3, 7, 64)


def test_after_unloading_there_is_nothing_to_steer(hoe_llama):
    model = hoe_llama()
    model.unload()
    with pytest.raises(PreferenceError, match="no HoE adapter is active") as caught:
        model.set_preference([1, 0])
    assert caught.value.allowed == []


def test_two_models_in_one_wrapper_must_be_told_apart(hoe_llama):
    both = torch.nn.ModuleList([hoe_llama(), hoe_llama()])
    with pytest.raises(PreferenceError, match="2 models"):
        peft_hoe.set_preference(both, [1, 0])
    peft_hoe.set_preference(both[0], [1, 0])
    assert dict(both[1].preference) == {"a": 0.5, "b": 0.5}


def test_a_block_keeps_what_it_was_given(hoe_llama, tokens):
    model = hoe_llama()
    expected = logits(model, tokens, preference=[1, 0])
    mine = [1.0, 0.0]
    with model.use_preference(mine):
        mine[:] = [0.0, 1.0]
        torch.testing.assert_close(logits(model, tokens), expected, rtol=0, atol=0)


def test_what_an_inner_block_does_not_name_is_the_outer_blocks(hoe_llama, config, randomise, tokens):
    model = hoe_llama()
    model.add_adapter("other", config(target_modules=["q_proj"]))
    randomise(model)
    model.base_model.set_adapter(["default", "other"])
    expected = logits(model, tokens, preference={"default": [0, 1], "other": [1, 0]})
    with model.use_preference({"default": [1, 0], "other": [1, 0]}):
        torch.testing.assert_close(logits(model, tokens, preference={"default": [0, 1]}), expected, rtol=0, atol=0)
        with model.use_preference({"default": [0, 1]}):
            torch.testing.assert_close(logits(model, tokens), expected, rtol=0, atol=0)


def test_inference_mode_does_not_spoil_training(hoe_llama, tokens):
    model = hoe_llama(trained=True)
    with torch.inference_mode():
        model(tokens, preference=[0.25, 0.75])
    model(tokens, preference=[0.25, 0.75]).logits.sum().backward()
    assert model.base_model.model.model.layers[0].mlp.up_proj.hoe_router["default"].weight.grad is not None


def test_the_preference_itself_is_not_taken_for_the_batch(hoe_llama, tokens):
    model = hoe_llama()
    with pytest.raises(PreferenceError, match="2 rows, but the batch has 3"):
        model.base_model.model(preference=torch.eye(2), input_ids=tokens)
