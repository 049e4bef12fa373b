from __future__ import annotations

import copy

import pytest
import torch
from transformers import DynamicCache, StaticCache

from peft_hoe import PreferenceError


@pytest.fixture
def model(toys):
    return toys.make_policy().eval()


@pytest.fixture
def ids():
    return torch.randint(4, 32, (2, 6), generator=torch.Generator().manual_seed(3))


@torch.no_grad()
def test_a_cache_goes_on_at_its_own_preference_alone(model, ids, agree):
    whole = model(input_ids=ids, preference=[0.3, 0.7]).logits
    cache = model(input_ids=ids[:, :4], preference=[0.3, 0.7], use_cache=True).past_key_values
    copied = copy.deepcopy(cache)
    agree(model(input_ids=ids[:, 4:], preference={"low": 0.3, "high": 0.7}, past_key_values=cache).logits, whole[:, 4:])
    with pytest.raises(PreferenceError, match="filled at another preference"):
        model(input_ids=ids[:, 4:], preference=[0.7, 0.3], past_key_values=copied)
    with pytest.raises(PreferenceError, match="filled at another preference"):
        model(input_ids=ids[:, 4:], past_key_values=copied)  # at the default
    with model.use_preference([0.3, 0.7]):
        agree(model(input_ids=ids[:, 4:], past_key_values=copied).logits, whole[:, 4:])


@torch.no_grad()
def test_generate_refuses_a_cache_of_another_preference(model, ids):
    options = {"max_new_tokens": 2, "do_sample": False, "pad_token_id": 0}
    cache = DynamicCache(config=model.config)
    model(input_ids=ids[:, :4], preference=[1, 0], past_key_values=cache)
    with pytest.raises(PreferenceError, match="past_key_values"):
        model.generate(input_ids=ids, past_key_values=copy.deepcopy(cache), preference=[0, 1], **options)
    text = model.generate(input_ids=ids, past_key_values=cache, preference=[1, 0], **options)
    assert torch.equal(text, model.generate(input_ids=ids, preference=[1, 0], **options))


@torch.no_grad()
def test_an_emptied_cache_is_anybodys(model, ids, agree):
    cache = StaticCache(config=model.config, max_cache_len=8)
    model(input_ids=ids, preference=[1, 0], past_key_values=cache)
    cache.reset()
    found = model(input_ids=ids, preference=[0, 1], past_key_values=cache).logits
    agree(found, model(input_ids=ids, preference=[0, 1]).logits)


@torch.no_grad()
def test_rows_may_come_together(model, ids, agree):
    """A server joins the caches of texts of different preferences: what is right there only it can know."""
    rows = [[1, 0], [0, 1]]
    cache = model(input_ids=ids[:, :4], preference=[1, 0], use_cache=True).past_key_values
    found = model(input_ids=ids[:, 4:], preference=rows, past_key_values=cache).logits
    agree(found[0], model(input_ids=ids, preference=[1, 0]).logits[0, 4:])  # whose text has one preference throughout
    cache = model(input_ids=ids[:, :4], preference=rows, use_cache=True).past_key_values
    found = model(input_ids=ids[:, 4:], preference=[0, 1], past_key_values=cache).logits
    agree(found[1], model(input_ids=ids, preference=[0, 1]).logits[1, 4:])
