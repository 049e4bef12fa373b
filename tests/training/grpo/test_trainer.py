from __future__ import annotations

import inspect
import signal
import warnings
from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from transformers import HfArgumentParser, TrainerCallback, TrainingArguments

import peft_hoe
from peft_hoe import ExpertError, HoEConfig, HoEError, HoEWarning, PreferenceError
from peft_hoe.generation.prompt_rows import drawn_rows

trl = pytest.importorskip("trl")

Make = Callable[..., Any]


def user_state(model: Any) -> dict[str, Any]:
    """What a user may have set on a model, and a trainer may write to."""
    base = model.get_base_model()
    return {
        "trains": {name: parameter.requires_grad for name, parameter in model.named_parameters()},
        "modes": [module.training for module in model.modules()],
        "generation": dict(vars(base.generation_config)),
        "config": dict(vars(base.config)),
        "forwards": [vars(each).get("forward") for each in (model, base)],
        "tags": list(getattr(base, "model_tags", None) or []),
        "hooks": list(base.get_input_embeddings()._forward_hooks),
        "checkpointing": [getattr(module, "gradient_checkpointing", False) for module in base.modules()],
        "preference": dict(model.preference),
        "default": model.peft_config["default"].default_preference,
        "adapters": list(model.peft_config),
        "modules": [name for name, _ in model.named_modules()],
        "rows": [module.trained_rows for module in model.modules() if isinstance(module, peft_hoe.HoELayer)],
    }


# -- what upstream must keep ---


def test_the_seam_is_where_it_was() -> None:
    names = list(inspect.signature(trl.GRPOTrainer._calculate_rewards).parameters)
    assert names == ["self", "inputs", "prompts", "completions", "completion_ids_list"]
    assert list(inspect.signature(trl.GRPOTrainer._generate_single_turn).parameters)[:2] == ["self", "prompt_ids"]
    assert "num_generations_eval" in inspect.getsource(trl.GRPOTrainer._generate_and_score_completions)


def test_reward_weights_are_read_at_every_step(make_grpo: Make) -> None:
    """With all weight on `low`, that objective alone decides; a step later, the other one."""
    trainer = make_grpo(weighting="saddle", scale_rewards="none")
    rewards = torch.tensor([[0.0, 9.0], [1.0, 5.0], [2.0, 1.0], [3.0, 1.0]] * 2)
    trainer._calculate_rewards = lambda *args: rewards
    rows = [trainer.train_dataset[row // 4] for row in range(8)]
    trainer.policy.train()
    for weights, expected in (([1.0, 0.0], [-1.5, -0.5, 0.5, 1.5]), ([0.0, 1.0], [5.0, 1.0, -3.0, -3.0])):
        trainer.reward_weights = torch.tensor(weights)
        with trainer.model_settings.applied():
            advantages = trainer._generate_and_score_completions(rows)["advantages"]
        torch.testing.assert_close(advantages, torch.tensor(expected * 2))


# -- what trains ---


def test_only_the_router_moves(make_grpo: Make, toys: ModuleType) -> None:
    """Weight decay 0.1, a second router with weights, and an optimizer whose momentum is warm: nothing else moves by a bit."""
    model = toys.make_policy()
    router_parameters = [parameter for name, parameter in model.named_parameters() if "hoe_router" in name]
    for parameter in router_parameters:
        parameter.data += torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3))
    optimizer = torch.optim.AdamW(router_parameters, lr=0.05, weight_decay=0.1)
    sum((parameter**2).sum() for parameter in router_parameters).backward()
    optimizer.step()  # both routers now have momentum
    before, other, own = toys.snapshot(model), toys.rows_of(model, "r1"), toys.rows_of(model, "r0")
    trainer = make_grpo(model=model, constructor={"optimizers": (optimizer, None)}, weight_decay=0.1, beta=0.1)
    trainer.train()
    after = toys.snapshot(model)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before if "hoe_router" not in name)
    assert all(torch.equal(x, y) for x, y in zip(other, toys.rows_of(model, "r1"), strict=True))
    assert not any(torch.equal(x, y) for x, y in zip(own, toys.rows_of(model, "r0"), strict=True))


