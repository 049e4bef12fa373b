from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from peft import PeftModel

from peft_hoe import CheckpointError, HoEError

Make = Callable[..., Any]
RUN = {
    "max_steps": 4,
    "gradient_accumulation_steps": 2,
    "num_mini_batches": 2,
    "save_strategy": "steps",
    "save_steps": 2,
}


def parameters(trainer: Any) -> list[torch.Tensor]:
    return [
        parameter.detach().clone() for part in (trainer.router, trainer.ppo.critic) for parameter in part.parameters()
    ]


@pytest.mark.parametrize("average", [False, True])
def test_resumed_run_equals_uninterrupted(make_trainer: Make, toys: ModuleType, tmp_path: Path, average: bool) -> None:
    """Router, critic, weights, optimizer, schedule, prompts and random numbers continue where they stopped."""
    whole = make_trainer(
        model=toys.make_policy().double(), output_dir=tmp_path / "whole", average_routers=average, **RUN
    )
    whole.train()
    torch.manual_seed(99)  # a new process starts somewhere else
    resumed = make_trainer(
        model=toys.make_policy().double(),
        output_dir=tmp_path / "resumed",
        average_routers=average,
        constructor={"normalizer": None},
        **RUN,
    )
    resumed.train(resume_from_checkpoint=tmp_path / "whole" / "checkpoint-2")
    assert resumed.state.global_step == 4
    for x, y in zip(parameters(whole), parameters(resumed), strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=1e-7)
    assert whole.weights.log_w == pytest.approx(resumed.weights.log_w, abs=1e-9)
    assert [entry["episode"] for entry in resumed.state.log_history] == [16, 32, 48, 64]
    for x, y in zip(whole.policy_model.parameters(), resumed.policy_model.parameters(), strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=1e-7)


def test_a_checkpoint_is_an_adapter(make_trainer: Make, toys: ModuleType, tmp_path: Path, agree: Make) -> None:
    trainer = make_trainer(**{**RUN, "save_total_limit": 1})
    trainer.train()
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["checkpoint-4"]
    loaded = PeftModel.from_pretrained(toys.make_base(), tmp_path / "run" / "checkpoint-4").eval()
    assert [router.trained for router in loaded.peft_config["default"].routers] == [True, False]
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        expected = trainer.policy_model(ids, preference=[0.25, 0.75]).logits
        agree(loaded(ids, preference=[0.25, 0.75]).logits, expected)
    trainer.save_model(str(tmp_path / "final"))
    assert (tmp_path / "final" / "adapter_model.safetensors").is_file()


def test_average_is_what_is_kept(make_trainer: Make, toys: ModuleType) -> None:
    trainer = make_trainer(average_routers=True, max_steps=3)
    seen: list[torch.Tensor] = []
    add = trainer.average.add

    def note(values: Any) -> None:
        seen.append(values["linears.0.weight"].clone())
        add(values)

    trainer.average.add = note
    trainer.train()
    layer = trainer.router.layers[0]
    kept = layer.hoe_router["default"].weight[trainer.router.rows]
    torch.testing.assert_close(kept, torch.stack(seen).mean(0))
    assert not torch.equal(kept, seen[-1])


def test_a_checkpoint_that_does_not_fit_is_refused(make_trainer: Make, tmp_path: Path) -> None:
    trainer = make_trainer(**RUN)
    with pytest.raises(CheckpointError, match="no checkpoint"):
        trainer.train(resume_from_checkpoint=True)
    trainer.train()
    with pytest.raises(CheckpointError, match="'router': 'r0'"):
        make_trainer(router="r1", **RUN).train(resume_from_checkpoint=True)
    with pytest.raises(HoEError, match="mu"):
        make_trainer(mu=0.5, **RUN).train(resume_from_checkpoint=True)
    damaged = tmp_path / "run" / "checkpoint-4" / "router_training.pt"
    damaged.write_bytes(damaged.read_bytes()[:200])
    with pytest.raises(CheckpointError, match="cannot be read"):
        make_trainer(**RUN).train(resume_from_checkpoint=True)


