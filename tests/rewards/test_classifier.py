from __future__ import annotations

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    PreTrainedTokenizerFast,
)

from peft_hoe.errors import HoEError, RewardError
from peft_hoe.rewards import ClassifierReward, ModuleReward, Rewards
from peft_hoe.rewards.command_line import parse_rewards

PROMPTS = ["w3 w4", "w5"]
TEXTS = [" w6", " w7 w8 w9"]
ROUNDING = 1e-4  # of two layers in float32; those of other texts lie further apart


@pytest.fixture(scope="module")
def tokenizer():
    words = {"<pad>": 0, "<s>": 1, "</s>": 2} | {f"w{i}": i for i in range(3, 32)} | {"Q": 32, "A": 33}
    plain = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    plain.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=plain, pad_token="<pad>", eos_token="</s>", model_max_length=16)


def _logits(model, tokenizer, text: str) -> list[float]:
    with torch.no_grad():
        return model.eval()(input_ids=tokenizer(text, return_tensors="pt")["input_ids"]).logits[0].tolist()


def test_a_classifier_reads_text_with_its_own_tokenizer(tokenizer):
    torch.manual_seed(0)
    model = BertForSequenceClassification(
        BertConfig(
            vocab_size=40,
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=16,
            num_labels=3,
            id2label={0: "bad", 1: "fair", 2: "good"},
            label2id={"bad": 0, "fair": 1, "good": 2},
        )
    ).train()
    rewards = Rewards({"a": ClassifierReward(model, tokenizer, output="good", sign=-1)}, ["a"])
    expected = [[-_logits(model, tokenizer, text)[2]] for text in ("w3 w4 w6", "w5 w7 w8 w9")]
    np.testing.assert_allclose(rewards(PROMPTS, TEXTS), expected, atol=ROUNDING)
    assert not model.training
    assert list(rewards.modules()) == [model]
    assert not rewards.needs_tokens
    for output in (3, "great"):
        with pytest.raises(RewardError, match=r"no output .*; it has 3: .*'good'"):
            ClassifierReward(model, tokenizer, output=output)


@pytest.mark.parametrize("pad", [0, None, 7])
def test_a_decoder_classifier_with_several_outputs(tokenizer, pad, gpt2):
    model = gpt2(3, pad_token_id=pad)
    texts = ["Q w3 w4 A w6", "Q w5 A w7 w8 w9"]
    reward = ClassifierReward(model, tokenizer, output=[2, 0], sign=[1, -1], template="Q {prompt} A{completion}")
    logits = np.asarray([_logits(model, tokenizer, text) for text in texts])
    table = Rewards({("b", "a"): reward}, ["a", "b"])(PROMPTS, TEXTS)
    np.testing.assert_allclose(table, np.stack([-logits[:, 0], logits[:, 2]], axis=1), atol=ROUNDING)
    with pytest.raises(RewardError, match=r"\['a'\] has 2 outputs"):
        Rewards([reward], ["a"])


def test_texts_of_a_classifier(tokenizer, gpt2):
    model = gpt2(1)
    chat = [[{"role": "user", "content": "w3"}]]
    with pytest.raises(RewardError, match=r"reward 'a': the prompts are chat messages.*template="):
        Rewards([ClassifierReward(model, tokenizer)], ["a"])(chat, ["w4"])
    flat = ClassifierReward(model, tokenizer, template="{completion}")
    assert flat(chat, ["w4"]).item() == pytest.approx(_logits(model, tokenizer, "w4")[0], abs=ROUNDING)
    function = ClassifierReward(model, tokenizer, template=lambda prompt, text: prompt[0]["content"] + " " + text)
    assert function(chat, ["w4"]).item() == pytest.approx(_logits(model, tokenizer, "w3 w4")[0], abs=ROUNDING)
    tokenizer.chat_template = (
        "{% for m in messages %}{{ 'Q ' if m.role == 'user' else 'A ' }}{{ m.content }} {% endfor %}"
    )
    try:
        chatting = ClassifierReward(model, tokenizer)(chat, ["w4"]).item()
    finally:
        tokenizer.chat_template = None
    assert chatting == pytest.approx(_logits(model, tokenizer, "Q w3 A w4")[0], abs=ROUNDING)
    with pytest.raises(RewardError, match="cannot be filled in"):
        ClassifierReward(model, tokenizer, template="{answer}")


def test_names_in_place_of_what_they_name_are_told(tokenizer, gpt2):
    with pytest.raises(
        RewardError, match=r"the classifier is 'org/name'; load it, with AutoModelForSequenceClassification"
    ):
        ClassifierReward("org/name", tokenizer)
    with pytest.raises(HoEError, match=r"the tokenizer is 'org/name'; load .*AutoTokenizer"):
        ClassifierReward(gpt2(), "org/name")


