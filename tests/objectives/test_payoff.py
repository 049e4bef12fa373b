from __future__ import annotations

import numpy as np
import pytest
import torch
from peft import get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    GenerationConfig,
    GPT2Config,
    GPT2ForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from peft_hoe import Decoding, HoEConfig, HoEError, RowsError
from peft_hoe.errors import RewardError
from peft_hoe.generation import completer
from peft_hoe.objectives import payoff_table

SHORT = Decoding(6)
PROMPTS = ["w3 w4", "w5", "w6 w7 w8"]


@pytest.fixture(scope="module")
def tokenizer():
    words = {"<pad>": 0, "<s>": 1, "</s>": 2} | {f"w{i}": i for i in range(3, 64)}
    plain = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    plain.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=plain, pad_token="<pad>", bos_token="<s>", eos_token="</s>", padding_side="left"
    )


@pytest.fixture(scope="module")
def policy():
    torch.manual_seed(0)
    base = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=64,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            initializer_range=0.2,
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=0,
        )
    )
    config = HoEConfig(
        objectives=["low", "even"], r=4, target_modules="all-linear", init_weights=False, task_type="CAUSAL_LM"
    )
    model = get_peft_model(base, config).eval()
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "hoe_A" in name or "hoe_B" in name:
            parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)
    return model


def _numbers(text: str) -> list[int]:
    return [int(word[1:]) for word in text.split()]


def low(prompts, completions, **columns):
    return [-float(np.mean(_numbers(text))) if text else None for text in completions]


def even(prompts, completions, scale):
    return [by * sum(n % 2 == 0 for n in _numbers(text)) for text, by in zip(completions, scale, strict=True)]


def rows(scale):
    return [{"prompt": prompt, "scale": by} for prompt, by in zip(PROMPTS, scale, strict=True)]


def _by_hand(policy, tokenizer, scale):
    """One prompt at a time, one preference at a time, greedy."""
    table = np.empty((2, 2))
    for i, corner in enumerate(np.eye(2)):
        texts = []
        for prompt in PROMPTS:
            ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
            answer = policy.generate(input_ids=ids, max_new_tokens=6, do_sample=False, preference=corner.tolist())
            texts.append(tokenizer.decode(answer[0, ids.shape[1] :], skip_special_tokens=True))
        table[i] = [np.nanmean(np.asarray(low(PROMPTS, texts), dtype=float)), np.mean(even(PROMPTS, texts, scale))]
    return table


@pytest.mark.parametrize("batch_size", [64, 4, 1])
def test_payoff_table_equals_one_prompt_at_a_time(policy, tokenizer, batch_size):
    scale = [1.0, 2.0, 3.0]
    normalizer = payoff_table(
        policy,
        rows(scale),
        {"even": even, "low": low},
        processing_class=tokenizer,
        decoding=SHORT,
        batch_size=batch_size,
    )
    np.testing.assert_allclose(normalizer.payoff, _by_hand(policy, tokenizer, scale))
    assert normalizer.objectives == ("low", "even")
    assert normalizer.decoding == {"do_sample": False, "max_new_tokens": 6, "stop_tokens": [2]}
    assert normalizer.measurement["prompts"] == 3
    assert "seed" not in normalizer.measurement


def test_where_rows_cannot_be_told_apart_preferences_take_turns(policy, tokenizer, monkeypatch):
    settings = {"processing_class": tokenizer, "decoding": SHORT}
    expected = payoff_table(policy, rows([1.0] * 3), [low, even], **settings).payoff
    steer = completer.use_preference

    def refuse_rows(model, preference, **others):
        if np.ndim(preference["default"]) == 2:
            raise RowsError("rows are not samples here")
        return steer(model, preference, **others)

    monkeypatch.setattr(completer, "use_preference", refuse_rows)
    np.testing.assert_allclose(payoff_table(policy, rows([1.0] * 3), [low, even], **settings).payoff, expected)


