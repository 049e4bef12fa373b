from __future__ import annotations

import inspect

import pytest
import torch
from transformers import LlamaForCausalLM

import peft_hoe
from peft_hoe import HoEError
from peft_hoe.tuner.cache_owner import cache_name, returned_cache
from peft_hoe.tuner.calls import THIS_THREAD

NAME = cache_name(inspect.signature(LlamaForCausalLM.forward).parameters)  # of the argument that brings a cache


@pytest.fixture
def model(toys):
    """Two trained routers whose votes depend on the token."""
    model = toys.make_policy()
    generator = torch.Generator().manual_seed(7)
    for name, parameter in model.named_parameters():
        if "hoe_router" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator)
    model.mark_trained(["r0", "r1"])
    return model.eval()


@pytest.fixture
def ids():
    return torch.randint(4, 32, (2, 6), generator=torch.Generator().manual_seed(3))


def generate(model, ids, **options):
    return model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=5,
        min_new_tokens=5,
        pad_token_id=0,
        **options,
    )


@pytest.mark.parametrize("use_cache", [True, False])
def test_a_generate_leaves_the_votes_of_a_forward_over_the_whole_text(model, ids, use_cache):
    with model.trace_routing() as trace:
        text = generate(model, ids, preference=[0.25, 0.75], do_sample=False, use_cache=use_cache)
    assert torch.equal(trace.tokens, text[:, :-1])  # nothing has read the last one
    with torch.no_grad(), peft_hoe.record_votes(model) as votes:
        model(input_ids=text[:, :-1], preference=[0.25, 0.75])
    assert trace.modules == list(votes)
    for module, expected in votes.items():
        assert trace.votes(module).shape == (2, 10, 3)
        torch.testing.assert_close(trace.votes(module), expected.float(), rtol=0, atol=1e-5)
    torch.testing.assert_close(trace.mean().sum(-1), torch.ones(2, 10))


def test_static_votes_and_those_of_rows_are_there_for_each_token(model, ids):
    with torch.no_grad(), model.trace_routing(["q_proj"]) as trace:
        model(input_ids=ids, preference=[[1, 0], [0, 1]])
    assert len(trace.modules) == 2  # two layers
    assert (trace.votes("layers.1.self_attn.q_proj") == torch.eye(3)[:2, None]).all()
    with torch.no_grad(), peft_hoe.trace_routing(model) as trace:
        model(input_ids=ids, preference=[1, 0])
    assert (trace.mean()[..., 0] == 1).all()


def test_a_forward_without_a_cache_begins_a_new_text(model, ids):
    root = model.get_base_model()
    hooks = [dict(root._forward_hooks), dict(root._forward_pre_hooks)]
    with torch.no_grad(), model.trace_routing() as trace:
        model(input_ids=ids)
        first = model(input_ids=ids[:1, :4], use_cache=True)
        model(input_ids=ids[:1, 4:], **{NAME: returned_cache(first)})
    assert torch.equal(trace.tokens, ids[:1])
    assert THIS_THREAD.recorder is None  # afterwards all is as before
    assert [dict(root._forward_hooks), dict(root._forward_pre_hooks)] == hooks


def test_the_page_has_every_token_on_stripes_of_its_votes(model, ids, toys):
    tokenizer = toys.make_tokenizer()
    with torch.no_grad(), model.trace_routing() as trace:
        model(input_ids=ids, preference=[0.25, 0.75])
    page = trace.to_html(tokenizer, row=1, module="layers.0.self_attn.q_proj")
    assert page.count("<span") == 6
    assert "high" in page
    vote = trace.votes("layers.0.self_attn.q_proj")[1, 0].tolist()
    shown = [v for v in vote if v > 0]
    assert f"{0:.1%} {shown[0]:.1%}" in page
    assert "<script" not in page
    numbers = trace.to_html()
    assert f"{ids[0, 0]} </span>" in numbers


def test_texts_and_names_are_no_html():
    from peft_hoe.tuner.trace_page import page

    shown = page(["<b>", "&"], [[0.25, 0.75], [1.0, 0.0]], ["<i>", 'a"b'], "of <u>")
    assert "<b>" not in shown
    assert "&lt;b&gt;" in shown
    assert "<i>" not in shown
    assert 'title="&lt;i&gt; 25%, a&quot;b 75%"' in shown
    assert "linear-gradient(to top,#8fc1e3 0.0% 25.0%,#f0a878 25.0% 100.0%)" in shown


def test_plots_stack_the_votes_of_layers_or_tokens(model, ids):
    pytest.importorskip("matplotlib")
    with torch.no_grad(), model.trace_routing() as trace:
        model(input_ids=ids, preference=[0.25, 0.75])
    for by, places in (("layer", 2), ("position", 6)):
        (axes,) = trace.plot(by=by).axes
        bars = [[bar.get_height() for bar in container] for container in axes.containers]
        assert [len(each) for each in bars] == [places] * 3
        assert torch.tensor(bars).sum(0).tolist() == pytest.approx([1] * places, abs=1e-5)


def test_what_is_not_there_is_refused_by_name(model, ids, toys):
    with model.trace_routing() as trace:
        pass
    with pytest.raises(HoEError, match="nothing was recorded"):
        trace.mean()
    with torch.no_grad(), model.trace_routing() as trace:
        model(input_ids=ids)
    with pytest.raises(HoEError, match="row is 2, but 2 were recorded"):
        trace.to_html(row=2)
    with pytest.raises(HoEError, match=r"2 modules called 'self_attn.q_proj'"):
        trace.votes("self_attn.q_proj")
    with pytest.raises(HoEError, match="by"):
        trace.plot(by="expert")
