from __future__ import annotations

import json
from functools import partial

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import peft_hoe
from peft_hoe.errors import HoEError, PreferenceError, RewardError
from peft_hoe.objectives import RewardNormalizer

pytest.importorskip("trl")

from peft_hoe.policies import single_objective, train_policy
from peft_hoe.policies.scores import Scores
from peft_hoe.policies.single_objective import policy_gradient_config

PROMPTS = [{"prompt": f"w{i} w{i + 1}", "row": i} for i in range(8)]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A Llama that says 28 words at random; word w<i> is token i + 4."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit

    words = ["<pad>", "<s>", "</s>", "<unk>", *(f"w{i}" for i in range(28))]
    core = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>",
        padding_side="left", clean_up_tokenization_spaces=False,
    )  # fmt: skip
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=64, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("base")
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def share(text, words):
    found = text.split()
    return sum(word in words for word in found) / len(found) if found else 0.0


def low(prompts, completions):
    return [share(text, {f"w{i}" for i in range(14)}) for text in completions]


def high(prompts, completions):
    return [share(text, {f"w{i}" for i in range(14, 28)}) for text in completions]


def config(folder, **changes):
    settings = {
        "prompts": 4, "samples": 8, "max_steps": 2, "max_completion_length": 6, "learning_rate": 1e-2, "beta": 0.01,
        "use_cpu": True, "logging_steps": 1, "disable_tqdm": True,
    }  # fmt: skip
    return policy_gradient_config(folder, **{**settings, **changes})


def train(base, folder, preference, rewards=None, dataset=PROMPTS, changes=None, **others):
    args = config(folder, **(changes or {}))
    return train_policy(
        base,
        args,
        rewards=rewards or {"low": low, "high": high},
        preference=preference,
        train_dataset=dataset,
        **others,
    )


def test_padding_that_trl_would_look_up_is_refused(base, tmp_path):
    """A padding token that was added to the tokenizer alone was an IndexError in the first update."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    with pytest.raises(HoEError, match=r"'\[PAD\]' is token 32, for which the model has no embedding"):
        train(base, tmp_path / "low", [1, 0], processing_class=tokenizer)


def test_a_loaded_model_and_another_peft_config_are_told(base, tmp_path):
    """A HoEConfig trained nothing: its experts do not train, which was torch's error at the first update."""
    with pytest.raises(HoEError, match=r"base is a LlamaForCausalLM; name its directory"):
        train(AutoModelForCausalLM.from_pretrained(base), tmp_path / "low", [1, 0])
    experts = peft_hoe.HoEConfig(objectives=["low", "high"], target_modules="all-linear")
    for given in (experts, "adapter"):
        with pytest.raises(HoEError, match=r"peft_config is a .*; give a LoraConfig, .*build_adapter"):
            train(base, tmp_path / "low", [1, 0], peft_config=given)


def means(log, name):
    return [entry[f"rewards/{name}/mean"] for entry in log if f"rewards/{name}/mean" in entry]


def same_weights(first, second):
    first, second = (load_file(folder / "model.safetensors") for folder in (first, second))
    return all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.slow
@pytest.mark.filterwarnings(
    "ignore:policy .* is farther from the base than:peft_hoe.errors.HoEWarning"
)  # random weights
def test_the_reward_of_the_preference_improves_and_the_folder_is_a_policy(base, tmp_path):
    log = train(base, tmp_path / "low", [1, 0], changes={"max_steps": 15})
    rewards = means(log, "low")
    assert len(rewards) == 15
    assert np.mean(rewards[:3]) < 0.6  # the base says both kinds of words equally often
    assert np.mean(rewards[-3:]) > 0.8
    assert AutoTokenizer.from_pretrained(tmp_path / "low").pad_token == "<pad>"
    assert [path.name for path in tmp_path.iterdir()] == ["low"]
    train(base, tmp_path / "high", {"high": 1}, changes={"max_steps": 15})
    peft_hoe.build_adapter(
        base, {"low": tmp_path / "low", "high": tmp_path / "high"}, tmp_path / "adapter", progress=False
    )
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "adapter").eval()
    tokenizer = AutoTokenizer.from_pretrained(base, padding_side="left")
    batch = tokenizer([row["prompt"] for row in PROMPTS], return_tensors="pt", padding=True)
    means_of_low = []
    for corner in ([1, 0], [0, 1]):
        ids = model.generate(
            input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], max_new_tokens=6, do_sample=False,
            preference=corner,
        )  # fmt: skip
        means_of_low.append(np.mean(low([], tokenizer.batch_decode(ids[:, 2:]))))
    assert means_of_low[0] > means_of_low[1]


