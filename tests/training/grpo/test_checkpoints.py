from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from transformers import TrainerCallback

from peft_hoe import CheckpointError, HoEError, RewardNormalizer

pytestmark = pytest.mark.slow

pytest.importorskip("trl")

Make = Callable[..., Any]
RUN = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}


def parameters(trainer: Any) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in trainer.router.parameters()]


@pytest.mark.parametrize(
    "settings",
    [
        {"average_routers": True, "gradient_accumulation_steps": 2, "beta": 0.1},
        {"steps_per_generation": 4, "save_steps": 1, "num_generations": 8},  # a checkpoint between two generations
        {"num_iterations": 2, "save_steps": 3, "max_steps": 5},
    ],
)
def test_resumed_run_equals_uninterrupted(
    make_grpo: Make, toys: ModuleType, tmp_path: Path, settings: dict[str, Any]
) -> None:
    """Router, weights, payoff table, optimizer, schedule, prompts, random numbers and what is left of a generation."""
    run = {**RUN, **settings}
    whole = make_grpo(
        model=toys.make_policy().double(),
        output_dir=tmp_path / "whole",
        constructor={"normalizer": None},
        payoff_prompts=8,
        **run,
    )
    whole.train()
    torch.manual_seed(99)  # a new process starts somewhere else
    resumed = make_grpo(
        model=toys.make_policy().double(), output_dir=tmp_path / "resumed", constructor={"normalizer": None}, **run
    )
    resumed.measure_payoff = lambda: pytest.fail("a checkpoint brings its own table")
    resumed.train(resume_from_checkpoint=tmp_path / "whole" / f"checkpoint-{run['save_steps']}")
    assert resumed.state.global_step == run["max_steps"]
    for x, y in zip(parameters(whole), parameters(resumed), strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=1e-7)
    assert whole.weights.log_w == pytest.approx(resumed.weights.log_w, abs=1e-9)
    assert whole.weights.updates == resumed.weights.updates
    np.testing.assert_array_equal(whole.normalizer.payoff, resumed.normalizer.payoff)
    for x, y in zip(whole.policy.parameters(), resumed.policy.parameters(), strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=1e-7)


def test_resuming_in_a_later_epoch_sees_the_same_prompts(make_grpo: Make, toys: ModuleType, tmp_path: Path) -> None:
    """TRL shuffles anew in every epoch; 6 prompts are 3 updates of 2."""
    run = {**RUN, "max_steps": 6, "save_steps": 4, "constructor": {"train_dataset": toys.PROMPTS[:6]}}
    whole = make_grpo(model=toys.make_policy().double(), output_dir=tmp_path / "whole", **run)
    whole.train()
    resumed = make_grpo(model=toys.make_policy().double(), output_dir=tmp_path / "resumed", **run)
    resumed.train(resume_from_checkpoint=tmp_path / "whole" / "checkpoint-4")
    assert whole.weights.log_w == pytest.approx(resumed.weights.log_w, abs=1e-9)
    for x, y in zip(parameters(whole), parameters(resumed), strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=1e-7)


@pytest.mark.filterwarnings("ignore:mtime may not be reliable")  # transformers 4.57, of checkpoints within a second
def test_a_checkpoint_is_an_adapter(make_grpo: Make, toys: ModuleType, tmp_path: Path, agree: Make) -> None:
    model = toys.make_policy()
    model.set_preference([0.6, 0.4])
    trainer = make_grpo(model=model, **{**RUN, "save_total_limit": 1})
    trainer.train()
    assert [path.name for path in (tmp_path / "run").glob("checkpoint-*")] == ["checkpoint-4"]
    loaded = PeftModel.from_pretrained(toys.make_base(), tmp_path / "run" / "checkpoint-4").eval()
    assert [router.trained for router in loaded.peft_config["default"].routers] == [True, False]
    assert dict(loaded.preference) == {"low": 0.6, "high": 0.4}  # the user's, not the run's
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        expected = model(ids, preference=[0.25, 0.75]).logits
        agree(loaded(ids, preference=[0.25, 0.75]).logits, expected)
    trainer.save_model(str(tmp_path / "final"))
    assert (tmp_path / "final" / "adapter_model.safetensors").is_file()


