"""Rows, padding, caches, beams, encoder-decoders and models that flatten their inputs."""

from __future__ import annotations

import copy
import json
import pickle

import pytest
import torch
from transformers import GenerationConfig, pipeline

import peft_hoe
from peft_hoe import PreferenceError

ROWS = [[1.0, 0.0], [0.1, 0.9], [0.6, 0.4]]


@pytest.mark.parametrize("kind", ["llama", "opt", "t5", "bart"])
@pytest.mark.parametrize(
    "decoding",
    [
        {},
        {"num_beams": 3},
        {"num_beams": 4, "num_return_sequences": 2},
        {"do_sample": True, "num_return_sequences": 3, "top_k": 1},
        {"use_cache": False},
    ],
    ids=["greedy", "beams", "beams and returns", "returns", "no cache"],
)
def test_generation_by_rows_equals_row_by_row(steerable, tokens, kind, decoding):
    model = steerable(kind)
    settings = {"max_new_tokens": 5, "min_new_tokens": 5, **({"do_sample": False} | decoding)}
    together = model.generate(input_ids=tokens, preference=ROWS, **settings)
    copies = settings.get("num_return_sequences", 1)
    for i, preference in enumerate(ROWS):
        alone = model.generate(input_ids=tokens[i : i + 1], preference=preference, **settings)
        assert together[i * copies : (i + 1) * copies].tolist() == alone.tolist()


def test_beams_with_rows_of_one_adapter_and_one_preference_of_another(hoe_llama, config, tokens):
    model = hoe_llama()
    model.add_adapter("other", config(init_weights=False, interpolation="norm"))
    model.mark_trained(adapter_name="other")
    model.base_model.set_adapter(["default", "other"])
    settings = {"max_new_tokens": 4, "min_new_tokens": 4, "num_beams": 2}
    together = model.generate(input_ids=tokens, preference={"default": ROWS, "other": [0.3, 0.7]}, **settings)
    for i, preference in enumerate(ROWS):
        named = {"default": preference, "other": [0.3, 0.7]}
        alone = model.generate(input_ids=tokens[i : i + 1], preference=named, **settings)
        assert together[i].tolist() == alone[0].tolist()


def test_preferences_do_change_the_text(steerable, tokens):
    for kind in ("llama", "opt", "t5", "bart"):
        model = steerable(kind)
        same = tokens[:1].expand(3, -1)
        texts = model.generate(input_ids=same, preference=ROWS, max_new_tokens=8, min_new_tokens=8, do_sample=False)
        assert len({tuple(row) for row in texts.tolist()}) > 1, kind


@pytest.mark.parametrize("kind", ["llama", "opt"])
def test_logits_by_rows_equal_row_by_row(steerable, tokens, kind):
    model = steerable(kind).double()
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            together = model(tokens, preference=ROWS).logits
            alone = torch.cat([model(tokens[i : i + 1], preference=p).logits for i, p in enumerate(ROWS)])
        torch.testing.assert_close(together, alone, rtol=0, atol=1e-10)


def test_encoder_decoder_logits_by_rows(steerable, tokens):
    for kind in ("t5", "bart"):
        model = steerable(kind).double()
        labels = tokens[:, :4].contiguous()
        with torch.no_grad():
            together = model(input_ids=tokens, labels=labels, preference=ROWS).logits
            alone = torch.cat(
                [
                    model(input_ids=tokens[i : i + 1], labels=labels[i : i + 1], preference=p).logits
                    for i, p in enumerate(ROWS)
                ]
            )
        torch.testing.assert_close(together, alone, rtol=0, atol=1e-10)


def test_left_padding_and_neighbours_do_not_matter(steerable, tokens, agree):
    model = steerable("llama")
    short = tokens[0, :4]
    padded = torch.stack([torch.cat([torch.zeros(3, dtype=torch.long), short]), tokens[1]])
    mask = (torch.arange(7) >= torch.tensor([[3], [0]])).long()
    with torch.no_grad():
        alone = model(short[None], preference=ROWS[1]).logits
        batch = model(padded, attention_mask=mask, preference=[ROWS[1], ROWS[0]]).logits
    agree(batch[0, 3:], alone[0])  # other positions: the rotations are rounded to float32 in any model


@pytest.mark.parametrize("preference", [[0.25, 0.75], ROWS], ids=["shared", "rows"])
def test_cached_and_uncached_generation_agree(steerable, tokens, preference):
    model = steerable("llama")
    settings = {"preference": preference, "max_new_tokens": 10, "do_sample": False}
    assert (
        model.generate(tokens, use_cache=True, **settings).tolist()
        == model.generate(tokens, use_cache=False, **settings).tolist()
    )


def test_beams_are_found_wherever_generation_is_configured(steerable, tokens):
    model = steerable("llama")
    expected = model.generate(tokens, preference=ROWS, num_beams=3, max_new_tokens=3, min_new_tokens=3, do_sample=False)
    settings = GenerationConfig(num_beams=3, max_new_tokens=3, min_new_tokens=3, do_sample=False)
    assert model.generate(tokens, settings, preference=ROWS).tolist() == expected.tolist()
    assert model.generate(tokens, generation_config=settings, preference=ROWS).tolist() == expected.tolist()
    model.generation_config.num_beams = 3
    partly = GenerationConfig(max_new_tokens=3, min_new_tokens=3)
    assert model.generate(tokens, generation_config=partly, preference=ROWS).shape == expected.shape


def test_generation_from_embeddings(steerable, tokens):
    model = steerable("llama")
    embeddings = model.get_input_embeddings()(tokens)
    settings = {"preference": ROWS, "max_new_tokens": 4, "do_sample": False}
    from_ids = model.generate(tokens, **settings)
    from_embeddings = model.generate(inputs_embeds=embeddings, **settings)
    assert from_embeddings.tolist() == from_ids[:, tokens.shape[1] :].tolist()