@pytest.mark.slow
def test_reward_improves(make_grpo: Make, toys: ModuleType) -> None:
    def w20(prompts: Any, completions: Any) -> list[float]:
        return [sum(word in ("w20", "w21", "w22", "w23") for word in text.split()) / 10 for text in completions]

    trainer = make_grpo(
        max_steps=16, per_device_train_batch_size=48, num_generations=16, max_completion_length=8, seed=1, step=0.0,
        constructor={"reward_funcs": {"low": lambda prompts, completions: [0.5] * len(completions), "high": w20}},
    )  # fmt: skip
    trainer.train()
    rewards = [entry["reward/high"] for entry in trainer.state.log_history if "reward/high" in entry]
    assert np.mean(rewards[-5:]) > np.mean(rewards[:3]) + 0.02


@pytest.mark.parametrize("after", [None, 0, 1])
def test_the_users_model_is_as_it_was(make_grpo: Make, toys: ModuleType, after: int | None) -> None:
    """After the constructor, a run, a run that fails before or after its first update, and an evaluation."""
    model = toys.make_policy()
    model.set_preference([0.6, 0.4])
    model.get_base_model().generation_config.eos_token_id = None
    model.get_base_model().config.pad_token_id = None
    before, seen, own = user_state(model), [], toys.rows_of(model, "r0")

    class Look(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            trained = any(parameter.requires_grad for name, parameter in model.named_parameters() if "hoe_" in name)
            seen.append((dict(model.preference), toys.is_trained(model), trained))

    def broken(prompts: Any, completions: Any) -> list[float]:
        raise RuntimeError("no reward")

    rewards = {"low": broken if after == 0 else toys.low, "high": toys.high}
    callbacks = [Look(), *([toys.Raise(1)] if after else [])]
    changes = {"callbacks": callbacks, "reward_funcs": rewards, "eval_dataset": toys.PROMPTS[:2]}
    trainer = make_grpo(model=model, constructor=changes, beta=0.1, **toys.checkpointing())
    assert user_state(model) == before
    if after is None:
        trainer.train()
        assert seen == [({"low": 0.25, "high": 0.75}, True, False)] * 2
    else:
        with pytest.raises((RuntimeError, HoEError), match=r"stop here|no reward"):
            trainer.train()
    assert user_state(model) == before
    assert toys.is_trained(model) is (after != 0)
    assert not toys.is_trained(model, "r1")
    assert all(torch.equal(x, y) for x, y in zip(own, toys.rows_of(model, "r0"), strict=True)) is (after == 0)
    if after is None:
        assert np.isfinite(trainer.evaluate()["eval_loss"])
        assert user_state(model) == before


# -- the reference ---


def test_the_reference_is_the_base_model(make_grpo: Make, toys: ModuleType) -> None:
    """No copy of the adapter; with the experts far from the base, the first divergence is that from the base model."""
    model = toys.make_policy()
    parameters = len(list(model.parameters()))
    trainer = make_grpo(model=model, beta=0.2, max_steps=1)
    assert (trainer.beta, trainer.args.beta, trainer.ref_model) == (0.2, 0.2, None)
    assert list(model.peft_config) == ["default"]
    assert len(list(model.parameters())) == parameters
    kept: list[Any] = []
    compute = trainer._compute_loss
    trainer._compute_loss = lambda policy, inputs: (kept.append(inputs), compute(policy, inputs))[1]
    trainer.train()
    (inputs,) = kept
    ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
    mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1)
    with torch.no_grad():
        logits = toys.make_base()(input_ids=ids, attention_mask=mask).logits
    length, counted = inputs["completion_ids"].shape[1], inputs["completion_mask"].bool()
    logs = logits[:, -length - 1 : -1].log_softmax(-1).gather(-1, inputs["completion_ids"].unsqueeze(-1)).squeeze(-1)
    torch.testing.assert_close(inputs["ref_per_token_logps"][counted], logs[counted], rtol=0, atol=1e-4)
    assert trainer.state.log_history[0]["kl"] > 0.1


# -- rewards and weights ---


