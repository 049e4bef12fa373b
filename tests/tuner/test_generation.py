"""Rows, padding, caches, beams, encoder-decoders and models that flatten their inputs."""

from __future__ import annotations

import pytest
import torch
from peft import get_peft_model
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    OPTConfig,
    OPTForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from peft_hoe import HoEConfig, PreferenceError

ROWS = [[1.0, 0.0], [0.1, 0.9], [0.6, 0.4]]


def opt():
    torch.manual_seed(0)
    return OPTForCausalLM(
        OPTConfig(
            vocab_size=64, hidden_size=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=4,
            max_position_embeddings=64, word_embed_proj_dim=32, pad_token_id=0, bos_token_id=1, eos_token_id=2,
            init_std=0.2,
        )
    )  # fmt: skip


def t5():
    torch.manual_seed(0)
    return T5ForConditionalGeneration(
        T5Config(
            vocab_size=64, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, decoder_start_token_id=0,
            pad_token_id=0, eos_token_id=1, initializer_factor=3.0,
        )
    )  # fmt: skip


def bart():
    torch.manual_seed(0)
    return BartForConditionalGeneration(
        BartConfig(
            vocab_size=64, d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
            decoder_attention_heads=4, encoder_ffn_dim=48, decoder_ffn_dim=48, max_position_embeddings=64, init_std=0.2,
            pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=2, forced_eos_token_id=None,
        )
    )  # fmt: skip


@pytest.fixture
def steerable(hoe_llama, randomise):
    def make(kind):
        if kind == "llama":
            return hoe_llama(trained=True)
        task = "CAUSAL_LM" if kind == "opt" else "SEQ_2_SEQ_LM"
        base = {"opt": opt, "t5": t5, "bart": bart}[kind]()
        model = get_peft_model(
            base,
            HoEConfig(objectives=["a", "b"], routers=[[0.25, 0.75]], r=4, target_modules="all-linear", task_type=task),
        )
        randomise(model)
        model.mark_trained()
        return model.eval()

    return make


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


def test_preferences_do_change_the_text(steerable, tokens):
    for kind in ("llama", "opt", "t5", "bart"):
        model = steerable(kind)
        same = tokens[:1].expand(3, -1)
        texts = model.generate(input_ids=same, preference=ROWS, max_new_tokens=8, min_new_tokens=8, do_sample=False)
        assert len({tuple(row) for row in texts.tolist()}) > 1, kind


@pytest.mark.parametrize("kind", ["llama", "opt"])
def test_logits_by_rows_equal_row_by_row(steerable, tokens, kind):
    model = steerable(kind)
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            together = model(tokens, preference=ROWS).logits
            alone = torch.cat([model(tokens[i : i + 1], preference=p).logits for i, p in enumerate(ROWS)])
        torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-4)


def test_encoder_decoder_logits_by_rows(steerable, tokens):
    for kind in ("t5", "bart"):
        model = steerable(kind)
        labels = tokens[:, :4].contiguous()
        with torch.no_grad():
            together = model(input_ids=tokens, labels=labels, preference=ROWS).logits
            alone = torch.cat(
                [
                    model(input_ids=tokens[i : i + 1], labels=labels[i : i + 1], preference=p).logits
                    for i, p in enumerate(ROWS)
                ]
            )
        torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-4)


def test_left_padding_and_neighbours_do_not_matter(steerable, tokens):
    model = steerable("llama")
    short = tokens[0, :4]
    padded = torch.stack([torch.cat([torch.zeros(3, dtype=torch.long), short]), tokens[1]])
    mask = (torch.arange(7) >= torch.tensor([[3], [0]])).long()
    with torch.no_grad():
        alone = model(short[None], preference=ROWS[1]).logits
        batch = model(padded, attention_mask=mask, preference=[ROWS[1], ROWS[0]]).logits
    torch.testing.assert_close(batch[0, 3:], alone[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("preference", [[0.25, 0.75], ROWS], ids=["shared", "rows"])
def test_cached_and_uncached_generation_agree(steerable, tokens, preference):
    model = steerable("llama")
    settings = {"preference": preference, "max_new_tokens": 10, "do_sample": False}
    assert (
        model.generate(tokens, use_cache=True, **settings).tolist()
        == model.generate(tokens, use_cache=False, **settings).tolist()
    )


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