def test_sampling_repeats_and_leaves_everything_as_it_was(policy, tokenizer):
    policy.train()
    policy.base_model.model.lm_head.eval()
    policy.set_preference([0.25, 0.75])
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    decoding = Decoding(6, do_sample=True, temperature=1.5)
    settings = {"processing_class": tokenizer, "decoding": decoding}
    first = payoff_table(policy, rows([1.0] * 3), [low, even], **settings)
    assert torch.equal(torch.rand(1), expected)
    assert policy.training
    assert not policy.base_model.model.lm_head.training
    assert policy.preference == {"low": 0.25, "even": 0.75}
    again = payoff_table(policy, rows([1.0] * 3), [low, even], **settings)
    other = payoff_table(policy, rows([1.0] * 3), [low, even], seed=1, **settings)
    np.testing.assert_array_equal(first.payoff, again.payoff)
    assert (first.payoff != other.payoff).any()
    assert first.decoding["temperature"] == 1.5
    assert first.measurement | {"prompts": 3, "seed": 0, "batch_size": 64} == first.measurement
    policy.eval()


def test_the_models_own_generation_settings_play_no_part(policy, tokenizer, monkeypatch):
    """A checkpoint's repetition penalty and temperature would fill in what ours leave open; only stop tokens do."""
    settings = {"processing_class": tokenizer}
    whole, open_settings = Decoding(12, do_sample=True), GenerationConfig(max_new_tokens=12, do_sample=True)
    expected = payoff_table(policy, rows([1.0, 2.0, 4.0]), [low, even], decoding=whole, **settings)
    open_expected = payoff_table(policy, rows([1.0, 2.0, 4.0]), [low, even], decoding=open_settings, **settings)
    own = GenerationConfig(repetition_penalty=5.0, temperature=0.1, top_p=0.2, top_k=1, eos_token_id=2)
    for owner in (policy.get_base_model(), policy):
        monkeypatch.setattr(owner, "generation_config", own, raising=False)
        again = payoff_table(policy, rows([1.0, 2.0, 4.0]), [low, even], decoding=whole, **settings)
        assert (again.payoff == expected.payoff).all()
        again = payoff_table(policy, rows([1.0, 2.0, 4.0]), [low, even], decoding=open_settings, **settings)
        assert (again.payoff == open_expected.payoff).all()
        assert owner.generation_config is own


def test_any_decoding_can_be_measured(policy, tokenizer):
    """No stop token: texts go on to the full length, and the table says so."""
    words = []

    def length(prompts, completions):
        words.extend(len(text.split()) for text in completions)
        return [float(len(text)) for text in completions]

    endless = Decoding(30, stop_tokens=(), options={"suppress_tokens": [0, 1, 2]})
    normalizer = payoff_table(policy, PROMPTS, [length, low], processing_class=tokenizer, decoding=endless)
    assert words == [30] * 6
    assert normalizer.decoding == {
        "max_new_tokens": 30, "do_sample": False, "stop_tokens": [], "suppress_tokens": [0, 1, 2],
    }  # fmt: skip
    several = GenerationConfig(max_new_tokens=30, do_sample=False, eos_token_id=list(range(3, 64)))
    words.clear()
    with pytest.raises(RewardError, match="constant"):  # whichever word comes first ends the text
        payoff_table(
            policy,
            PROMPTS,
            [lambda prompts, texts: [float(len(text.split())) for text in texts]] * 2,
            processing_class=tokenizer,
            decoding=several,
        )
    with pytest.raises(HoEError, match="max_new_tokens"):
        payoff_table(policy, PROMPTS, [low, low], processing_class=tokenizer, decoding=GenerationConfig())


def test_modules_read_the_tokens(policy, tokenizer):
    torch.manual_seed(0)
    config = GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=64, n_positions=32, num_labels=2, pad_token_id=0)
    reward = GPT2ForSequenceClassification(config)
    settings = {"processing_class": tokenizer, "decoding": SHORT}
    both = payoff_table(policy, PROMPTS, reward, **settings)
    one_by_one = payoff_table(policy, PROMPTS, reward, batch_size=1, **settings)
    np.testing.assert_allclose(both.payoff, one_by_one.payoff, atol=1e-6)


def test_bad_input(policy, tokenizer):
    with pytest.raises(HoEError, match="batch_size is 0; it must be a whole number, at least 1"):
        payoff_table(policy, PROMPTS, [low, low], processing_class=tokenizer, batch_size=0)
    with pytest.raises(RewardError, match="no prompts"):
        payoff_table(policy, [], [low, low], processing_class=tokenizer)
    with pytest.raises(RewardError, match="'even' is constant"):
        payoff_table(
            policy,
            PROMPTS,
            [low, lambda prompts, completions: [1.0] * len(prompts)],
            processing_class=tokenizer,
            decoding=SHORT,
        )
