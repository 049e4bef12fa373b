"""What the reward models of the recipes read, to the character, on tiny models with tokenizers of single characters."""

from __future__ import annotations

import string

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
from transformers import (
    BartConfig,
    BartForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
)

from peft_hoe import recipes
from peft_hoe.errors import RewardError
from peft_hoe.recipes.score_model import ScoreModel
from peft_hoe.rewards import Rewards

SPECIAL = ["<pad>", "<s>", "</s>"]
ALPHABET = [*SPECIAL, *string.printable]
SIZE = len(ALPHABET)


def tokenizer(single: str = "$A", pair: str = "$A $B:1", **settings) -> PreTrainedTokenizerFast:
    plain = Tokenizer(models.WordLevel({token: i for i, token in enumerate(ALPHABET)}, unk_token="<pad>"))
    plain.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    plain.post_processor = processors.TemplateProcessing(
        single=single, pair=pair, special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    settings = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", **settings}
    return PreTrainedTokenizerFast(tokenizer_object=plain, **settings)


def gpt2(outputs: int = 1):
    shape = {"n_embd": 8, "n_layer": 1, "n_head": 2, "n_positions": 512, "pad_token_id": 0}
    return GPT2ForSequenceClassification(GPT2Config(vocab_size=SIZE, num_labels=outputs, **shape)), tokenizer()


def llama(kind, outputs: int = 1):
    config = LlamaConfig(
        vocab_size=SIZE, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,
        num_labels=outputs, pad_token_id=0, max_position_embeddings=512,
    )  # fmt: skip
    return kind(config), tokenizer("<s> $A", "<s> $A <s>:1 $B:1")


def bart(outputs: int):
    config = BartConfig(
        vocab_size=SIZE, d_model=8, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2,
        encoder_ffn_dim=8, decoder_ffn_dim=8, num_labels=outputs, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        decoder_start_token_id=2, forced_eos_token_id=2, max_position_embeddings=512,
    )  # fmt: skip
    return BartForSequenceClassification(config), tokenizer("<s> $A </s>", "<s> $A </s> </s> $B </s>")


def bert(outputs: int):
    config = BertConfig(
        vocab_size=SIZE, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8,
        num_labels=outputs, pad_token_id=0,
    )  # fmt: skip
    return BertForSequenceClassification(config), tokenizer("<s> $A </s>", "<s> $A </s> $B:1 </s>:1")


def distilbert(outputs: int):
    config = DistilBertConfig(vocab_size=SIZE, dim=8, n_layers=1, n_heads=2, hidden_dim=8, num_labels=outputs)
    return DistilBertForSequenceClassification(config), tokenizer("<s> $A </s>", "<s> $A </s> $B </s>")


@pytest.fixture
def save(tmp_path):
    def write(made, name="model"):
        model, its_tokenizer = made
        torch.manual_seed(0)
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.5)
        model.save_pretrained(tmp_path / name)
        its_tokenizer.save_pretrained(tmp_path / name)
        return tmp_path / name

    return write


def read(reward, prompt: str, completion: str) -> tuple[str, torch.Tensor, np.ndarray]:
    """The text that a model is given, all its logits, and the reward."""
    seen = {}
    model = reward._loaded().model
    hook = model.register_forward_hook(
        lambda module, arguments, inputs, output: seen.update(ids=inputs["input_ids"], logits=output.logits),
        with_kwargs=True,
    )
    try:
        value = reward([prompt], [completion])
    finally:
        hook.remove()
    return "".join(ALPHABET[i] for i in seen["ids"][0]), seen["logits"][0], value[0].numpy()


QUESTION = "Why {not}?"
DIALOGUE = f"\n\nHuman: {QUESTION} \n\nAssistant:"
COMPLETION = " Because. \n\nHuman: And"
POST = "I lost 3 keys."
SUMMARISE = f"### Instruction: Generate a one-sentence summary of this post. ### Input: {POST} ### Response: "
BEAVER = f"<s>BEGINNING OF CONVERSATION: USER: {QUESTION} ASSISTANT:Because."