def test_a_one_hot_preference_trains_as_the_reward_alone_does(base, tmp_path):
    train(base, tmp_path / "both", [0, 1])
    train(base, tmp_path / "alone", [1], {"high": high})
    assert same_weights(tmp_path / "both", tmp_path / "alone")
    assert not same_weights(tmp_path / "both", base)


@pytest.mark.slow
def test_the_seed_decides(base, tmp_path):
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        train(base, tmp_path / name, [0.5, 0.5], changes={"seed": seed})
    assert same_weights(tmp_path / "a", tmp_path / "b")
    assert not same_weights(tmp_path / "a", tmp_path / "c")


def test_the_weighted_sum_is_of_normalised_rewards(base, tmp_path):
    scale = RewardNormalizer([[0.75, 0.2], [0.25, 0.6]], ["low", "high"])
    seen = []

    def scored(prompts, completions):
        seen.append(np.mean(low(prompts, completions)))
        return low(prompts, completions)

    log = train(base, tmp_path / "policy", [0.25, 0.75], {"low": scored, "high": high}, normalizer=scale)
    assert means(log, "low") == pytest.approx([(value - 0.25) / 0.5 for value in seen], abs=1e-6)
    weighted = 0.25 * np.array(means(log, "low")) + 0.75 * np.array(means(log, "high"))
    assert [entry["reward"] for entry in log if "reward" in entry] == pytest.approx(weighted.tolist(), abs=1e-6)


def test_the_first_update_is_the_policy_gradient_with_the_group_baseline(base, tmp_path, monkeypatch):
    """On the samples of the run, SGD moves the base by the gradient of mean_b (R_b - mean of the group) log pi(y_b) / T."""
    batches = []

    class Recorder(Scores):
        def _score(self, prompts, completions, **others):
            table = super()._score(prompts, completions, **others)
            batches.append((prompts, others["completion_ids"], table))
            return table

    monkeypatch.setattr(single_objective, "Scores", Recorder)
    rate = 0.5
    changes = {"max_steps": 1, "beta": 0.0, "optim": "sgd", "learning_rate": rate, "max_grad_norm": 0.0}
    train(base, tmp_path / "policy", [0.25, 0.75], changes=changes)
    ((prompts, ids, table),) = batches
    model = AutoModelForCausalLM.from_pretrained(base)
    tokenizer = AutoTokenizer.from_pretrained(base)
    rewards = torch.tensor(table @ [0.25, 0.75]).view(-1, 8)
    advantages = (rewards - rewards.mean(1, keepdim=True)).flatten()
    objective = torch.zeros(())
    for prompt, completion, advantage in zip(prompts, ids, advantages, strict=True):
        start = tokenizer(prompt)["input_ids"]
        logps = model(torch.tensor([start + completion])).logits[0, len(start) - 1 : -1].log_softmax(-1)
        chosen = logps[torch.arange(len(completion)), torch.tensor(completion)].sum()
        objective = objective + advantage * chosen / (len(ids) * 6)
    objective.backward()
    trained = AutoModelForCausalLM.from_pretrained(tmp_path / "policy")
    for (name, before), after in zip(model.named_parameters(), trained.parameters(), strict=True):
        torch.testing.assert_close(after - before, rate * before.grad.float(), rtol=1e-3, atol=1e-6, msg=name)