def test_average_is_what_is_kept(make_grpo: Make) -> None:
    trainer = make_grpo(average_routers=True, max_steps=3)
    seen: list[torch.Tensor] = []
    add = trainer.average.add

    def note(values: Any) -> None:
        seen.append(values["linears.0.weight"].clone())
        add(values)

    trainer.average.add = note
    trainer.train()
    kept = trainer.router.layers[0].hoe_router["default"].weight[trainer.router.rows]
    torch.testing.assert_close(kept, torch.stack(seen).mean(0))
    assert len(seen) == 3
    assert not torch.equal(kept, seen[-1])


@pytest.mark.parametrize("average", [False, True])
def test_the_best_checkpoint_is_what_is_kept(make_grpo: Make, toys: ModuleType, tmp_path: Path, average: bool) -> None:
    class First(TrainerCallback):
        def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **kwargs: Any) -> None:
            metrics["eval_first"] = -state.global_step

    trainer = make_grpo(
        constructor={"eval_dataset": toys.PROMPTS[:2], "callbacks": [First()]}, max_steps=3, save_steps=1,
        save_strategy="steps", eval_strategy="steps", eval_steps=1, load_best_model_at_end=True,
        metric_for_best_model="eval_first", greater_is_better=True, average_routers=average,
    )  # fmt: skip
    trainer.train()
    assert trainer.state.global_step == 3
    first = PeftModel.from_pretrained(toys.make_base(), tmp_path / "run" / "checkpoint-1")
    last = PeftModel.from_pretrained(toys.make_base(), tmp_path / "run" / "checkpoint-3")
    kept, best, other = (toys.rows_of(model, "r0") for model in (trainer.policy, first, last))
    assert all(torch.equal(x, y) for x, y in zip(kept, best, strict=True))
    assert not any(torch.equal(x, y) for x, y in zip(kept, other, strict=True))


def test_a_checkpoint_that_does_not_fit_is_refused(make_grpo: Make) -> None:
    trainer = make_grpo(**RUN)
    with pytest.raises(CheckpointError, match="no checkpoint"):
        trainer.train(resume_from_checkpoint=True)
    trainer.train()
    with pytest.raises(CheckpointError, match="'router': 'r0'"):
        make_grpo(router="r1", **RUN).train(resume_from_checkpoint=True)
    with pytest.raises(HoEError, match="mu"):
        make_grpo(mu=0.5, **RUN).train(resume_from_checkpoint=True)
    for changed in ({"seed": 5}, {"advantage_scaling": "objective"}, {"num_generations": 8}):
        with pytest.raises(CheckpointError, match=next(iter(changed))):
            make_grpo(**{**RUN, **changed}).train(resume_from_checkpoint=True)


def test_resume_true_takes_the_last(make_grpo: Make) -> None:
    """The checkpoint's payoff table counts, not the one that was passed."""
    make_grpo(**{**RUN, "max_steps": 3, "save_steps": 1}).train()
    other = RewardNormalizer([[2.0, 0.0], [0.0, 2.0]], ["low", "high"])
    trainer = make_grpo(constructor={"normalizer": other}, **RUN)
    trainer.train(resume_from_checkpoint=True)
    assert trainer.weights.updates == 4
    assert trainer.normalizer.payoff.tolist() == [[0.65, 0.45], [0.45, 0.65]]


def test_a_second_run_is_refused(make_grpo: Make) -> None:
    trainer = make_grpo(max_steps=1)
    trainer.train()
    before = parameters(trainer)
    with pytest.raises(HoEError, match="has run"):
        trainer.train()
    for x, y in zip(before, parameters(trainer), strict=True):
        assert torch.equal(x, y)


def test_a_failing_reward_leaves_the_last_checkpoint(make_grpo: Make, toys: ModuleType, tmp_path: Path) -> None:
    calls = []

    def short(prompts: Any, completions: Any) -> list[float]:
        calls.append(1)
        return [0.5] * (len(completions) - (len(calls) > 2))

    rewards = {"low": short, "high": toys.high}
    trainer = make_grpo(constructor={"reward_funcs": rewards}, **{**RUN, "save_steps": 1})
    with pytest.raises(HoEError, match="7 values for 8 completions"):
        trainer.train()
    assert sorted(path.name for path in (tmp_path / "run").glob("checkpoint-*")) == ["checkpoint-1", "checkpoint-2"]