@pytest.mark.parametrize(
    ("task", "objective", "made", "prompt", "completion", "text", "output", "sign"),
    [
        ("helpful-assistant", "helpful", lambda: gpt2(), DIALOGUE, COMPLETION, DIALOGUE + "Because.", 0, 1),
        ("helpful-assistant", "harmless", lambda: gpt2(), DIALOGUE, COMPLETION, DIALOGUE + "Because.", 0, 1),
        ("helpful-assistant", "humor", lambda: distilbert(2), DIALOGUE, COMPLETION, "<s>Because.</s>", 1, 1),
        ("reddit-summary", "summary", lambda: gpt2(), SUMMARISE, " Lost. ", f"Lost. <s> {POST}", 0, 1),
        ("reddit-summary", "faithful", lambda: bart(2), SUMMARISE, " Lost. ", f"<s>Lost.</s></s>{POST}</s>", 1, 1),
        (
            "reddit-summary", "deberta", lambda: bert(1), SUMMARISE, " Lost. ",
            f"<s>{SUMMARISE.rstrip()}</s>Lost.</s>", 0, 1,
        ),
        ("beavertails", "reward", lambda: llama(ScoreModel), DIALOGUE, COMPLETION, BEAVER, 0, 1),
        ("beavertails", "cost", lambda: llama(ScoreModel), DIALOGUE, COMPLETION, BEAVER, 0, -1),
    ],
    ids=lambda value: value if isinstance(value, str) and value.isidentifier() else "",
)  # fmt: skip
def test_what_a_model_reads(save, task, objective, made, prompt, completion, text, output, sign):
    reward = recipes.get(task).rewards([objective], sources={objective: save(made())})[objective]
    assert reward.classifier is None  # nothing is loaded before the first call
    given, logits, value = read(reward, prompt, completion)
    assert given == text
    np.testing.assert_allclose(value, [sign * logits[output].item()], atol=1e-6)


def test_one_model_rates_helpsteers_five_objectives(save):
    recipe = recipes.get("helpsteer")
    path = save(llama(LlamaForSequenceClassification, outputs=10))
    rewards = recipe.rewards(sources=dict.fromkeys(recipe.objectives, path))
    assert list(rewards) == [("helpfulness", "correctness", "coherence", "complexity", "verbosity")]
    given, logits, value = read(rewards[recipe.objectives], DIALOGUE, COMPLETION)
    assert given == (
        "<s>[INST] You must read the following conversation carefully and rate the assistant's response from score 0-100 in "
        "these aspects: helpfulness, correctness, coherence, honesty, complexity, verbosity\n\n"
        f"User: {QUESTION}\n\nAssistant: Because. [/INST]"
    )
    np.testing.assert_allclose(value, logits[:5], atol=1e-6)
    table = Rewards(rewards, recipe.objectives)([DIALOGUE], [COMPLETION])
    np.testing.assert_allclose(table[0], logits[:5], atol=1e-6)
    alone = recipe.rewards(["verbosity"], sources={"verbosity": path})
    np.testing.assert_allclose(alone["verbosity"]([DIALOGUE], [COMPLETION]), logits[4:5][None], atol=1e-6)


def test_a_batch_of_pairs_is_as_its_rows(save):
    recipe = recipes.get("helpful-assistant")
    rewards = recipe.rewards(["helpful"], sources={"helpful": save(gpt2())}, batch_size=3)["helpful"]
    prompts = [recipe.fill(text) for text in ("Why?", "What is the time, please?", "Who")]
    answers = ["Because.", "Ten.", "Nobody in particular"]
    rows = [rewards([prompt], [answer]) for prompt, answer in zip(prompts, answers, strict=True)]
    torch.testing.assert_close(rewards(prompts, answers), torch.cat(rows), atol=1e-5, rtol=0)


