"""Placing by measurement: what is kept, what leaves nothing behind, and what is refused before anything is touched."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from peft_hoe import (
    Decoding,
    ExpertError,
    HoEDistillationConfig,
    HoEError,
    HoERouterConfig,
    HoEWarning,
    RewardError,
    Sweep,
    demo,
    place,
    sweep,
    use_preference,
)
from peft_hoe.evaluation import calibrate
from peft_hoe.placing import Budget, Trial
from peft_hoe.placing.additions import parameters_of
from peft_hoe.placing.attempts import gain
from peft_hoe.tuner.functional import adapter_of
from peft_hoe.tuner.growing import layers_of

from ..evaluation.front.test_front import sweep_of

pytestmark = pytest.mark.slow
AT = [[0, 1], [0.25, 0.75], [0.5, 0.5], [0.75, 0.25], [1, 0]]
PLENTY = Budget(parameters=10_000_000)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> str:
    """An adapter of two single-objective experts on disk."""
    directory = tmp_path_factory.mktemp("adapter")
    demo.build_demo_adapter(directory, experts=[], r=4)
    return str(directory)


def swept(preferences: Any) -> SimpleNamespace:
    """A model and its sweep, on few prompts."""
    model, tokenizer = demo.load_demo_adapter(experts=[], r=4), demo.load_tokenizer()
    found = sweep(
        model, tokenizer, demo.load_prompts()[:6], demo.REWARDS, preferences, decoding=Decoding(8), progress=False
    )
    return SimpleNamespace(
        model=model, sweep=found, shared={"tokenizer": tokenizer, "rewards": demo.REWARDS}, before=state(model)
    )


@pytest.fixture
def front() -> SimpleNamespace:
    """With one preference between the corners."""
    return swept(AT[::2])


@pytest.fixture
def wide() -> SimpleNamespace:
    """With three."""
    return swept(AT)


def state(model: Any) -> tuple[dict[str, torch.Tensor], str]:
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    return tensors, json.dumps(model.peft_config["default"].to_dict())


def assert_unchanged(front: SimpleNamespace) -> None:
    """To the bit, and not a word of the configuration."""
    tensors, config = state(front.model)
    assert list(tensors) == list(front.before[0])
    assert all(torch.equal(tensor, front.before[0][name]) for name, tensor in tensors.items())
    assert config == front.before[1]


def training(tmp_path: Path, **changes: Any) -> dict[str, Any]:
    """Of routers, in a second: distillation needs no rewards."""
    args = HoEDistillationConfig(
        output_dir=str(tmp_path), max_steps=1, per_device_train_batch_size=4, gradient_accumulation_steps=1, max_new_tokens=6,
        learning_rate=0.5, save_strategy="no", logging_strategy="no", disable_tqdm=True, report_to="none", use_cpu=True,
    )  # fmt: skip
    rows = [{"prompt": text} for text in demo.load_prompts()[20:28]]
    return {"args": args, "trainer": "distill", "train_dataset": rows, **changes}


def verdicts(monkeypatch: pytest.MonkeyPatch, *shares: float) -> None:
    """What the comparisons of fronts find, one after the other; the last one from then on."""
    left = list(shares)
    monkeypatch.setattr(
        "peft_hoe.placing.attempts.gain",
        lambda after, before: (1.0, 0.0, 0.0, left.pop(0) if len(left) > 1 else left[0]),
    )


# -- the verdict ---


def test_the_gain_is_of_the_same_prompts():
    """Hypervolume 1 * 1 = 1 against (1 - 0.5) * 1 = 0.5 above the reference point; the noise of prompts is in both."""

    before, after = sweep_of([[0.5, 1.0]], [[0.5, 0.5]], spread=0.3), sweep_of([[1.0, 1.0]], [[0.5, 0.5]], spread=0.3)
    before.reference_point = after.reference_point = 0.0
    volume, low, high, share = gain(after, before)
    assert volume == pytest.approx(1.0)
    assert share == 1.0
    assert low <= 0.5 <= high
    assert high - low < 0.4  # of either front alone it would be some 0.3 / 8 ** 0.5 * 4


def test_the_same_points_in_another_order_are_no_gain():
    points, shares = [[0.13, 0.97], [0.71, 0.59], [0.83, 0.31]], [[0.25, 0.75], [0.5, 0.5], [0.75, 0.25]]
    before, after = sweep_of(points, shares, spread=0.0), sweep_of(points[::-1], shares, spread=0.0)
    before.reference_point = after.reference_point = 0.0
    assert gain(after, before)[3] == 0.0


# -- what is kept and what is not ---


def test_an_expert_that_helps_is_kept(wide, source, monkeypatch):
    verdicts(monkeypatch, 0.95, 0.5)
    told: list[str] = []
    seen: list[Trial] = []
    found = place(
        wide.model, wide.sweep, budget=PLENTY, source=source, say=told.append,
        after=lambda trial, sweep: seen.append(trial), **wide.shared,
    )  # fmt: skip
    (kept,) = found.kept
    assert (kept.kind, kept.share) == ("expert", 0.95)
    assert [trial.kept for trial in found.trials] == [True, False, False]  # one at each preference between the corners
    assert len({trial.place for trial in found.trials}) == 3
    adapter = adapter_of(wide.model)
    assert adapter.expert_names == ["cheerful", "vivid", kept.name]
    assert adapter.config.expert_preferences[-1].tolist() == list(kept.place)
    assert (
        found.parameters
        == kept.parameters
        == parameters_of(wide.model, "default")
        - sum(tensor.numel() for name, tensor in wide.before[0].items() if "hoe_" in name and "hoe_length" not in name)
    )
    assert all(torch.equal(wide.model.state_dict()[name].flatten()[: tensor.numel()], tensor.flatten())
               for name, tensor in wide.before[0].items() if "hoe_A" in name)  # fmt: skip
    assert seen == found.trials
    assert "\n".join(told) == found.story()
    assert found.story().splitlines()[-1].startswith(f"everything was tried; kept {kept.name}, ")
    assert np.array_equal(found.sweep.preferences, wide.sweep.preferences)
    again = sweep(
        wide.model, wide.shared["tokenizer"], wide.sweep.prompts, demo.REWARDS, AT, decoding=Decoding(8), progress=False
    )  # fmt: skip
    assert np.array_equal(again.rewards, found.sweep.rewards)  # the adapter as it is


def test_what_does_not_help_leaves_nothing(front, source, tmp_path, monkeypatch):
    verdicts(monkeypatch, 0.89)
    found = place(
        front.model, front.sweep, budget=PLENTY, source=source, **training(tmp_path), **front.shared
    )  # fmt: skip
    assert [trial.kind for trial in found.trials] == ["expert", "router"]
    assert not found.kept
    assert found.sweep is front.sweep
    assert_unchanged(front)


def test_a_router_is_trained_where_it_is_kept(front, tmp_path, monkeypatch):
    verdicts(monkeypatch, 1.0, 0.0)
    found = place(front.model, front.sweep, budget=PLENTY, **training(tmp_path, router_kind="module"), **front.shared)
    (router,) = front.model.peft_config["default"].routers
    assert (router.name, router.trained, router.kind) == (found.kept[0].name, True, "module")
    assert list(router.preference) == list(found.kept[0].place)
    tensors = [tensor for name, tensor in front.model.state_dict().items() if "hoe_router" in name]
    assert found.parameters == sum(tensor.numel() for tensor in tensors)
    assert len(found.trials) == 1


def test_the_weakest_preference_comes_first(wide, source, monkeypatch):
    """At [.75, .25] the front is made bad."""
    verdicts(monkeypatch, 0.0)
    wide.sweep.rewards[:, 3] -= 5.0
    found = place(wide.model, wide.sweep, budget=PLENTY, source=source, **wide.shared)
    first = found.trials[0]
    assert first.place == (0.75, 0.25)
    assert first.weakness.beyond_error > found.trials[1].weakness.beyond_error
    assert first.weakness.hull > 0


# -- budgets ---


def test_parameters_are_bounded(wide, source, tmp_path, monkeypatch):
    """An expert is too large, so no other one is tried; a router is small enough, and a second is not."""
    verdicts(monkeypatch, 1.0)
    size = sum(2 * (layer.in_features + 1) for layer in layers_of(wide.model, "default"))  # votes for two experts
    found = place(
        wide.model, wide.sweep, budget=Budget(parameters=size + 1), source=source, **wide.shared, **training(tmp_path)
    )
    expert, router, other = found.trials
    assert (expert.kind, expert.after, expert.kept) == ("expert", None, False)
    assert "more than is left of the budget" in str(expert)
    assert (router.kind, router.parameters, router.kept) == ("router", size, True)
    assert (other.kind, other.after) == ("router", None)
    assert (found.ended, found.parameters) == ("everything was tried", size)
    first = place(
        wide.model, found.sweep, budget=Budget(parameters=size), trials=found.trials, source=source, **wide.shared
    )
    assert (first.trials, first.ended) == (found.trials, f"the budget of {size:,} parameters is used")


def test_time_is_bounded(front, source, monkeypatch):
    verdicts(monkeypatch, 1.0)
    found = place(front.model, front.sweep, budget=Budget(seconds=1e-9), source=source, **front.shared)
    assert (found.trials, found.ended) == ([], "the budget of 0 seconds is used")
    assert_unchanged(front)


def test_an_interrupted_call_goes_on(wide, source, monkeypatch):
    """What was tried is not tried again, and what was kept counts."""
    verdicts(monkeypatch, 0.0)
    seen: list[Trial] = []

    def stop(trial: Trial, sweep: Sweep) -> None:
        seen.append(Trial.of(json.loads(json.dumps(trial.to_dict()))))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        place(wide.model, wide.sweep, budget=PLENTY, source=source, after=stop, **wide.shared)
    assert_unchanged(wide)
    found = place(wide.model, wide.sweep, budget=PLENTY, source=source, trials=seen, **wide.shared)
    assert found.trials[0] == seen[0]
    assert len({trial.place for trial in found.trials}) == len(found.trials) == 3


# -- what goes wrong ---


def test_a_reward_that_fails_leaves_nothing(front, source, tmp_path):
    def fails(prompts: Any, completions: Any, **columns: Any) -> list[float]:
        raise RuntimeError("out of order")

    front.shared["rewards"] = {"cheerful": fails, "vivid": demo.REWARDS["vivid"]}
    for more in ({"source": source}, training(tmp_path)):
        with pytest.raises(RewardError, match="out of order"):
            place(front.model, front.sweep, budget=PLENTY, **more, **front.shared)
        assert_unchanged(front)


def changed(**fields: Any) -> Any:
    def change(front: SimpleNamespace) -> None:
        for name, value in fields.items():
            setattr(front.sweep, name, value)

    return change


def changed_to(sweep: Any) -> Any:
    def change(front: SimpleNamespace) -> None:
        front.sweep = sweep

    return change


def empty(front: SimpleNamespace) -> None:
    front.sweep.prompts, front.sweep.rewards = [], front.sweep.rewards[:, :, :0]


def another(front: SimpleNamespace) -> None:
    front.sweep.runs[0]["calibrates"] = demo.load_demo_adapter(r=4).peft_config["default"].calibrates()


def two_runs(front: SimpleNamespace) -> None:
    front.sweep = Sweep.stack([front.sweep, front.sweep])


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        (None, {"budget": 100_000}, "budget is 100000; give a Budget"),
        (None, {"sure": 0}, "sure is 0"),
        (None, {"sure": "very"}, "sure is 'very'"),
        (changed_to("sweep"), {}, "sweep is 'sweep'; give what peft_hoe.sweep returned"),
        (None, {"source": None}, "there is nothing to place"),
        (None, {"prompts": ["others"]}, "other prompts than the sweep's"),
        (empty, {}, "is empty, or lacks rewards"),
        (another, {}, "of another adapter: its experts"),
        (changed(objectives=("calm", "vivid"), normalizer=None), {}, "of another adapter: its objectives"),
        (changed(normalizer=None), {}, "are not normalised"),
        (changed(runs=[]), {}, "says how 0 of them were made"),
        (two_runs, {}, "the sweep has 2 runs"),
        (None, {"args": object(), "train_dataset": ["Once"]}, "args is a object"),
        (None, {"trainer": "dpo", "args": object()}, "trainer is 'dpo'"),
    ],
)
def test_bad_input_changes_nothing(front, source, change, options, message):
    if change is not None:
        change(front)
    with pytest.raises(HoEError, match=message):
        place(front.model, front.sweep, **{"budget": PLENTY, "source": source, **front.shared, **options})
    assert_unchanged(front)


def test_a_model_that_cannot_be_changed_now_is_as_before(front, source):
    """Inside a block, or merged: the adapter's own error, and nothing has happened."""
    with use_preference(front.model, [0.5, 0.5]):
        with pytest.raises(ExpertError, match="a use_preference block is open"):
            place(front.model, front.sweep, budget=PLENTY, source=source, **front.shared)
        assert front.model.preference == {"cheerful": 0.5, "vivid": 0.5}
    assert_unchanged(front)


