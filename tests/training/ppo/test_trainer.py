from __future__ import annotations

import contextlib
import importlib.util
import inspect
import re
import signal
import threading
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from transformers import GenerationConfig, LlamaForSequenceClassification, TrainerCallback

import peft_hoe
from peft_hoe import ExpertError, HoEConfig, HoEError, HoEWarning, PreferenceError
from peft_hoe.generation.prompt_rows import drawn_rows
from peft_hoe.rewards import ClassifierReward, Rewards
from peft_hoe.training.run.steered_policy import steered
from peft_hoe.training.trl_versions import trl_ppo

Make = Callable[..., Any]


# -- what trains ---


def test_only_the_router_and_the_critic_move(make_trainer: Make, toys: ModuleType) -> None:
    """Weight decay 0.1, a second router with weights, and an optimizer whose momentum is warm: nothing else moves by a bit."""
    model = toys.make_policy()
    router_parameters = [parameter for name, parameter in model.named_parameters() if "hoe_router" in name]
    for parameter in router_parameters:
        parameter.data += torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3))
    optimizer = torch.optim.AdamW(router_parameters, lr=0.05, weight_decay=0.1)
    sum((parameter**2).sum() for parameter in router_parameters).backward()
    optimizer.step()  # both routers now have momentum
    before, other, own = toys.snapshot(model), toys.rows_of(model, "r1"), toys.rows_of(model, "r0")
    trainer = make_trainer(model=model, constructor={"optimizers": (optimizer, None)}, weight_decay=0.1)
    critic = toys.snapshot(trainer.ppo.critic)
    trainer.train()
    after = toys.snapshot(model)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before if "hoe_router" not in name)
    assert all(torch.equal(x, y) for x, y in zip(other, toys.rows_of(model, "r1"), strict=True))
    assert not any(torch.equal(x, y) for x, y in zip(own, toys.rows_of(model, "r0"), strict=True))
    assert not torch.equal(critic["heads.weight"], trainer.ppo.critic.heads.weight)


def test_own_optimizer_holds_router_and_critic_only(make_trainer: Make) -> None:
    trainer = make_trainer(weight_decay=0.1, value_learning_rate=0.5)
    held = {id(parameter) for group in trainer.optimizer.param_groups for parameter in group["params"]}
    assert held == {
        id(parameter) for module in (trainer.router, trainer.ppo.critic) for parameter in module.parameters()
    }
    assert [group["weight_decay"] for group in trainer.optimizer.param_groups] == [0.1, 0.0, 0.0]
    assert trainer.optimizer.param_groups[2]["initial_lr"] == 0.5


@pytest.mark.parametrize(
    ("own", "given", "expected"), [(False, None, 1e-3), (True, None, 0.05), (False, 0.2, 0.2), (True, 0.2, 0.2)]
)
def test_learning_rate_of_the_critic(
    make_trainer: Make, toys: ModuleType, own: bool, given: float | None, expected: float
) -> None:
    """Heads learn at a rate of their own; a user's value model at learning_rate, as PPOTrainer has it."""
    value_model = LlamaForSequenceClassification(toys.make_base().config) if own else None
    trainer = make_trainer(constructor={"value_model": value_model}, learning_rate=0.05, value_learning_rate=given)
    rates = [group["initial_lr"] for group in trainer.optimizer.param_groups]
    assert rates == [0.05, 0.05, expected]