def test_the_weights_follow_the_rewards(make_grpo: Make, toys: ModuleType) -> None:
    """log w and u by hand from the logged means; evaluation leaves them alone."""
    trainer = make_grpo(
        eval_strategy="steps", eval_steps=1, mu=0.5, objective_beta=0.2,
        constructor={"eval_dataset": toys.PROMPTS[:4]},
    )  # fmt: skip
    trainer.train()
    log_w, preference = np.zeros(2), np.array([0.25, 0.75])
    updates = [entry for entry in trainer.state.log_history if "reward/low" in entry]
    for entry in updates:
        raw = np.array([entry["reward/low"], entry["reward/high"]])
        mean = np.array([entry["reward_normalized/low"], entry["reward_normalized/high"]])
        assert mean == pytest.approx((raw - 0.45) / 0.2)
        gap = preference * (1.05 - mean)
        log_w = 0.8 * log_w + 0.2 / 0.5 * gap
        w = np.exp(log_w) / np.exp(log_w).sum()
        u = w * preference / (w * preference).sum()
        assert [entry["gap/low"], entry["gap/high"]] == pytest.approx(gap)
        assert [entry["weight/low"], entry["weight/high"]] == pytest.approx(w)
        assert [entry["advantage_weight/low"], entry["advantage_weight/high"]] == pytest.approx(u)
    assert len(updates) == trainer.weights.updates == 2
    assert trainer.reward_weights.tolist() == pytest.approx(u)
    evaluated = [entry for entry in trainer.state.log_history if "eval_reward/low" in entry]
    assert len(evaluated) == 2
    assert {"router/entropy", "router/usage/high", "entropy"} <= updates[0].keys()
    assert updates[0]["router/usage/centroid"] == pytest.approx(0.5, abs=1e-3)  # training starts from the static votes


