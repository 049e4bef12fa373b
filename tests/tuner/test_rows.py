"""One preference per row where a module's rows are not simply the batch's: pictures, sounds, flattened and replayed inputs."""

from __future__ import annotations

import pytest
import torch
import transformers
from packaging import version
from peft import get_peft_model
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPVisionConfig,
    GenerationConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    OPTConfig,
    OPTForCausalLM,
    WhisperConfig,
    WhisperForConditionalGeneration,
)

from peft_hoe import HoEConfig
from peft_hoe.errors import RowsError

TRANSFORMERS = version.parse(transformers.__version__)

ROWS = [[0.9, 0.1], [0.2, 0.8]]
IMAGE = 60


def steered(base, randomise, task="CAUSAL_LM"):
    config = HoEConfig(objectives=["a", "b"], routers=[[0.25, 0.75]], r=4, task_type=task, target_modules="all-linear")
    model = get_peft_model(base.double(), config).double()
    randomise(model)
    model.mark_trained()
    return model.eval()


@pytest.fixture
def llava(randomise):
    torch.manual_seed(0)
    vision = CLIPVisionConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, image_size=16, patch_size=8,
        projection_dim=32,
    )  # fmt: skip
    text = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, eos_token_id=2,
        pad_token_id=0, bos_token_id=1,
    )  # fmt: skip
    config = LlavaConfig(
        vision_config=vision, text_config=text, image_token_index=IMAGE, image_token_id=IMAGE, vision_feature_layer=-1
    )
    return steered(LlavaForConditionalGeneration(config), randomise)


def batch(*images: int):
    """Two rows of 14 tokens with so many pictures in each, of 4 tokens a picture."""
    torch.manual_seed(1)
    ids = torch.randint(3, 50, (2, 14))
    for row, count in zip(ids, images, strict=True):
        row[1 : 1 + 4 * count] = IMAGE
    pixels = torch.randn(sum(images), 3, 16, 16).double()
    return {"input_ids": ids, "pixel_values": pixels, "attention_mask": torch.ones_like(ids)}


def alone(inputs, row, images):
    pixels = inputs["pixel_values"].split(images)[row]
    return {name: item[row : row + 1] for name, item in inputs.items()} | {"pixel_values": pixels}


@pytest.mark.parametrize("images", [(1, 1), (2, 2)])
def test_pictures_that_are_as_many_for_each_row(llava, images):
    inputs = batch(*images)
    settings = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    with torch.no_grad():
        together = llava(**inputs, preference=ROWS).logits
        texts = llava.generate(**inputs, preference=ROWS, **settings)
        for row, preference in enumerate(ROWS):
            single = alone(inputs, row, images)
            torch.testing.assert_close(together[row : row + 1], llava(**single, preference=preference).logits)
            assert texts[row].tolist() == llava.generate(**single, preference=preference, **settings)[0].tolist()


@pytest.mark.parametrize("images", [(2, 0), (0, 2), (1, 2)])
def test_pictures_that_are_not_are_refused(llava, images):
    # Two pictures in a batch of two rows, both in the first: the second was encoded with the second row's preference.
    inputs = batch(*images)
    for call in (llava, llava.generate):
        with pytest.raises(RowsError, match=r"vision_tower.*pictures that are not as many") as refused:
            call(**inputs, preference=ROWS)
        assert refused.value.module.startswith("model.vision_tower.")
        assert refused.value.shape[0] == sum(images)
    with torch.no_grad():
        shared = llava(**inputs, preference=ROWS[0]).logits
        rows = llava(**inputs, preference=[ROWS[0]] * 2).logits if images == (1, 1) else shared
    torch.testing.assert_close(rows, shared)


def test_pictures_with_embedded_text_cannot_be_told_apart(llava):
    inputs = batch(1, 1)
    ids = inputs.pop("input_ids")
    with pytest.raises(RowsError, match="vision_tower"):
        llava(**inputs, inputs_embeds=llava.get_input_embeddings()(ids), preference=ROWS)


