from __future__ import annotations

import copy
import inspect

import pytest
import torch
from transformers import DynamicCache, LlamaForCausalLM, StaticCache

from peft_hoe import PreferenceError
from peft_hoe.tuner.cache_owner import cache_name, returned_cache

# What models call their cache is the version's.
NAME = cache_name(inspect.signature(LlamaForCausalLM.forward).parameters)


@pytest.fixture
def model(toys):
    return toys.make_policy().eval()


@pytest.fixture
def ids():
    return torch.randint(4, 32, (2, 6), generator=torch.Generator().manual_seed(3))


@torch.no_grad()
def test_a_cache_goes_on_at_its_own_preference_alone(model, ids, agree):
    whole = model(input_ids=ids, preference=[0.3, 0.7]).logits
    cache = returned_cache(model(input_ids=ids[:, :4], preference=[0.3, 0.7], use_cache=True))
    copied = copy.deepcopy(cache)
    agree(model(input_ids=ids[:, 4:], preference={"low": 0.3, "high": 0.7}, **{NAME: cache}).logits, whole[:, 4:])
    with pytest.raises(PreferenceError, match="filled at another preference"):
        model(input_ids=ids[:, 4:], preference=[0.7, 0.3], **{NAME: copied})
    with pytest.raises(PreferenceError, match="filled at another preference"):
        model(input_ids=ids[:, 4:], **{NAME: copied})  # at the default
    with model.use_preference([0.3, 0.7]):
        agree(model(input_ids=ids[:, 4:], **{NAME: copied}).logits, whole[:, 4:])


@torch.no_grad()
def test_generate_refuses_a_cache_of_another_preference(model, ids):
    options = {"max_new_tokens": 2, "do_sample": False, "pad_token_id": 0}
    cache = DynamicCache(config=model.config)
    model(input_ids=ids[:, :4], preference=[1, 0], **{NAME: cache})
    with pytest.raises(PreferenceError, match=f"^{NAME} was filled"):
        model.generate(input_ids=ids, **{NAME: copy.deepcopy(cache)}, preference=[0, 1], **options)
    text = model.generate(input_ids=ids, **{NAME: cache}, preference=[1, 0], **options)
    assert torch.equal(text, model.generate(input_ids=ids, preference=[1, 0], **options))


@torch.no_grad()
def test_an_emptied_cache_is_anybodys(model, ids, agree):
    cache = StaticCache(config=model.config, max_cache_len=8)
    model(input_ids=ids, preference=[1, 0], **{NAME: cache})
    cache.reset()
    found = model(input_ids=ids, preference=[0, 1], **{NAME: cache}).logits
    agree(found, model(input_ids=ids, preference=[0, 1]).logits)


@torch.no_grad()
def test_rows_may_come_together(model, ids, agree):
    """A server joins the caches of texts of different preferences: what is right there only it can know."""
    rows = [[1, 0], [0, 1]]
    cache = returned_cache(model(input_ids=ids[:, :4], preference=[1, 0], use_cache=True))
    found = model(input_ids=ids[:, 4:], preference=rows, **{NAME: cache}).logits
    agree(found[0], model(input_ids=ids, preference=[1, 0]).logits[0, 4:])  # whose text has one preference throughout
    cache = returned_cache(model(input_ids=ids[:, :4], preference=rows, use_cache=True))
    found = model(input_ids=ids[:, 4:], preference=[0, 1], **{NAME: cache}).logits
    agree(found[1], model(input_ids=ids, preference=[0, 1]).logits[1, 4:])
