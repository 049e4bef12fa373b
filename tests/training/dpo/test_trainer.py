from __future__ import annotations

import signal
from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from transformers import TrainerCallback, TrainingArguments

from peft_hoe import CheckpointError, ExpertError, HoEError, PreferenceError

pytest.importorskip("trl")

from peft_hoe.training.run.checkpoints import read_state

Make = Callable[..., Any]


@pytest.fixture(autouse=True)
def own_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers leaves the precision of a run in the environment, for the next one."""
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")


def same(first: list[torch.Tensor], second: list[torch.Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(first, second, strict=True))


def state_of(model: Any) -> dict[str, Any]:
    """What a user may have set in a model, and what trainers like to change."""
    base = model.get_base_model()
    return {
        "preference": dict(model.preference),
        "training": [module.training for module in model.modules()],
        "trains": [parameter.requires_grad for parameter in model.parameters()],
        "generation": base.generation_config.to_dict(),
        "config": base.config.to_dict(),
        "tags": base.model_tags,
        "dropout": [module.p for module in model.modules() if isinstance(module, torch.nn.Dropout)],
        "hooks": list(base.get_input_embeddings()._forward_hooks),
        "forwards": [vars(module).get("forward") for module in model.modules()],
        "modules": [name for name, _ in model.named_modules()],
        "adapters": list(model.peft_config),
        "checkpointing": [getattr(module, "gradient_checkpointing", None) for module in model.modules()],
    }


class At(TrainerCallback):
    """Does something at an update."""

    def __init__(self, update: int, action: Callable[[], Any]) -> None:
        self.update, self.action = update, action

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.update:
            self.action()


# -- what trains, and what is left ---


def test_only_the_router_moves(make_dpo_trainer: Make, toys: ModuleType) -> None:
    """Weight decay 0.1, a second router with weights, and an optimizer whose momentum is warm: nothing else moves by a bit."""
    model = toys.make_policy()
    parameters = [parameter for name, parameter in model.named_parameters() if "hoe_router" in name]
    for parameter in parameters:
        parameter.data += torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3))
    optimizer = torch.optim.AdamW(parameters, lr=0.05, weight_decay=0.1)
    sum((parameter**2).sum() for parameter in parameters).backward()
    optimizer.step()  # both routers now have momentum
    before, own, other = toys.snapshot(model), toys.rows_of(model, "r0"), toys.rows_of(model, "r1")
    make_dpo_trainer(model=model, constructor={"optimizers": (optimizer, None)}, weight_decay=0.1).train()
    after = toys.snapshot(model)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before if "hoe_router" not in name)
    assert same(other, toys.rows_of(model, "r1"))
    assert not any(torch.equal(x, y) for x, y in zip(own, toys.rows_of(model, "r0"), strict=True))


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("saving", [False, True])
def test_everything_else_is_as_it_was(make_dpo_trainer: Make, toys: ModuleType, fails: bool, saving: bool) -> None:
    changes = {**toys.checkpointing(), "bf16": True} if saving else {}
    model = toys.make_policy()
    base = model.get_base_model()
    base.model.dropped = torch.nn.Dropout(0.25)
    base.generation_config.eos_token_id, base.generation_config.pad_token_id = 7, 8
    base.config.pad_token_id = 9
    model.set_preference([0.6, 0.4])
    before, own = state_of(model), toys.rows_of(model, "r0")
    seen = []

    def act() -> None:
        seen.append((dict(model.preference), base.model.dropped.p))
        if fails:
            raise RuntimeError("stop here")

    trainer = make_dpo_trainer(model=model, constructor={"callbacks": [At(1, act)]}, **changes)
    assert state_of(model) == before
    if fails:
        with pytest.raises(RuntimeError, match="stop here"):
            trainer.train()
    else:
        trainer.train()
    assert state_of(model) == before
    assert seen == [({"low": 0.25, "high": 0.75}, 0)]
    assert not same(own, toys.rows_of(model, "r0"))
    assert [spec.trained for spec in model.peft_config["default"].routers] == [True, False]
    trainer.evaluate(trainer_pairs(toys))
    assert state_of(model) == before


def trainer_pairs(toys: ModuleType) -> dict[str, Any]:
    return {name: toys.make_pairs(name, rows=4, seed=5) for name in toys.REWARDS}


def test_another_adapter_name(make_dpo_trainer: Make, toys: ModuleType) -> None:
    """TRL looks for an adapter called default."""
    model = toys.make_policy()
    config = model.peft_config["default"]
    model.add_adapter("mine", config)
    state = {name: p.data for name, p in model.named_parameters() if ".default." in name}
    for name, data in state.items():
        model.get_parameter(name.replace(".default.", ".mine.")).data.copy_(data)
    model.set_adapter("mine")
    model.delete_adapter("default")
    trainer = make_dpo_trainer(model=model, max_steps=1)
    trainer.train()
    assert list(model.peft_config) == ["mine"]
    assert trainer.router.adapter == "mine"


# -- learning and logs ---


@pytest.mark.slow
def test_it_learns_what_the_pairs_say(make_dpo_trainer: Make) -> None:
    trainer = make_dpo_trainer(max_steps=30, per_device_train_batch_size=16, margin="none")
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert np.mean(losses[-5:]) < np.mean(losses[:5]) - 0.2


def test_logs(make_dpo_trainer: Make, toys: ModuleType) -> None:
    trainer = make_dpo_trainer(
        constructor={"eval_dataset": trainer_pairs(toys)}, eval_strategy="steps", eval_steps=2, max_steps=2,
        per_device_train_batch_size=16,
    )  # fmt: skip
    trainer.train()
    first, second, evaluated, _ = trainer.state.log_history
    columns = {f"{column}/{name}" for column in ("loss", "accuracy", "margin") for name in toys.REWARDS}
    for entry in (first, second):
        assert columns | {"rewards/margins", "router/entropy", "router/usage/high", "logps/chosen"} <= entry.keys()
        assert np.isfinite(list(entry.values())).all()
    assert {f"eval_{name}" for name in columns} <= evaluated.keys()
    assert "eval_router/entropy" not in evaluated
    # 4 pairs of one objective and 12 of the other: the mean over pairs is Σ λ L.
    expected = 0.25 * evaluated["eval_loss/low"] + 0.75 * evaluated["eval_loss/high"]
    assert evaluated["eval_loss"] == pytest.approx(expected, rel=1e-3)


def test_evaluation_uses_the_router_s_preference(make_dpo_trainer: Make, toys: ModuleType) -> None:
    model = toys.make_policy()
    trainer = make_dpo_trainer(model=model)
    found = []
    for preference in ([0.9, 0.1], [0.25, 0.75]):
        model.set_preference(preference)
        found.append(trainer.evaluate(trainer_pairs(toys))["eval_loss"])
    assert found[0] == found[1]


# -- data ---


def test_chat_messages_and_a_user_s_collator(make_dpo_trainer: Make, toys: ModuleType) -> None:
    from trl.trainer.dpo_trainer import DataCollatorForPreference

    tokenizer = toys.make_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}w1 {{ m['content'] }} {% endfor %}{% if add_generation_prompt %}w1 {% endif %}"
    )
    pairs = {
        name: [
            {key: [{"role": "user" if key == "prompt" else "assistant", "content": row[key].strip()}] for key in row}
            for row in toys.make_pairs(name)
        ]
        for name in toys.REWARDS
    }
    seen: list[set[str]] = []

    def collate(rows: Any) -> Any:
        seen.extend(set(row) for row in rows)
        return DataCollatorForPreference(pad_token_id=0)(rows)

    trainer = make_dpo_trainer(
        constructor={"train_dataset": pairs, "processing_class": tokenizer, "data_collator": collate}, max_steps=1
    )
    row = trainer.train_dataset[0]
    assert tokenizer.decode(row["prompt_ids"]).split() == ["w1", pairs["low"][0]["prompt"][0]["content"], "w1"]
    assert tokenizer.decode(row["chosen_ids"]) == pairs["low"][0]["chosen"][0]["content"]
    trainer.train()
    assert all(columns == {"prompt_ids", "chosen_ids", "rejected_ids"} for columns in seen)


def test_long_prompts_do_not_change_the_shares(make_dpo_trainer: Make, toys: ModuleType) -> None:
    """Of 12 prompts of 1, 2 and 3 words, 8 are shorter than 3 tokens; the other objective keeps its 12."""
    pairs = {"low": toys.make_pairs("low"), "high": [{**row, "prompt": "w1 "} for row in toys.make_pairs("high")]}
    trainer = make_dpo_trainer(constructor={"train_dataset": pairs}, max_length=3)
    assert np.bincount(trainer.train_dataset["objective"][:]).tolist() == [8, 24]


# -- saving and resuming ---


@pytest.mark.slow
def test_resuming_gives_the_same_parameters(make_dpo_trainer: Make, toys: ModuleType, tmp_path: Any) -> None:
    settings: dict[str, Any] = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "average_routers": True}
    whole = make_dpo_trainer(**settings, output_dir=tmp_path / "whole")
    whole.train()
    model = toys.make_policy()
    resumed = make_dpo_trainer(model=model, **settings, output_dir=tmp_path / "resumed")
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole/checkpoint-2"))
    assert resumed.state.global_step == 4
    for x, y in zip(whole.router.parameters(), resumed.router.parameters(), strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=1e-4)
    for x, y in zip(toys.rows_of(whole.policy, "r0"), toys.rows_of(model, "r0"), strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=1e-4)
    other = make_dpo_trainer(**settings, output_dir=tmp_path / "other", margin="none")
    with pytest.raises(CheckpointError, match="margin"):
        other.train(resume_from_checkpoint=str(tmp_path / "whole/checkpoint-2"))
    loaded = peft_hoe_loaded(toys, tmp_path / "whole/checkpoint-4")
    assert same(toys.rows_of(loaded, "r0"), toys.rows_of(whole.policy, "r0"))


def peft_hoe_loaded(toys: ModuleType, folder: Any) -> Any:
    from peft import PeftModel

    return PeftModel.from_pretrained(toys.make_base(), folder)


def test_average_routers(make_dpo_trainer: Make, toys: ModuleType, tmp_path: Any) -> None:
    """What is written is the mean of the routers after updates 1 and 2."""
    model = toys.make_policy()
    trainer = make_dpo_trainer(
        model=model, max_steps=2, average_routers=True, save_strategy="steps", save_steps=1, output_dir=tmp_path / "run"
    )
    trainer.train()
    saved = [read_state(tmp_path / f"run/checkpoint-{i}")["router"] for i in (1, 2)]
    mean = (saved[0]["linears.0.weight"] + saved[1]["linears.0.weight"]) / 2
    torch.testing.assert_close(toys.rows_of(model, "r0")[0], mean)
    assert not torch.equal(saved[0]["linears.0.weight"], saved[1]["linears.0.weight"])


def test_save_on_interrupt(make_dpo_trainer: Make, tmp_path: Any) -> None:
    press = At(2, lambda: signal.raise_signal(signal.SIGINT))
    trainer = make_dpo_trainer(max_steps=6, constructor={"callbacks": [press]}, output_dir=tmp_path / "run")
    before = signal.getsignal(signal.SIGINT)
    trainer.train()
    assert trainer.interrupted
    assert trainer.state.global_step < 6
    assert (tmp_path / f"run/checkpoint-{trainer.state.global_step}/router_training.pt").is_file()
    assert signal.getsignal(signal.SIGINT) is before


# -- precision and memory ---


@pytest.mark.slow
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_gives_the_same_parameters(
    make_dpo_trainer: Make, toys: ModuleType, reentrant: bool
) -> None:
    plain, saving = (
        make_dpo_trainer(model=toys.make_policy().double(), **more)
        for more in ({}, toys.checkpointing(reentrant=reentrant))
    )
    plain.train()
    saving.train()
    for x, y in zip(plain.router.parameters(), saving.router.parameters(), strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=1e-7)


@pytest.mark.slow
def test_bf16_autocast_trains(make_dpo_trainer: Make, toys: ModuleType) -> None:
    exact = make_dpo_trainer(max_steps=1)
    exact.train()
    mixed = make_dpo_trainer(max_steps=1, bf16=True)  # accelerate keeps one precision for the whole process
    mixed.train()
    x, y = (trainer.state.log_history[0]["loss"] for trainer in (exact, mixed))
    assert x != y
    # bfloat16 rounds by 2^-9: logits of 5 by 0.01, answers of some 10 tokens by up to 0.1; β/λ is 2, and the loss 0.7.
    assert x == pytest.approx(y, rel=0.3)
    assert all(parameter.dtype == torch.float32 for parameter in mixed.router.parameters())
    once, again = (mixed.evaluate(trainer_pairs(toys))["eval_loss"] for _ in range(2))
    assert once == again


# -- bad input, before the first step ---


def test_bad_input(make_dpo_trainer: Make, toys: ModuleType) -> None:
    with pytest.raises(ExpertError, match="no router 'nope'"):
        make_dpo_trainer(router="nope")
    with pytest.raises(ExpertError, match="say which one"):
        make_dpo_trainer(router=None)
    with pytest.raises(PreferenceError, match="no HoE adapter"):
        make_dpo_trainer(model=toys.make_base())
    with pytest.raises(HoEError, match="from_pretrained"):
        make_dpo_trainer(model="some/model")
    with pytest.raises(HoEError, match="no pairs for"):
        make_dpo_trainer(constructor={"train_dataset": {"low": toys.make_pairs("low")}})
    with pytest.raises(HoEError, match="train_dataset is None"):
        make_dpo_trainer(constructor={"train_dataset": None})
    with pytest.raises(HoEError, match="HoEDPOConfig"):
        make_dpo_trainer(constructor={"args": TrainingArguments("x", use_cpu=True)})
    with pytest.raises(HoEError, match="max_length"):
        make_dpo_trainer(max_length=1)
    with pytest.raises(HoEError, match=r"no \['margin'\]"):
        make_dpo_trainer(margin="column")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"margin": "reward"}, "'experts', 'column', 'none'"),
        ({"beta": 0.0}, "beta is 0.0"),
        ({"margin_beta": -1.0}, "margin_beta is -1.0"),
        ({"loss_type": ["sigmoid", "aot"]}, "sorts the pairs"),
        ({"f_divergence_type": "forward_kl"}, "no log-ratios"),
        ({"loss_type": "nca_pair", "margin": "column"}, "each answer by itself"),
        ({"sync_ref_model": True}, "never moves"),
        ({"fp16": True}, "bf16"),
        ({"use_liger_kernel": True}, "past the model's own forward"),
    ],
)
def test_bad_settings(make_dpo_trainer: Make, changes: dict[str, Any], said: str) -> None:
    with pytest.raises(HoEError, match=said):
        make_dpo_trainer(**changes)


def test_sharded_training_is_refused(make_dpo_trainer: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(HoEError, match="FSDP is not supported"):
        make_dpo_trainer()


def test_experts_without_weights_are_refused(make_dpo_trainer: Make, toys: ModuleType) -> None:
    model = toys.make_policy()
    for name, parameter in model.named_parameters():
        if "hoe_B" in name:
            parameter.data.zero_()
    with pytest.raises(ExpertError, match="hold no weights"):
        make_dpo_trainer(model=model)


def test_an_objective_without_an_expert_has_no_implicit_reward(make_dpo_trainer: Make, toys: ModuleType) -> None:
    """The expert of `low` is the base model; the router votes for the other two."""
    model = toys.make_policy()
    which = model.peft_config["default"].expert_names.index("low")
    for name, parameter in model.named_parameters():
        if "hoe_B" in name:
            parameter.data[:, 4 * which : 4 * which + 4] = 0
    with pytest.raises(ExpertError, match="expert of 'low' holds no weights"):
        make_dpo_trainer(model=model)
    make_dpo_trainer(model=model, margin="none")