def test_preference_marks_and_gradients_are_restored(make_trainer: Make, toys: ModuleType) -> None:
    model = toys.make_policy()
    model.set_preference([0.6, 0.4])
    model.get_base_model().generation_config.eos_token_id = 2
    trains = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    seen = []

    class Look(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            seen.append(
                (dict(model.preference), toys.is_trained(model), any(p.requires_grad for p in model.parameters()))
            )

    trainer = make_trainer(model=model, constructor={"callbacks": [Look()]})
    assert trains == {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    trainer.train()
    assert seen == [({"low": 0.25, "high": 0.75}, True, False)] * 2
    assert dict(model.preference) == {"low": 0.6, "high": 0.4}
    assert model.peft_config["default"].default_preference == [0.6, 0.4]
    assert toys.is_trained(model)
    assert not toys.is_trained(model, "r1")
    assert not model.training
    assert model.get_base_model().generation_config.eos_token_id == 2
    assert trains == {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    assert not any(module.trained_rows for module in model.modules() if isinstance(module, peft_hoe.HoELayer))


def test_every_module_gets_its_own_mode_back(make_trainer: Make, toys: ModuleType) -> None:
    """A user who trains with a part in evaluation mode, such as frozen layers, finds it so."""
    model = toys.make_policy().train()
    model.get_base_model().model.layers[0].eval()
    before = {name: module.training for name, module in model.named_modules()}
    assert len(set(before.values())) == 2
    make_trainer(model=model, max_steps=1).train()
    assert {name: module.training for name, module in model.named_modules()} == before


@pytest.mark.parametrize(("after", "trained"), [(0, False), (1, True)])
def test_an_exception_restores_and_keeps_whole_updates(
    make_trainer: Make, toys: ModuleType, after: int, trained: bool
) -> None:
    model = toys.make_policy()
    own = toys.rows_of(model, "r0")

    def broken(prompts: Any, completions: Any) -> list[float]:
        raise RuntimeError("no reward")

    rewards = toys.REWARDS if after else {"low": broken, "high": toys.high}
    trainer = make_trainer(model=model, constructor={"callbacks": [toys.Raise(after)], "reward_model": rewards})
    with pytest.raises((RuntimeError, HoEError), match=r"stop here|no reward"):
        trainer.train()
    assert dict(model.preference) == {"low": 0.5, "high": 0.5}
    assert toys.is_trained(model) is trained
    assert all(torch.equal(x, y) for x, y in zip(own, toys.rows_of(model, "r0"), strict=True)) is not trained


def test_training_starts_from_the_static_votes(make_trainer: Make) -> None:
    """The first rollout comes from the interpolation that an untrained router gives, up to 1e-3."""
    trainer = make_trainer(max_steps=1, kl_coef=0.05, kl_reference="static")
    trainer.train()
    first = trainer.state.log_history[0]
    assert first["router/usage/centroid"] == pytest.approx(0.5, abs=1e-3)
    assert first["router/entropy"] == pytest.approx(np.log(2), abs=1e-3)
    assert first["objective/kl"] == pytest.approx(0.0, abs=1e-4)


# -- learning ---


def test_reward_improves(make_trainer: Make) -> None:
    trainer = make_trainer(
        max_steps=25, per_device_train_batch_size=64, response_length=10, kl_coef=0.0, seed=1, beta=0.1, step=0.0,
        constructor={"reward_model": {"low": lambda prompts, completions: [0.0, 0.1] * (len(completions) // 2), "high": _w20}},
    )  # fmt: skip
    trainer.train()
    rewards = [entry["reward/high"] for entry in trainer.state.log_history if "reward/high" in entry]
    assert np.mean(rewards[-5:]) > np.mean(rewards[:3]) + 0.02


def _w20(prompts: Any, completions: list[str]) -> list[float]:
    return [sum(word in ("w20", "w21", "w22", "w23") for word in text.split()) / 10 for text in completions]


def test_everything_is_logged_through_callbacks(make_trainer: Make) -> None:
    logged: list[dict[str, float]] = []

    class Log(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            logged.append(dict(logs))

    make_trainer(constructor={"callbacks": [Log()]}, kl_coef=0.05).train()
    per_objective = ("reward", "reward_normalized", "weight", "advantage_weight", "gap")
    expected = {f"{column}/{name}" for column in per_objective for name in ("low", "high")}
    expected |= {"loss/value_avg", "loss/policy_avg", "objective/kl", "policy/entropy_avg", "policy/clipfrac_avg"}
    expected |= {
        "router/entropy",
        "router/usage/high",
        "router/usage/centroid",
        "lr",
        "episode",
        "val/ratio",
        "val/ratio_var",
    }
    trl = trl_ppo()
    if trl is not None:  # all that a dashboard for PPOTrainer shows
        expected |= set(re.findall(r'metrics\["(.+?)"\]', inspect.getsource(trl.PPOTrainer.train)))
    assert len(logged) == 2
    assert all(expected <= entry.keys() for entry in logged)
    assert all(np.isfinite(list(entry.values())).all() for entry in logged)
    assert logged[0]["advantage_weight/low"] + logged[0]["advantage_weight/high"] == pytest.approx(1.0)
    scores = sum(
        logged[0][f"advantage_weight/{name}"] * logged[0][f"reward_normalized/{name}"] for name in ("low", "high")
    )
    assert logged[0]["objective/scores"] == pytest.approx(scores)
    assert logged[0]["objective/non_score_reward"] == pytest.approx(-0.05 * logged[0]["objective/kl"])
    assert logged[0]["objective/rlhf_reward"] == pytest.approx(scores - 0.05 * logged[0]["objective/kl"])
    assert logged[0]["gap/low"] == pytest.approx(0.25 * (1.05 - logged[0]["reward_normalized/low"]))


def test_without_a_kl_term_no_divergence_is_logged(make_trainer: Make) -> None:
    """Nothing was measured, so that nothing may read as if it were 0; the term itself takes nothing from a reward."""
    logged = []
    for coefficient in (0.05, 0.0):
        trainer = make_trainer(max_steps=1, kl_coef=coefficient)
        trainer.train()
        logged.append(trainer.state.log_history[0])
    held, free = logged
    assert held.keys() - free.keys() == {"objective/kl", "loss/kl_avg"}
    assert str(free["objective/non_score_reward"]) == "0.0"  # and not -0.0
    assert free["objective/rlhf_reward"] == free["objective/scores"]


def test_counts_and_penalties_of_the_end(make_trainer: Make) -> None:
    """Without a stop token texts run on, and every end-of-sequence token in them counts; with one, what is missing is paid."""
    trainer = make_trainer(max_steps=1, response_length=20)
    seen: list[Any] = []
    score = trainer.ppo.score
    trainer.ppo.score = lambda rollout: (seen.append(rollout), score(rollout))[1]
    trainer.train()
    count = int((seen[0].responses.ids == 2).sum())
    assert count > 0
    assert trainer.state.log_history[0]["val/num_eos_tokens"] == count
    trainer = make_trainer(max_steps=1, stop_token="eos", missing_eos_penalty=2.0)
    trainer.train()
    logged = trainer.state.log_history[0]
    scores = sum(logged[f"advantage_weight/{name}"] * logged[f"reward_normalized/{name}"] for name in ("low", "high"))
    assert 0 < logged["completion/ended"] < 1
    assert logged["objective/scores"] == pytest.approx(scores - 2.0 * (1 - logged["completion/ended"]))


def test_payoff_table_is_measured_when_none_is_given(make_trainer: Make) -> None:
    trainer = make_trainer(constructor={"normalizer": None}, max_steps=1, payoff_prompts=20, response_length=16)
    trainer.train()
    assert trainer.normalizer.decoding["max_new_tokens"] == 16
    assert trainer.normalizer.measurement["prompts"] == 20
    logged = trainer.state.log_history[0]
    errors = trainer.normalizer.errors([logged["reward_normalized/low"], logged["reward_normalized/high"]])
    assert [logged["gap_error/low"], logged["gap_error/high"]] == pytest.approx([0.25 * errors[0], 0.75 * errors[1]])


@pytest.mark.parametrize("bf16", [False, True])
def test_payoff_is_measured_on_the_runs_own_decoding(make_trainer: Make, toys: ModuleType, bf16: bool) -> None:
    """No stop token, prompts whose special tokens would be lost in decoding, autocast; not what a checkpoint brings along."""
    seen: list[list[str]] = []

    def low(prompts: Any, completions: Any) -> list[float]:
        seen.append(list(completions))
        return toys.low(prompts, completions)

    rows = [{"input_ids": [1, 3, 2, 4 + i, 1]} for i in range(10)]
    model = toys.make_policy()
    base = model.get_base_model()
    trainer = make_trainer(
        model=model, response_length=16, payoff_prompts=10, local_rollout_forward_batch_size=6, temperature=0.9, bf16=bf16,
        seed=3, constructor={"normalizer": None, "train_dataset": rows, "reward_model": {"low": low, "high": toys.high}},
    )  # fmt: skip
    own = GenerationConfig(repetition_penalty=5.0, eos_token_id=2, pad_token_id=0, top_k=2)
    base.generation_config = own
    table = trainer.measure_payoff()
    assert base.generation_config is own

    settings = GenerationConfig(
        max_new_tokens=16, do_sample=True, temperature=0.9, top_k=0, top_p=1.0, pad_token_id=0
    )  # fmt: skip
    base.generation_config = settings
    ids = torch.tensor([row["input_ids"] for row in rows]).repeat_interleave(2, 0)
    corners = torch.eye(2).repeat(10, 1)
    torch.manual_seed(3)
    tokens = []
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
        for start in range(0, 20, 6):
            preference = corners[start : start + 6].tolist()
            tokens.append(
                model.generate(ids[start : start + 6], generation_config=settings, preference=preference)[:, 5:]
            )
    answers = torch.cat(tokens)
    assert answers.shape == (20, 16)
    assert (answers[:, :-1] == 2).any()  # some responses go on after an end-of-sequence token
    texts = toys.make_tokenizer().batch_decode(answers, skip_special_tokens=True)
    assert seen == [texts[0::2], texts[1::2]]
    assert table.payoff[0, 0] == pytest.approx(np.mean(toys.low([], texts[0::2])))
    assert table.decoding["stop_tokens"] == []
    assert table.measurement.get("bf16", False) is bf16


# -- evaluation ---


def test_evaluation_measures_and_changes_nothing(make_trainer: Make, toys: ModuleType) -> None:
    """Before training at the static votes; the same numbers twice; random numbers, weights and preference are untouched."""
    model = toys.make_policy()
    trainer = make_trainer(model=model, constructor={"eval_dataset": {"a": toys.PROMPTS[:5], "b": toys.PROMPTS[5:9]}})
    torch.manual_seed(3)
    before, weights, preference = torch.get_rng_state(), trainer.weights.log_w.tolist(), dict(model.preference)
    first, second = trainer.evaluate(), trainer.evaluate()
    assert first == second
    assert torch.equal(before, torch.get_rng_state())
    assert trainer.weights.log_w.tolist() == weights
    assert dict(model.preference) == preference
    assert {"eval_a_reward/low", "eval_b_reward_normalized/high", "eval_a_completion/ended"} <= first.keys()
    one = trainer.evaluate(toys.PROMPTS[:5], metric_key_prefix="test")
    assert one["test_reward/low"] == pytest.approx(first["eval_a_reward/low"])
    expected = trainer.weights.u @ [one["test_reward_normalized/low"], one["test_reward_normalized/high"]]
    assert one["test_objective/scores"] == pytest.approx(expected)
    with pytest.raises(HoEError, match="nothing to evaluate on"):
        make_trainer().evaluate()


# -- what a PPO script passes ---


def test_a_value_model_that_is_another_model_too_is_refused(make_trainer: Make, toys: ModuleType) -> None:
    """It trains: the rewards, or the policy's base, would have moved with it."""
    model, scorer = toys.make_policy(), LlamaForSequenceClassification(toys.make_base().config)  # of two outputs
    with pytest.raises(HoEError, match="value_model holds parameters of the reward model, and it trains"):
        make_trainer(constructor={"reward_model": scorer, "value_model": scorer})
    scorer.model = model.get_base_model().model
    with pytest.raises(HoEError, match="value_model holds parameters of the policy"):
        make_trainer(model=model, constructor={"value_model": scorer})


def test_value_model_with_one_output_is_copied(make_trainer: Make, toys: ModuleType) -> None:
    value_model = LlamaForSequenceClassification(toys.make_base().config)
    config = value_model.config
    config.num_labels = 1
    value_model = LlamaForSequenceClassification(config)
    trainer = make_trainer(constructor={"value_model": value_model}, max_steps=1)
    weight = trainer.ppo.critic.score.weight
    assert weight.shape[0] == 2
    assert torch.equal(weight[0], weight[1])
    trainer.train()
    assert not torch.equal(trainer.ppo.critic.score.weight[0], trainer.ppo.critic.score.weight[1])
    config.num_labels = 3
    with pytest.raises(HoEError, match="3 outputs"):
        make_trainer(constructor={"value_model": LlamaForSequenceClassification(config)})


def test_peft_config_collator_eval_dataset_and_columns(make_trainer: Make, toys: ModuleType, capsys: Any) -> None:
    tokenizer = toys.make_tokenizer()
    seen: list[Any] = []

    def reward(prompts: Any, completions: Any, tag: Any = None, **columns: Any) -> list[float]:
        seen.append((list(prompts), list(tag)))
        return toys.low(prompts, completions)

    def collate(rows: Any) -> dict[str, Any]:
        batch = tokenizer.pad({"input_ids": [row["input_ids"] for row in rows]}, return_tensors="pt")
        return {**batch, "tag": [row["tag"] for row in rows]}

    rows = [{"input_ids": tokenizer(row["prompt"])["input_ids"], "tag": i} for i, row in enumerate(toys.PROMPTS)]
    config = HoEConfig(
        objectives=["low", "high"], routers=[[0.25, 0.75]], r=4, target_modules="all-linear", task_type="CAUSAL_LM",
        init_weights=False,
    )  # fmt: skip
    trainer = make_trainer(
        model=toys.make_base(),
        constructor={
            "peft_config": config,
            "train_dataset": rows,
            "eval_dataset": rows[:4],
            "data_collator": collate,
            "reward_model": [reward, toys.high],
        },
        max_steps=1,
        num_sample_generations=1,
    )
    trainer.train()
    prompts, tags = seen[0]
    assert [toys.PROMPTS[tag]["prompt"] for tag in tags] == prompts
    if importlib.util.find_spec("rich") is not None:
        assert "model response" in capsys.readouterr().out


def test_chat_prompts_go_through_the_template(make_trainer: Make, toys: ModuleType) -> None:
    tokenizer = toys.make_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}w1 {{ m['content'] }} {% endfor %}{% if add_generation_prompt %}w2{% endif %}"
    )
    chats = [{"prompt": [{"role": "user", "content": f"w{i}"}]} for i in range(8)]
    trainer = make_trainer(constructor={"train_dataset": chats, "processing_class": tokenizer})
    batch = trainer.data_collator(chats[5:6])
    assert tokenizer.decode(batch["input_ids"][0]) == "w1 w5 w2"
    with pytest.warns(HoEWarning, match="plain strings"):
        make_trainer(constructor={"processing_class": tokenizer})


@pytest.mark.parametrize("own_collator", [False, True])
def test_a_classifier_sees_chat_messages_in_its_own_template(
    make_trainer: Make, toys: ModuleType, monkeypatch: pytest.MonkeyPatch, own_collator: bool
) -> None:
    """In rollouts and in the payoff table; where a user's collator drops the messages, the decoded text is all there is."""
    texts: list[str] = []

    def logits(self: Any, some: list[str], special_tokens: bool) -> torch.Tensor:
        assert special_tokens is own_collator  # a chat template writes its own
        texts.extend(some)
        return len(texts) + torch.arange(2.0 * len(some)).reshape(-1, 2)

    monkeypatch.setattr(ClassifierReward, "_logits", logits)
    policys, classifiers = toys.make_tokenizer(), toys.make_tokenizer()
    policys.chat_template = "{% for m in messages %}w1 {{ m['content'] }} {% endfor %}w2"
    classifiers.chat_template = "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }} {% endfor %}"
    reward = ClassifierReward(LlamaForSequenceClassification(toys.make_base().config), classifiers, output=[0, 1])
    chats = [{"prompt": [{"role": "user", "content": f"w{i}"}]} for i in range(8)]

    def collate(rows: Any) -> dict[str, Any]:
        return {"input_ids": torch.tensor([[5, 5 + i, 6] for i in range(len(rows))])}

    trainer = make_trainer(
        constructor={
            "train_dataset": chats, "reward_model": reward, "processing_class": policys, "normalizer": None,
            "data_collator": collate if own_collator else None,
        },
        payoff_prompts=3,
    )  # fmt: skip
    trainer.measure_payoff()
    drawn = drawn_rows(len(chats), 3, trainer.args.seed)
    starts = ["w1 w1 w2", "w1 w2 w2", "w1 w3 w2"] if own_collator else [f"[user] w{i} [assistant]" for i in drawn]
    assert all(text.startswith(start) for text, start in zip(texts, starts * 2, strict=True))
    texts.clear()
    with steered(trainer.policy_model, trainer.router):
        rollout = trainer.ppo.rollout(trainer.next_prompts())
        trainer.ppo.score(rollout)
    if not own_collator:
        answers = zip(rollout.prompts.texts, rollout.responses.texts, strict=True)
        assert texts == [f"[user] {prompt[0]['content']} [assistant] {answer} " for prompt, answer in answers]
    assert len(texts) == 8


# -- bad input, before the first step ---


def test_bad_input_raises_before_the_first_step(make_trainer: Make, toys: ModuleType) -> None:
    with pytest.raises(ExpertError, match="no router 'nope'"):
        make_trainer(router="nope")
    with pytest.raises(ExpertError, match="say which one"):
        make_trainer(router=None)
    with pytest.raises(HoEError, match="missing"):
        make_trainer(constructor={"reward_model": {"low": toys.low}})
    with pytest.raises(HoEError, match="no prompts"):
        make_trainer(constructor={"train_dataset": [{"text": "w1"}]})
    with pytest.raises(PreferenceError, match="no HoE adapter"):
        make_trainer(model=toys.make_base())
    with pytest.raises(HoEError, match="whiten_rewards"):
        make_trainer(whiten_rewards=True)
    with pytest.raises(HoEError, match="bf16"):
        make_trainer(fp16=True)
    with pytest.raises(HoEError, match="k3"):
        make_trainer(kl_estimator="k1")


@pytest.mark.parametrize(
    ("name", "setting"), [("FSDP", {"fsdp": "full_shard"}), ("DEEPSPEED", {"deepspeed": "zero3.json"})]
)
def test_what_would_shard_the_router_is_refused(
    make_trainer: Make, monkeypatch: pytest.MonkeyPatch, name: str, setting: dict[str, Any]
) -> None:
    refusal = rf"(?i){name}.*MULTI_GPU.*shard_policy=True"
    with pytest.raises(HoEError, match=refusal):
        make_trainer(**setting)
    monkeypatch.setenv(f"ACCELERATE_USE_{name}", "true")
    with pytest.raises(HoEError, match=refusal):
        make_trainer()


@pytest.mark.parametrize(
    ("constructor", "text"),
    [
        ({"processing_class": None}, "processing_class is None, but it is required"),
        ({"processing_class": "org/name"}, r"the tokenizer is 'org/name'; load the policy's, .*AutoTokenizer"),
        ({"ref_model": "org/name"}, "ref_model is 'org/name'; load it, or leave it out for the base"),
    ],
)
def test_names_in_place_of_what_they_name_are_told(make_trainer: Make, constructor: dict[str, Any], text: str) -> None:
    with pytest.raises(HoEError, match=text):
        make_trainer(constructor=constructor)


def test_experts_without_weights_are_refused(make_trainer: Make, toys: ModuleType) -> None:
    model = toys.make_policy()
    for name, parameter in model.named_parameters():
        if "hoe_B" in name:
            parameter.data.zero_()
    with pytest.raises(ExpertError, match="hold no weights"):
        make_trainer(model=model)


def test_constant_objective_raises_before_the_first_step(make_trainer: Make, toys: ModuleType) -> None:
    model = toys.make_policy()
    own = toys.rows_of(model, "r0")
    rewards = {"low": toys.low, "high": lambda prompts, completions: [1.0] * len(completions)}
    with pytest.raises(HoEError, match="'high' is constant"):
        make_trainer(model=model, constructor={"normalizer": None, "reward_model": rewards}).train()
    assert all(torch.equal(x, y) for x, y in zip(own, toys.rows_of(model, "r0"), strict=True))


def test_right_padding_is_refused(make_trainer: Make, toys: ModuleType) -> None:
    def collate(rows: Any) -> dict[str, Any]:
        return {"input_ids": torch.tensor([[5, 6, 0], [5, 6, 7]] * 4)}

    with pytest.raises(HoEError, match="pads on the right"):
        make_trainer(constructor={"data_collator": collate}).train()


def test_a_reward_that_hangs_ends_the_run(make_trainer: Make, toys: ModuleType) -> None:
    released = threading.Event()

    def hangs(prompts: Any, completions: Any) -> list[float]:
        released.wait()
        return [0.5] * len(completions)

    rewards = {"low": hangs, "high": toys.high}
    try:
        with pytest.raises(HoEError, match=r"'low' did not return within 0\.05 s"):
            make_trainer(constructor={"reward_model": rewards}, reward_timeout=0.05).train()
    finally:
        released.set()
    own = Rewards(toys.REWARDS, ["low", "high"], timeout=7.0)
    assert make_trainer(constructor={"reward_model": own}, reward_timeout=0.05).ppo.rewards.timeout == 7.0
    with pytest.raises(HoEError, match="reward_timeout is 0"):
        make_trainer(reward_timeout=0)


def test_a_failing_reward_leaves_the_last_checkpoint(make_trainer: Make, toys: ModuleType, tmp_path: Any) -> None:
    calls = []

    def short(prompts: Any, completions: Any) -> list[float]:
        calls.append(1)
        return [0.5] * (len(completions) - (len(calls) > 2))

    trainer = make_trainer(
        constructor={"reward_model": {"low": short, "high": toys.high}},
        save_strategy="steps",
        save_steps=1,
        max_steps=4,
    )
    with pytest.raises(HoEError, match="7 values for 8 completions"):
        trainer.train()
    found = sorted(path.name for path in (tmp_path / "run").iterdir())
    assert found == ["checkpoint-1", "checkpoint-2"]


def test_streams_are_refused(make_trainer: Make, toys: ModuleType) -> None:
    with pytest.raises(HoEError, match=r"a generator, a stream.*Load it first"):
        make_trainer(constructor={"train_dataset": (row for row in toys.PROMPTS)})
    with pytest.raises(HoEError, match="a stream"):
        make_trainer(constructor={"eval_dataset": {"a": iter(toys.PROMPTS)}})


# -- precision ---


def test_bf16_autocast_trains(make_trainer: Make) -> None:
    exact, mixed = make_trainer(max_steps=1), make_trainer(max_steps=1, bf16=True)
    prompts = exact.next_prompts()
    with exact_and_mixed_logits(exact, mixed, prompts) as (first, second):
        assert 0 < float((first - second.float()).abs().max()) < 0.5
    mixed.train()
    assert np.isfinite(mixed.state.log_history[0]["loss/policy_avg"])
    assert all(parameter.dtype == torch.float32 for parameter in mixed.router.parameters())


@contextlib.contextmanager
def exact_and_mixed_logits(exact: Any, mixed: Any, prompts: Any) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    ids, mask = prompts.ids, prompts.mask
    with torch.no_grad(), steered(exact.policy_model, exact.router), steered(mixed.policy_model, mixed.router):
        yield exact.model(ids, mask, 2)[0], mixed.model(ids, mask, 2)[0]


def test_gradient_checkpointing_gives_the_same_parameters(make_trainer: Make, toys: ModuleType) -> None:
    plain, saving = (
        make_trainer(model=toys.make_policy().double(), max_steps=2, **more) for more in ({}, toys.checkpointing())
    )
    plain.train()
    torch.manual_seed(plain.local_seed)
    saving.train()
    for x, y in zip(plain.router.parameters(), saving.router.parameters(), strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=1e-7)
    layers = saving.policy_model.get_base_model().model.layers
    assert not any(layer.gradient_checkpointing for layer in layers)


def test_save_on_interrupt(make_trainer: Make, toys: ModuleType, tmp_path: Any) -> None:
    model = toys.make_policy()
    trainer = make_trainer(model=model, max_steps=6, constructor={"callbacks": [toys.Press()]})
    before = signal.getsignal(signal.SIGINT)
    trainer.train()
    assert trainer.state.global_step == 2
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["checkpoint-2"]
    assert signal.getsignal(signal.SIGINT) is before
    assert toys.is_trained(model)