def test_stop_strings_end_completions_and_rewards_read_what_comes_before(base, tmp_path, monkeypatch):
    """From the same seed each completion is that of the run without them, up to the token that completes one."""
    batches = []

    class Recorder(Scores):
        def _score(self, prompts, completions, **others):
            batches.append((completions, others["completion_ids"]))
            return super()._score(prompts, completions, **others)

    monkeypatch.setattr(single_objective, "Scores", Recorder)
    stops, changes = [" w2", " w7"], {"max_steps": 1, "max_completion_length": 8}  # also w20 and the like
    train(base, tmp_path / "free", [1, 0], changes=changes)
    train(base, tmp_path / "stopped", [1, 0], changes=changes, stop_strings=stops)
    (_, free), (texts, stopped) = batches
    decode = partial(AutoTokenizer.from_pretrained(base).decode, skip_special_tokens=True)
    ended = 0
    for text, with_stops, without in zip(texts, stopped, free, strict=True):
        said = decode(without)
        places = [said.find(stop) for stop in stops if stop in said]
        assert with_stops == without[: len(with_stops)]
        assert text == said[: min(places, default=len(said))]
        ended += bool(places)
        if places:
            assert any(word in decode(with_stops) for word in stops)
            assert not any(word in decode(with_stops[:-1]) for word in stops)
        else:
            assert with_stops == without
    assert 0 < ended < len(texts)


def test_generation_itself_ends_with_the_last_row(base, tmp_path, monkeypatch):
    """It is not merely cut: there are as many forwards as tokens in the longest completion."""
    without_gradient = []
    forward = LlamaForCausalLM.forward

    def counted(self, *args, **kwargs):
        without_gradient.append(not torch.is_grad_enabled())
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(LlamaForCausalLM, "forward", counted)
    log = train(base, tmp_path / "policy", [1, 0], changes={"max_steps": 1, "beta": 0.0}, stop_strings=["w"])
    assert sum(without_gradient) == log[0]["completions/max_length"] < 6


def test_rewards_get_texts_and_the_columns_of_the_dataset_once(base, tmp_path):
    calls = []

    def both(prompts, completions, **columns):
        calls.append((prompts, completions, columns))
        return [[1.0, 2.0]] * len(completions)

    train(base, tmp_path / "policy", [0.5, 0.5], {("low", "high"): both}, changes={"max_steps": 1})
    ((prompts, completions, columns),) = calls
    assert len(prompts) == 32
    assert all(isinstance(text, str) for text in completions)
    assert list(columns) == ["row"]
    assert prompts == [f"w{i} w{i + 1}" for i in columns["row"]]


def test_a_completion_without_a_reward_that_counts_is_left_out():
    scores = Scores({"low": lambda p, c: [1.0, None, 3.0], "high": lambda p, c: [4.0, 5.0, None]}, [1, 0], None, None)
    texts = ["a", "b", "c"]
    functions = scores.functions()
    assert [function.__name__ for function in functions] == ["low", "high"]
    first, second = (function(prompts=texts, completions=texts) for function in functions)
    assert np.array_equal(first, [1.0, np.nan, 3.0], equal_nan=True)
    assert np.array_equal(second, [4.0, np.nan, np.nan], equal_nan=True)  # the second is out, the third has what counts
    chat = [[{"role": "assistant", "content": text}] for text in texts]
    echo = Scores([lambda prompts, completions: [float(ord(text)) for text in completions]], [1], ["o"], None)
    assert echo.functions()[0](prompts=texts, completions=chat) == [97.0, 98.0, 99.0]


@pytest.mark.slow
def test_two_tasks_in_one_dataset_train(base, tmp_path):
    """Each reward scores the prompts of its own task, and updates of one prompt have no number for the other objective."""

    def of_task(task, reward):
        def score(prompts, completions, row):
            return [
                value if number % 2 == task else None
                for number, value in zip(row, reward(prompts, completions), strict=True)
            ]

        return score

    rewards = {"low": of_task(0, low), "high": of_task(1, high)}
    log = train(
        base, tmp_path / "both", [0.5, 0.5], rewards, changes={"prompts": 1, "max_steps": 4, "learning_rate": 1e-2}
    )
    assert all(entry["grad_norm"] > 0 for entry in log if "grad_norm" in entry)
    assert not same_weights(tmp_path / "both", base)
    train(base, tmp_path / "low", [1, 0], {"low": low, "high": lambda prompts, completions: [None] * len(completions)})
    with pytest.raises(
        RewardError, match=r"the rewards of \['low'\] returned no number for any of .* leave prompts out"
    ):
        train(base, tmp_path / "none", [1, 0], rewards, changes={"prompts": 1, "max_steps": 8})