def test_long_texts_keep_the_completion(save):
    task = recipes.get("helpful-assistant")
    reward = task.rewards(["helpful"], sources={"helpful": save(gpt2(), "a")})["helpful"]
    text, *_ = read(reward, task.fill("x" * 600), "Because.")
    assert text == (task.fill("x" * 600) + "Because.")[-512:]
    task = recipes.get("reddit-summary")
    reward = task.rewards(["summary"], sources={"summary": save(gpt2(), "b")})["summary"]
    text, *_ = read(reward, task.fill("x" * 600), "Lost.")
    assert text == ("Lost. <s> " + "x" * 600)[: 512 + len("<s>") - 1]
    reward = task.rewards(["faithful"], sources={"faithful": save(bart(2), "c")})["faithful"]
    text, *_ = read(reward, task.fill("x" * 600), "Lost.")
    assert text == f"<s>Lost.</s></s>{'x' * (512 - 4 - 5)}</s>"


# -- Safe-RLHF's score models ---


def test_a_score_model_scores_the_last_token(save):
    model = ScoreModel.from_pretrained(save(llama(ScoreModel))).eval()
    ids = torch.tensor([[1, 5, 6, 7], [1, 8, 0, 0]])
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    with torch.no_grad():
        scores = model(input_ids=ids, attention_mask=mask).logits
        for row, length in enumerate((4, 2)):
            hidden = model.model(input_ids=ids[row : row + 1, :length]).last_hidden_state[0, -1]
            expected = hidden @ model.score_head.weight[0] + model.score_head.bias
            torch.testing.assert_close(scores[row], expected, atol=1e-5, rtol=0)


def test_published_score_checkpoints(save):
    """A head with or without a bias, and statistics of training that are not used."""
    path = save(llama(ScoreModel))
    tensors = load_file(path / "model.safetensors")
    with_bias = recipes.get("beavertails").rewards(["reward"], sources={"reward": path})["reward"]
    bias = tensors.pop("score_head.bias")
    tensors |= {"normalizer.mean": torch.ones(1), "normalizer.var": torch.ones(1)}
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    without = recipes.get("beavertails").rewards(["reward"], sources={"reward": path})["reward"]
    # Loaded only now, so both have no bias; the first is given it back.
    with_bias._loaded().model.score_head.bias.data.copy_(bias)
    difference = with_bias([DIALOGUE], ["Yes."]) - without([DIALOGUE], ["Yes."])
    torch.testing.assert_close(difference, bias[None], atol=1e-5, rtol=0)
    del tensors["score_head.weight"]
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    broken = recipes.get("beavertails").rewards(["reward"], sources={"reward": path})["reward"]
    with pytest.raises(RewardError, match=r"is no reward model of this kind: it does not hold \['score_head.weight'\]"):
        broken([DIALOGUE], ["Yes."])


def test_normalised_scores_are_refused():
    config = LlamaConfig(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
    config.do_normalize = True
    with pytest.raises(RewardError, match="do_normalize"):
        ScoreModel(config)


# -- mistakes ---


def test_mistakes(save, tmp_path):
    recipe = recipes.get("helpful-assistant")
    with pytest.raises(RewardError, match=r"no objective 'funny'; it has \['helpful', 'harmless', 'humor'\]"):
        recipe.rewards(["funny"])
    with pytest.raises(RewardError, match="no objective 'funny'"):
        recipe.rewards(sources={"funny": tmp_path})
    with pytest.raises(RewardError, match=r"the rewards \['math'\] of 'math' are functions"):
        recipes.get("math").rewards(sources={"math": tmp_path})
    reward = recipe.rewards(["helpful"], sources={"helpful": save(gpt2())})["helpful"]
    with pytest.raises(RewardError, match=r"take prompts from Recipe\.load_prompts"):
        reward(["Why?"], ["Because."])
    missing = recipe.rewards(["humor"], sources={"humor": tmp_path / "nowhere"})["humor"]
    with pytest.raises(RewardError, match=r"cannot load the reward model .*nowhere"):
        missing([DIALOGUE], ["Ha."])
    one = recipe.rewards(["humor"], sources={"humor": save(distilbert(1), "one")})["humor"]
    with pytest.raises(RewardError, match=r"cannot load the reward model .*one"):
        one([DIALOGUE], ["Ha."])
    model, _ = gpt2()
    silent = save((model, tokenizer(bos_token=None)), "silent")
    summary = recipes.get("reddit-summary").rewards(["summary"], sources={"summary": silent})["summary"]
    with pytest.raises(RewardError, match="has no bos_token"):
        summary([SUMMARISE], ["Lost."])