def test_a_tokenizer_of_another_model_is_told(tokenizer, gpt2):
    """It was an IndexError, and on a GPU the end of the process."""
    reward = ClassifierReward(gpt2(vocab_size=8), tokenizer)
    with pytest.raises(RewardError, match=r"reward 'a': GPT2.*token 9 \('w9'\) in the texts is none of the 8"):
        Rewards([reward], ["a"])(PROMPTS, TEXTS)


@pytest.mark.parametrize("sizes", [{"batch_size": 0}, {"batch_size": 1.5}, {"max_length": 0}])
def test_sizes_are_whole_numbers(tokenizer, sizes, gpt2):
    (name,) = sizes
    with pytest.raises(HoEError, match=f"{name} is .*whole number, at least 1"):
        ClassifierReward(gpt2(), tokenizer, **sizes)
    if name == "batch_size":
        with pytest.raises(HoEError, match="batch_size is"):
            ModuleReward(gpt2(), **sizes)


def test_long_texts_lose_their_beginning(tokenizer, gpt2):
    model = gpt2(1)
    reward = ClassifierReward(model, tokenizer, max_length=2)(["w3 w4 w5"], [" w6 w7"]).item()
    assert reward == pytest.approx(_logits(model, tokenizer, "w6 w7")[0], abs=ROUNDING)
    limit = ClassifierReward(model, tokenizer)(["w3 " * 30], ["w4"]).item()  # the tokenizer's 16
    assert limit == pytest.approx(_logits(model, tokenizer, "w3 " * 15 + "w4")[0], abs=ROUNDING)


def test_a_text_that_begins_with_the_completion_loses_its_end(tokenizer, gpt2):
    model = gpt2(1)
    settings = {"max_length": 2, "template": "{completion} {prompt}"}
    reward = ClassifierReward(model, tokenizer, truncation_side="right", **settings)(["w3 w4 w5"], ["w6"]).item()
    assert reward == pytest.approx(_logits(model, tokenizer, "w6 w3")[0], abs=ROUNDING)
    with pytest.raises(RewardError, match="truncation_side is 'both'; use one of 'left', 'right'"):
        ClassifierReward(model, tokenizer, truncation_side="both")


def test_a_pair_is_joined_by_the_tokenizer():
    words = {"<pad>": 0, "[CLS]": 1, "[SEP]": 2} | {f"w{i}": i for i in range(3, 40)}
    plain = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    plain.pre_tokenizer = pre_tokenizers.Whitespace()
    plain.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=plain, pad_token="<pad>")
    torch.manual_seed(0)
    model = BertForSequenceClassification(
        BertConfig(
            vocab_size=40, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, num_labels=1
        )
    ).eval()  # fmt: skip
    reward = ClassifierReward(model, tokenizer, template=lambda prompt, completion: (completion, prompt))
    with torch.no_grad():
        expected = [
            model(input_ids=torch.tensor([ids]), token_type_ids=torch.tensor([segments])).logits.item()
            for ids, segments in (
                ([1, 6, 2, 3, 4, 2], [0, 0, 0, 1, 1, 1]),
                ([1, 7, 8, 9, 2, 5, 2], [0, 0, 0, 0, 0, 1, 1]),
            )
        ]
    np.testing.assert_allclose(reward(PROMPTS, TEXTS)[:, 0], expected, atol=ROUNDING)


def test_classifiers_on_the_command_line(tmp_path, tokenizer, gpt2):
    model = gpt2(3)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    sources = parse_rewards([f"a=hub:{tmp_path}#2", f"b=hub:{tmp_path}#LABEL_1:-", f"c=hub:{tmp_path}"])
    rewards = Rewards(sources, ["a", "b", "c"])
    assert len(list(rewards.modules())) == 1  # loaded and run once
    logits = np.asarray([_logits(model, tokenizer, text) for text in ("w3 w4 w6", "w5 w7 w8 w9")])
    np.testing.assert_allclose(rewards(PROMPTS, TEXTS), logits[:, [2, 1, 0]] * [1, -1, 1], atol=ROUNDING)
    model.transformer.save_pretrained(tmp_path / "headless")
    tokenizer.save_pretrained(tmp_path / "headless")
    with pytest.raises(RewardError, match=r"is no sequence classifier: it does not hold .*score\.weight"):
        parse_rewards([f"a=hub:{tmp_path}/headless"])