def test_dispatched_experts_are_refused_even_when_the_number_of_tokens_fits(steerable):
    model = steerable("llama")
    layer = model.base_model.model.model.layers[0].mlp.down_proj
    layer.module_name = "model.layers.0.mlp.experts.1.down_proj"
    with model.use_preference(ROWS), pytest.raises(PreferenceError, match=r"experts.1.down_proj"):
        layer(torch.randn(3, 48))
    with model.use_preference(ROWS[0]):
        layer(torch.randn(3, 48))


def test_rows_that_are_not_samples_are_refused_by_name(steerable, tokens):
    model = steerable("llama")
    layer = model.base_model.model.model.layers[0].mlp.down_proj
    with model.use_preference(ROWS):
        with pytest.raises(PreferenceError, match="down_proj was given an input of shape"):
            layer(torch.randn(5, 48))  # not a multiple
        with pytest.raises(PreferenceError, match=r"down_proj was given an input of shape \(6, 48\)"):
            layer(torch.randn(6, 48))  # a multiple by accident: dispatched tokens
        layer(torch.randn(3, 48))
    with model.use_preference(ROWS[0]):
        layer(torch.randn(5, 48))  # shared by all rows: anything goes


def test_one_row_of_preferences_in_a_batch_of_one(steerable, tokens):
    model = steerable("llama")
    for settings in ({}, {"num_beams": 3}):
        kwargs = {"max_new_tokens": 5, "do_sample": False, **settings}
        assert torch.equal(
            model.generate(tokens[:1], preference=[ROWS[1]], **kwargs),
            model.generate(tokens[:1], preference=ROWS[1], **kwargs),
        )


# -- generate of any root ---


def test_a_plain_model_with_an_adapter_takes_rows_beams_and_settings(hoe_llama, llama, tokens, tmp_path):
    known = hoe_llama(trained=True)
    known.save_pretrained(tmp_path)
    plain = llama()
    plain.load_adapter(str(tmp_path))
    for settings in ({"do_sample": False}, {"num_beams": 3, "num_return_sequences": 2}):
        settings |= {"max_new_tokens": 5, "min_new_tokens": 5, "preference": ROWS}
        assert torch.equal(plain.generate(tokens, **settings), known.generate(input_ids=tokens, **settings))
    with pytest.raises(PreferenceError, match="2 rows"):
        plain.generate(tokens, preference=ROWS[:2])


def test_a_generation_config_brings_its_preference(hoe_llama, llama, tokens, tmp_path):
    model = hoe_llama(trained=True)
    model.save_pretrained(tmp_path)
    plain = llama()
    plain.load_adapter(str(tmp_path))
    how = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    wanted = [model.generate(input_ids=tokens, preference=p, **how) for p in ([1, 0], [0, 1])]
    assert not torch.equal(*wanted)
    # As a server reads it from JSON.
    config = GenerationConfig(**json.loads(json.dumps({**how, "preference": [1, 0]})))
    for each in (model, plain):
        assert torch.equal(each.generate(input_ids=tokens, generation_config=config), wanted[0])
        assert torch.equal(each.generate(input_ids=tokens, generation_config=config, preference=[0, 1]), wanted[1])
        with peft_hoe.use_preference(each, [0, 1]):
            assert torch.equal(each.generate(input_ids=tokens, generation_config=config), wanted[0])
    rows = GenerationConfig(**how, preference=ROWS)
    assert torch.equal(
        plain.generate(tokens, generation_config=rows), model.generate(input_ids=tokens, preference=ROWS, **how)
    )


def test_a_preference_in_the_models_own_settings_is_not_silently_ignored(hoe_llama, tokens):
    model = hoe_llama()
    model.generation_config.preference = [1, 0]
    with pytest.raises(PreferenceError, match="set_preference makes a default"):
        model.generate(input_ids=tokens, max_new_tokens=2)


def test_a_pipeline_passes_the_preference_on(toys):
    model, tokenizer = toys.make_policy(), toys.make_tokenizer()
    pipe = pipeline("text-generation", model=model, tokenizer=tokenizer)
    texts = []
    for preference in ([1, 0], [0, 1]):
        how = {"max_new_tokens": 8, "do_sample": False, "preference": preference}
        texts.append(pipe("w1 w2", return_full_text=False, **how)[0]["generated_text"])
        batch = tokenizer("w1 w2", return_tensors="pt")
        output = model.generate(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], **how)
        assert texts[-1].strip() == tokenizer.decode(output[0, 2:], skip_special_tokens=True)
    assert texts[0] != texts[1]


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_generates_by_itself(hoe_llama, tokens, copied):
    model = hoe_llama()
    before = model.generate(input_ids=tokens, max_new_tokens=5, preference=[1, 0])
    other = copied(model)
    assert torch.equal(other.generate(input_ids=tokens, max_new_tokens=5, preference=[1, 0]), before)
    for parameter in other.parameters():
        parameter.data.zero_()
    assert torch.equal(model.generate(input_ids=tokens, max_new_tokens=5, preference=[1, 0]), before)
    assert not torch.equal(other.generate(input_ids=tokens, max_new_tokens=5, preference=[1, 0]), before)


def test_an_unloaded_model_has_its_own_generate_again(hoe_llama, llama, tokens):
    base = hoe_llama().unload()
    assert "generate" not in vars(base)
    assert torch.equal(base.generate(tokens, max_new_tokens=5), llama().generate(tokens, max_new_tokens=5))
    with pytest.raises((TypeError, ValueError), match="preference"):
        base.generate(tokens, preference=[1, 0])