def test_a_missing_reward_counts_in_no_way(make_grpo: Make, toys: ModuleType) -> None:
    """The advantage of a completion without one objective is what the other objectives make of it."""

    def high(prompts: Any, completions: Any) -> list[float | None]:
        return [None, None, 0.9, 0.5] * 2

    low = {"low": lambda completions, **columns: [0.4, None, 0.6, 0.8] * 2}
    trainer = make_grpo(constructor={"reward_funcs": {**low, "high": high}}, scale_rewards="none")
    rows = [trainer.train_dataset[row // 4] for row in range(8)]
    trainer.policy.train()
    with trainer.model_settings.applied():
        advantages = trainer._generate_and_score_completions(rows)["advantages"]
    low_u, high_u = trainer.weights.u
    # Means of the group: low 0.6, high 0.7; the payoff table's unit is 0.2.
    expected = [low_u * -1.0, 0.0, high_u * 1.0, low_u * 1.0 - high_u * 1.0] * 2
    assert advantages.tolist() == pytest.approx(expected, abs=1e-5)
    assert trainer.weights.gap == pytest.approx([0.25 * (1.05 - 0.75), 0.75 * (1.05 - 1.25)], rel=1e-4)


def test_a_batch_without_any_reward_is_an_error(make_grpo: Make) -> None:
    rewards = dict.fromkeys(("low", "high"), lambda prompts, completions: [None] * len(completions))
    trainer = make_grpo(constructor={"reward_funcs": rewards})
    with pytest.raises(HoEError, match=r"\['low', 'high'\] returned no number for any"):
        trainer.train()
    assert trainer.weights.log_w.tolist() == [0.0, 0.0]


def test_two_tasks_in_one_dataset_train(make_grpo: Make, toys: ModuleType) -> None:
    """Each has a reward of its own, and some batches hold one task only: the other objective waits."""

    def of(task: str, reward: Any) -> Any:
        def scored(prompts: Any, completions: Any, task_name: Any) -> list[float | None]:
            found = reward(prompts, completions)
            return [value if name == task else None for value, name in zip(found, task_name, strict=True)]

        return scored

    rows = [{**row, "task_name": "a" if i % 4 else "b"} for i, row in enumerate(toys.PROMPTS)]
    rewards = {"low": of("a", toys.low), "high": of("b", toys.high)}
    trainer = make_grpo(constructor={"reward_funcs": rewards, "train_dataset": rows}, max_steps=6)
    with pytest.warns(HoEWarning, match="objective 'high' has no reward in a batch"):
        trainer.train()
    assert trainer.state.global_step == 6
    seen = [{name for name in entry if name.startswith("reward/")} for entry in trainer.state.log_history]
    assert {"reward/low"} in seen
    assert {"reward/low", "reward/high"} in seen
    by_task = {task: [row for row in rows if row["task_name"] == task] for task in "ab"}
    measured = make_grpo(constructor={"reward_funcs": rewards, "train_dataset": rows, "eval_dataset": by_task})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", HoEWarning)  # of few prompts
        assert np.isfinite(measured.measure_payoff().payoff).all()  # the first evaluation set has no number for "high"


@pytest.mark.parametrize("chat", [False, True])
def test_the_payoff_table_is_measured_first(make_grpo: Make, toys: ModuleType, chat: bool) -> None:
    """On evaluation prompts, before the first step, with the rewards called as in training."""
    tokenizer, rows, kinds = toys.make_tokenizer(), toys.PROMPTS, set()
    if chat:
        tokenizer.model_input_names = ["input_ids", "attention_mask"]
        tokenizer.chat_template = "{% for m in messages %}w1 {{ m['content'] }} {% endfor %}"
        rows = [{"prompt": [{"role": "user", "content": row["prompt"]}], "tag": i} for i, row in enumerate(rows)]

    def low(prompts: Any, completions: Any, **columns: Any) -> list[float]:
        kinds.add(type(completions[0]))
        assert ("tag" in columns) is chat
        return toys.low(prompts, [each[0]["content"] if chat else each for each in completions])

    def high(completions: Any, **columns: Any) -> list[float]:
        return toys.high([], [each[0]["content"] if chat else each for each in completions])

    trainer = make_grpo(
        payoff_prompts=12, max_steps=1, seed=0, top_k=3,
        constructor={
            "normalizer": None, "reward_funcs": [low, high], "eval_dataset": rows, "train_dataset": rows,
            "processing_class": tokenizer,
        },
    )  # fmt: skip
    trainer.train()
    prompts = [rows[number]["prompt"] for number in drawn_rows(len(rows), 12, seed=0)]
    expected = peft_hoe.payoff_table(
        toys.make_policy(), prompts, toys.REWARDS, processing_class=tokenizer, batch_size=8,
        decoding=trainer.generation_config,
    )  # fmt: skip
    assert (expected.decoding["top_k"], expected.decoding["max_new_tokens"]) == (3, 6)
    assert trainer.normalizer.payoff == pytest.approx(expected.payoff, abs=1e-6)  # TRL's rewards are float32
    assert trainer.normalizer.decoding == expected.decoding
    assert kinds == {list if chat else str}


def test_constant_objective_raises_before_the_first_step(make_grpo: Make, toys: ModuleType) -> None:
    rewards = {"low": toys.low, "high": lambda prompts, completions: [1.0] * len(completions)}
    trainer = make_grpo(constructor={"normalizer": None, "reward_funcs": rewards})
    with pytest.raises(HoEError, match="'high' is constant"):
        trainer.train()
    assert trainer.state.global_step == 0


# -- generation ---


@pytest.mark.slow
def test_continuous_batching_follows_the_router(make_grpo: Make, toys: ModuleType) -> None:
    """It runs in a thread of its own, where no block of a preference is seen: still the rollouts are the router's."""
    pytest.importorskip("transformers", minversion="5.8.0")
    model = toys.make_policy()
    generator = torch.Generator().manual_seed(3)
    for name, parameter in model.named_parameters():
        if "hoe_router" in name:
            parameter.data += torch.randn(parameter.shape, generator=generator)
    shared = {"generation_kwargs": {"do_sample": False}, "max_completion_length": 8}
    plain = make_grpo(model=model, **shared)
    batched = make_grpo(
        model=model, use_transformers_continuous_batching=True,
        transformers_continuous_batching_config={"num_blocks": 64, "max_batch_tokens": 64}, **shared,
    )  # fmt: skip
    expected = _rollouts(plain)
    assert _rollouts(batched) == expected
    assert dict(model.preference) == {"low": 0.5, "high": 0.5}
    batched.evaluate(batched.train_dataset.select([0, 1]))
    assert batched.weights.updates == 0
    with pytest.raises(HoEError, match="cast the whole model"):
        make_grpo(use_transformers_continuous_batching=True, bf16=True)


def _rollouts(trainer: Any) -> list[list[int]]:
    """What the policy, steered as in training, makes of three prompts."""
    from peft_hoe.training.run.steered_policy import steered

    prompts = [[5, 6, 7], [8, 9], [10, 11, 12, 13]]
    count = () if "num_generations" not in inspect.signature(trl.GRPOTrainer._generate_single_turn).parameters else (1,)
    with steered(trainer.policy, trainer.router), trainer.model_settings.applied():
        found, _ = trainer._generate_single_turn(prompts, None, {}, *count)
    return [list(each) for each in found]


def test_chat_models_warn_about_plain_strings(make_grpo: Make, toys: ModuleType) -> None:
    tokenizer = toys.make_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    with pytest.warns(HoEWarning, match="plain strings"):
        make_grpo(constructor={"processing_class": tokenizer})


# -- bad input, before the first step ---


def test_bad_input_raises_before_the_first_step(make_grpo: Make, toys: ModuleType) -> None:
    with pytest.raises(ExpertError, match="no router 'nope'"):
        make_grpo(router="nope")
    with pytest.raises(ExpertError, match="say which one"):
        make_grpo(router=None)
    with pytest.raises(HoEError, match="missing"):
        make_grpo(constructor={"reward_funcs": {"low": toys.low}})
    with pytest.raises(HoEError, match="no prompts"):
        make_grpo(constructor={"train_dataset": [{"text": "w1"}]})
    with pytest.raises(HoEError, match="cannot be given to rewards"):
        make_grpo(constructor={"train_dataset": [{"input_ids": [5]}]})
    with pytest.raises(HoEError, match="empty"):
        make_grpo(constructor={"train_dataset": []})
    with pytest.raises(HoEError, match="required"):
        make_grpo(constructor={"train_dataset": None})
    with pytest.raises(PreferenceError, match="no HoE adapter"):
        make_grpo(model=toys.make_base())
    with pytest.raises(HoEError, match="use HoEGRPOConfig"):
        make_grpo(constructor={"args": TrainingArguments(use_cpu=True)})
    other = peft_hoe.RewardNormalizer([[1, 0], [0, 1]], ["a", "b"])
    with pytest.raises(HoEError, match=r"normalizer is for \['a', 'b'\]"):
        make_grpo(constructor={"normalizer": other})


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"use_vllm": True}, "another policy"),
        ({"use_liger_kernel": True}, "past the model's own forward"),
        ({"cast_lm_head_to_fp32": True}, "for good"),
        ({"sync_ref_model": True, "beta": 0.1}, "does not move"),
        ({"reward_weights": [0.5, 0.5]}, "give the router a preference"),
        ({"advantage_scaling": "none"}, "'joint', 'objective'"),
        ({"scale_rewards": "all"}, "'batch', 'group', 'none'"),
        ({"multi_objective_aggregation": "normalize_then_sum"}, "advantage_scaling='joint' is 'sum_then_normalize'"),
        ({"temperature": 0.0}, "temperature is 0.0"),
        ({"objective_beta": 1.5}, "must be in"),
        ({"weighting": "none"}, "'saddle', 'paper'"),
    ],
)
def test_settings_that_cannot_work_are_refused(make_grpo: Make, changes: dict[str, Any], said: str) -> None:
    with pytest.raises(HoEError, match=said):
        make_grpo(**changes)