@pytest.mark.skipif(version.parse("5") > TRANSFORMERS, reason="CLIP of transformers 4 does not run in float64")
def test_pictures_without_places_in_the_text_belong_to_rows(randomise):
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    text = CLIPTextConfig(**sizes, vocab_size=64, max_position_embeddings=16, eos_token_id=2, projection_dim=16)
    vision = CLIPVisionConfig(**sizes, image_size=16, patch_size=8, projection_dim=16)
    base = CLIPModel(CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=16))
    model = steered(base, randomise, task=None)
    ids, pixels = torch.randint(3, 50, (2, 7)), torch.randn(4, 3, 16, 16).double()
    with torch.no_grad():
        together = model(input_ids=ids, pixel_values=pixels[:2], preference=ROWS).image_embeds
        for row, preference in enumerate(ROWS):
            single = model(input_ids=ids[:1], pixel_values=pixels[row : row + 1], preference=preference).image_embeds
            torch.testing.assert_close(together[row : row + 1], single)
    with pytest.raises(RowsError, match="vision_model"):
        model(input_ids=ids, pixel_values=pixels, preference=ROWS)


def test_whisper_repeats_rows_for_sequences_and_again_for_beams(randomise):
    torch.manual_seed(0)
    config = WhisperConfig(
        vocab_size=64, num_mel_bins=8, d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=48, decoder_ffn_dim=48, max_source_positions=20,
        max_target_positions=24, pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=3,
        suppress_tokens=None, begin_suppress_tokens=None,
    )  # fmt: skip
    base = WhisperForConditionalGeneration(config)
    base.generation_config = GenerationConfig(
        decoder_start_token_id=3, pad_token_id=0, bos_token_id=1, eos_token_id=2, max_length=24
    )
    model = steered(base, randomise, task="SEQ_2_SEQ_LM")
    sounds = torch.randn(2, 8, 40).double()
    settings = {"num_beams": 3, "num_return_sequences": 2, "max_new_tokens": 4, "do_sample": False}
    together = model.generate(input_features=sounds, preference=ROWS, **settings)
    for row, preference in enumerate(ROWS):
        single = model.generate(input_features=sounds[row : row + 1], preference=preference, **settings)
        assert together[2 * row : 2 * row + 2].tolist() == single.tolist()


def test_a_generate_that_drops_rows_is_refused(steerable, tokens):
    # Such as Whisper's, which goes on with those recordings that are not finished.
    model = steerable("llama")
    layer = model.base_model.model.model.layers[0].mlp.down_proj
    hooks = model.base_model.steering.hooks
    steering = {"preference": ROWS, "routers": None, "expansions": [1, 2]}
    with hooks.generating(model.base_model.model, (), {}, **steering), torch.no_grad():
        layer(torch.randn(4, 1, 48))
        layer(torch.randn(4, 1, 48))
        with pytest.raises(RowsError, match="down_proj"):
            layer(torch.randn(2, 1, 48))


# -- flattened inputs, run again by gradient checkpointing ---


@pytest.fixture
def opt(randomise):
    torch.manual_seed(0)
    config = OPTConfig(
        vocab_size=64, hidden_size=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=4, word_embed_proj_dim=32,
        dropout=0.0, max_position_embeddings=32,
    )  # fmt: skip
    return steered(OPTForCausalLM(config), randomise)


def gradients(model, tokens, rows, checkpointed, *, forwards=1):
    """Gradients of the routers, by Parameter."""
    model.zero_grad()
    if checkpointed is None:
        model.eval()
    else:
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": checkpointed})
        model.enable_input_require_grads()
        model.train()
    losses = [model(tokens[:, : 7 - i], preference=rows).logits.pow(2).mean() for i in range(forwards)]
    torch.stack(losses).sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("forwards", [1, 2])
def test_checkpointed_gradients_of_flattened_rows(opt, tokens, reentrant, forwards):
    # The replay did not know how long the rows were, and raised. With two forwards of other lengths it may be either.
    rows = [[0.3, 0.7], [0.6, 0.4], [0.25, 0.75]]
    expected = gradients(opt, tokens, rows, None, forwards=forwards)
    assert any("hoe_router" in name for name in expected)
    got = gradients(opt, tokens, rows, reentrant, forwards=forwards)
    assert got.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(got[name], expected[name])
