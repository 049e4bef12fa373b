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


def test_without_a_task_type_the_call_is_steered_too(hoe_llama, tokens):
    model = hoe_llama(task_type=None)
    assert type(model) is PeftModel
    a, b = (logits(model, tokens, preference=p) for p in ([1, 0], [0, 1]))
    assert not torch.equal(a, b)


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
        config = HoEConfig(objectives=["a", "b"], experts=[[1, 0], [0.5, 0.5]], target_modules=["q_proj"], r=2)
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