@pytest.mark.parametrize("scaling", ["joint", "objective"])
def test_scaling_is_trls_aggregation(make_grpo: Make, scaling: str) -> None:
    """Two prompts, the second's rewards spread ten times as wide: one σ for both, or each group and objective by its own."""
    trainer = make_grpo(advantage_scaling=scaling)
    trainer._calculate_rewards = lambda *args: torch.tensor(
        [[0.0, 1.0], [1.0, 1.0], [2.0, 1.0], [3.0, 1.0], [0.0, 1.0], [10.0, 1.0], [20.0, 1.0], [30.0, 1.0]]
    )
    trainer.reward_weights = torch.tensor([0.5, 0.5])
    trainer.policy.train()
    with trainer.model_settings.applied():
        rows = [trainer.train_dataset[row // 4] for row in range(8)]
        found = trainer._generate_and_score_completions(rows)["advantages"].numpy()
    low = np.array([[0.0, 1.0, 2.0, 3.0], [0.0, 10.0, 20.0, 30.0]])
    if scaling == "joint":
        mixed = 0.5 * low + 0.5
        expected = (mixed - mixed.mean(1, keepdims=True)) / mixed.std(ddof=1)
    else:
        each = 0.5 * (low - low.mean(1, keepdims=True)) / low.std(1, ddof=1, keepdims=True)
        expected = each / each.std(ddof=1)
    assert found == pytest.approx(expected.ravel(), rel=1e-3)


def test_the_configuration_can_be_parsed(tmp_path: Any) -> None:
    from peft_hoe.training import HoEGRPOConfig

    parser = HfArgumentParser(HoEGRPOConfig)
    (parsed,) = parser.parse_args_into_dataclasses(
        ["--output_dir", str(tmp_path), "--use_cpu", "--objective_beta", "0.3", "--advantage_scaling", "objective"]
    )
    assert (parsed.objective_beta, parsed.beta, parsed.multi_objective_aggregation) == (0.3, 0.0, "normalize_then_sum")


def test_experts_without_weights_are_refused(make_grpo: Make, toys: ModuleType) -> None:
    model = toys.make_policy()
    for name, parameter in model.named_parameters():
        if "hoe_B" in name:
            parameter.data.zero_()
    with pytest.raises(ExpertError, match="hold no weights"):
        make_grpo(model=model)


def test_peft_config_makes_the_adapter(make_grpo: Make, toys: ModuleType) -> None:
    config = HoEConfig(
        objectives=["low", "high"], routers=[[0.25, 0.75]], r=4, target_modules="all-linear", task_type="CAUSAL_LM",
        init_weights=False,
    )  # fmt: skip
    trainer = make_grpo(model=toys.make_base(), constructor={"peft_config": config}, max_steps=1)
    trainer.train()
    assert isinstance(trainer.policy, PeftModel)
    assert toys.is_trained(trainer.policy)


@pytest.mark.parametrize("name", ["tools", "rollout_func", "environment_factory", "quantization_config"])
def test_arguments_of_trl_that_cannot_work_are_named(make_grpo: Make, make_dpo_trainer: Make, name: str) -> None:
    make_grpo(constructor={name: None})
    with pytest.raises(HoEError, match=f"{name} is not supported: the"):
        make_grpo(constructor={name: [print]})
    with pytest.raises(TypeError, match="no argument 'nothing'"):
        make_grpo(constructor={"nothing": 1})
    if name == "quantization_config":
        with pytest.raises(HoEError, match=f"{name} is not supported"):
            make_dpo_trainer(constructor={name: object()})


def test_the_payoff_table_renders_prompts_as_training_does(make_grpo: Make, toys: ModuleType) -> None:
    """With the template's arguments of the configuration; a table of other prompts would be another scale."""
    tokenizer = toys.make_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ 'w9' if mark else 'w1' }} {{ m['content'] }} {% endfor %}"
    trainer = make_grpo(
        constructor={
            "processing_class": tokenizer,
            "train_dataset": [{"prompt": [{"role": "user", "content": f"w{i}"}]} for i in range(8)],
            "reward_funcs": {
                name: lambda completions, reward=reward, **columns: reward(
                    [], [each[0]["content"] for each in completions]
                )
                for name, reward in toys.REWARDS.items()
            },
        },
        chat_template_kwargs={"mark": True},
    )
    seen: list[str] = []
    generate = trainer.policy.generate

    def noting(*args: Any, input_ids: Any, **others: Any) -> Any:
        seen.extend(tokenizer.batch_decode(input_ids, skip_special_tokens=True))
        return generate(*args, input_ids=input_ids, **others)

    trainer.policy.generate = noting
    trainer.measure_payoff()
    assert seen
    assert all(text.startswith("w9 ") for text in seen)