def test_where_training_ended_is_told(front, tmp_path, monkeypatch):
    """With `auto_stop`; here the bound is the end."""
    verdicts(monkeypatch, 0.0)
    args = HoERouterConfig(
        output_dir=str(tmp_path), auto_stop=True, max_steps=1, per_device_train_batch_size=4, gradient_accumulation_steps=1,
        response_length=6, save_strategy="no", logging_strategy="no", disable_tqdm=True, report_to="none", use_cpu=True,
        num_sample_generations=0,
    )  # fmt: skip
    told: list[str] = []
    table = {"args": args, "train_dataset": [{"prompt": text} for text in demo.load_prompts()[20:28]]}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", HoEWarning)  # eight prompts make no scale
        place(front.model, front.sweep, budget=PLENTY, say=told.append, **table, **front.shared)
    assert told[0] == "  router 'r0': the worst gap was not looked at, which takes 30 updates; there were 1"
    assert_unchanged(front)


def test_routers_need_prompts(front, tmp_path):
    with pytest.raises(HoEError, match="routers need train_dataset="):
        place(front.model, front.sweep, budget=PLENTY, **training(tmp_path, train_dataset=None), **front.shared)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "the budget is empty"),
        ({"parameters": 0}, "the budget of parameters is 0; it must be a number above 0"),
        ({"seconds": -1.0}, "the budget of seconds is -1"),
        ({"parameters": 10.5}, "give a whole number"),
        ({"seconds": float("inf")}, "finite"),
        ({"seconds": float("nan")}, "above 0"),
        ({"seconds": "an hour"}, "seconds is 'an hour'; it must be a number"),
        ({"parameters": [10]}, r"parameters is \[10\]"),
        ({"parameters": True}, "parameters is True"),
    ],
)
def test_a_budget_is_above_nothing(given, message):
    with pytest.raises(HoEError, match=message):
        Budget(**given)


def test_a_calibration_is_dropped_with_a_word(front, source, monkeypatch):
    """Once, where something is kept; what is not kept brings it back."""
    calibrate(front.model, front.sweep)
    front.before = state(front.model)
    verdicts(monkeypatch, 0.0)
    place(front.model, front.sweep, budget=PLENTY, source=source, **front.shared)
    assert_unchanged(front)
    verdicts(monkeypatch, 1.0)
    with pytest.warns(HoEWarning, match="so it is dropped") as told:
        place(front.model, front.sweep, budget=PLENTY, source=source, **front.shared)
    assert sum("so it is dropped" in str(warning.message) for warning in told) == 1
    assert front.model.peft_config["default"].calibration is None