def test_what_no_completion_of_a_prompt_has_leaves_none_out():
    table = np.array([[1, None, 3, None, 5, None], [None, None, 1, 2, None, None]], dtype=float)
    rewards = {"low": lambda p, c: table[0].tolist(), "high": lambda p, c: table[1].tolist()}
    scores = Scores(rewards, [0.5, 0.5], None, None)
    prompts = ["a", "a", "b", "b", "a", "c"]
    found = [function(prompts=prompts, completions=list("uvwxyz")) for function in scores.functions()]
    # "a" is of the first task alone, where its second completion has nothing; the second one of "b" lacks what the first has.
    expected = [[1, np.nan, 3, np.nan, 5, np.nan], [np.nan, np.nan, 1, np.nan, np.nan, np.nan]]
    np.testing.assert_array_equal(np.array(found, dtype=float), expected)


def test_a_lora_policy_is_an_adapter_that_a_build_takes(base, tmp_path):
    lora = LoraConfig(r=2, lora_alpha=2, target_modules="all-linear", task_type="CAUSAL_LM")
    train(base, tmp_path / "lora", [1, 0], peft_config=lora)
    settings = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    assert settings["r"] == 2
    assert settings["base_model_name_or_path"] == str(base)
    report = peft_hoe.build_adapter(base, {"low": tmp_path / "lora"}, tmp_path / "adapter", progress=False)
    assert {found.rank for module in report.modules.values() for found in module.values()} == {2}


def test_nothing_is_overwritten_and_nothing_is_loaded_before_that_is_known(base, tmp_path):
    (tmp_path / "policy").mkdir()
    (tmp_path / "policy" / "mine.txt").write_text("keep")
    with pytest.raises(HoEError, match=r"policy exists and is not an empty folder; name another output_dir"):
        train("no such model", tmp_path / "policy", [1, 0])
    assert [path.name for path in (tmp_path / "policy").iterdir()] == ["mine.txt"]


def test_an_interrupted_run_leaves_an_empty_folder_at_most(base, tmp_path):
    def fails(prompts, completions):
        raise RuntimeError("no more")

    with pytest.raises(RewardError, match="reward 'low' raised RuntimeError: no more"):
        train(base, tmp_path / "policy", [1], {"low": fails})
    assert not (tmp_path / "policy").exists() or not any((tmp_path / "policy").iterdir())
    train(
        base, tmp_path / "policy", [1], {"low": low}, changes={"max_steps": 1}
    )  # the same folder, once it is repaired


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"preference": [0.5, 0.6]}, PreferenceError, "sums to 1.1"),
        ({"preference": {"mid": 1}}, PreferenceError, r"names \['mid'\]"),
        ({"rewards": [low, high]}, RewardError, "the objectives have no names"),
        ({"rewards": {"low": 3, "high": high}}, RewardError, r"the reward of \['low'\] is 3"),
        (
            {"normalizer": RewardNormalizer([[1, 0], [0, 1]], ["high", "low"]), "objectives": ["low", "high"]},
            RewardError,
            r"the normalizer is for \['high', 'low'\], but the rewards are for \['low', 'high'\]",
        ),
        ({"dataset": []}, HoEError, "the training dataset is empty"),
        ({"dataset": [{"text": "w1"}]}, HoEError, "holds no prompts"),
        ({"dataset": [{"input_ids": [4, 5]}]}, HoEError, "GRPOTrainer needs `prompt`"),
        ({"changes": {"reward_weights": [1.0, 2.0]}}, HoEError, r"reward_weights is \[1.0, 2.0\]; leave it out"),
        (
            {"changes": {"generation_kwargs": {"stop_strings": ["w2"]}}},
            HoEError,
            r"say train_policy\(..., stop_strings=\)",
        ),
        (
            {"changes": {"mask_truncated_completions": True}, "stop_strings": ["w2"]},
            HoEError,
            "mask_truncated_completions=True with stop_strings is not supported",
        ),
        ({"stop_strings": [""]}, HoEError, "stop_strings"),
        ({"changes": {"samples": 1}}, HoEError, "4 prompts and 1 samples"),
    ],
)
def test_bad_input_is_named(base, tmp_path, changes, error, message):
    with pytest.raises(error, match=message):
        train(base, tmp_path / "policy", **{"preference": [1, 0], **changes})


def test_args_must_be_a_grpo_config(base, tmp_path):
    with pytest.raises(HoEError, match="args is a dict; use policy_gradient_config"):
        train_policy(base, {}, rewards={"low": low}, preference=[1], train_dataset=PROMPTS)