# -- precision, memory, interruption ---


def test_bf16_autocast_trains(make_grpo: Make, toys: ModuleType) -> None:
    model = toys.make_policy()
    before = user_state(model)
    trainer = make_grpo(model=model, max_steps=1, bf16=True)
    trainer.train()
    assert np.isfinite(trainer.state.log_history[0]["loss"])
    assert all(parameter.dtype == torch.float32 for parameter in (*trainer.router.parameters(), *model.parameters()))
    assert user_state(model) == before


@pytest.mark.slow
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_gives_the_same_parameters(make_grpo: Make, toys: ModuleType, reentrant: bool) -> None:
    plain, saving = (
        make_grpo(model=toys.make_policy().double(), beta=0.1, **more)
        for more in ({}, toys.checkpointing(reentrant=reentrant))
    )
    for trainer in (plain, saving):
        torch.manual_seed(5)
        trainer.train()
    for x, y in zip(plain.router.parameters(), saving.router.parameters(), strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=1e-9)


@pytest.mark.slow
def test_save_on_interrupt(make_grpo: Make, toys: ModuleType, tmp_path: Any) -> None:
    model = toys.make_policy()
    trainer = make_grpo(model=model, max_steps=6, constructor={"callbacks": [toys.Press()]})
    before = signal.getsignal(signal.SIGINT)
    trainer.train()
    assert trainer.state.global_step == 2
    assert trainer.interrupted
    assert [path.name for path in (tmp_path / "run").glob("checkpoint-*")] == ["checkpoint-2"]
    assert signal.getsignal(signal.SIGINT) is before
    assert toys.is_trained(model)