def test_a_shorter_run_keeps_the_checkpoint_that_it_wrote(make_trainer: Make, tmp_path: Path) -> None:
    """A longer run before it, in the same folder, leaves one with a higher number."""
    make_trainer(**RUN).train()
    make_trainer(**{**RUN, "max_steps": 2, "save_total_limit": 1}).train()
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["checkpoint-2"]


def test_other_settings_are_not_resumed(make_trainer: Make, tmp_path: Path) -> None:
    make_trainer(**RUN).train()
    for changed in ({"seed": 5}, {"advantage_scaling": "objective"}, {"average_routers": True}):
        with pytest.raises(CheckpointError, match=next(iter(changed))):
            make_trainer(**{**RUN, **changed}).train(resume_from_checkpoint=True)


def test_a_second_run_is_refused(make_trainer: Make) -> None:
    trainer = make_trainer(max_steps=1)
    trainer.train()
    before = parameters(trainer)
    with pytest.raises(HoEError, match="has run"):
        trainer.train()
    for x, y in zip(before, parameters(trainer), strict=True):
        assert torch.equal(x, y)


def test_what_is_saved_during_a_run_is_trained(make_trainer: Make, toys: ModuleType, tmp_path: Path) -> None:
    from transformers import TrainerCallback

    class Saves(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            trainer.save_model(str(tmp_path / "early"))

    trainer = make_trainer(max_steps=1, constructor={"callbacks": [Saves()]})
    trainer.train()
    loaded = PeftModel.from_pretrained(toys.make_base(), tmp_path / "early")
    trained = trainer.policy_model.state_dict()
    saved = {key: value for key, value in loaded.state_dict().items() if "hoe_router" in key}
    assert sorted(saved) == sorted(key for key in trained if "hoe_router" in key) != []
    assert all(torch.equal(value, trained[key]) for key, value in saved.items())


def test_epochs_save_log_and_evaluate(make_trainer: Make, toys: ModuleType, tmp_path: Path) -> None:
    """8 prompts, 4 an update, two epochs: twice, not never."""
    trainer = make_trainer(
        constructor={"train_dataset": toys.PROMPTS[:8], "eval_dataset": toys.PROMPTS[8:14]}, max_steps=-1, num_train_epochs=2,
        per_device_train_batch_size=4, save_strategy="epoch", logging_strategy="epoch", eval_strategy="epoch",
    )  # fmt: skip
    trainer.train()
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["checkpoint-2", "checkpoint-4"]
    history = trainer.state.log_history
    assert [entry["epoch"] for entry in history if "loss/policy_avg" in entry] == [1.0, 2.0]
    assert [entry["step"] for entry in history if "eval_reward/low" in entry] == [2, 4]


def test_the_best_router_is_kept_and_loaded(make_trainer: Make, toys: ModuleType, tmp_path: Path) -> None:
    trainer = make_trainer(
        constructor={"eval_dataset": toys.PROMPTS[:6]}, max_steps=4, save_strategy="steps", save_steps=1, save_total_limit=1,
        eval_strategy="steps", eval_steps=1, load_best_model_at_end=True, metric_for_best_model="reward/high",
    )  # fmt: skip
    trainer.train()
    rewards = [entry["eval_reward/high"] for entry in trainer.state.log_history if "eval_reward/high" in entry]
    best = 1 + max(range(4), key=lambda step: rewards[step])
    assert trainer.state.best_model_checkpoint == str(tmp_path / "run" / f"checkpoint-{best}")
    assert {path.name for path in (tmp_path / "run").iterdir()} == {f"checkpoint-{best}", "checkpoint-4"}
    saved = torch.load(tmp_path / "run" / f"checkpoint-{best}" / "router_training.pt", weights_only=True)["router"]
    assert all(torch.equal(value, saved[name]) for name, value in trainer.router.state_dict().items())
