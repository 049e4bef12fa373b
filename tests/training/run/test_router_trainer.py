"""What all trainers of routers do alike."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from transformers import LlamaForSequenceClassification, TrainerCallback

from peft_hoe import CheckpointError, ExpertError, HoEConfig, HoEError, PreferenceError, RouterSpec

Make = Callable[..., Any]
TRAINERS = ["make_trainer", "make_grpo", "make_dpo_trainer", "make_distillation"]


@pytest.fixture(params=TRAINERS)
def make(request: pytest.FixtureRequest) -> Make:
    """A trainer of each kind on the toy."""
    found: Make = request.getfixturevalue(request.param)
    return found


class FailOnce(TrainerCallback):
    """Before the run counts the step."""

    failed = False

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not self.failed:
            self.failed = True
            raise RuntimeError("stop here")


def test_a_run_that_failed_after_a_step_is_over(make: Make, toys: ModuleType) -> None:
    """Also where a user's callback fails at the end of the first one: its schedule is used up."""
    model = toys.make_policy()
    trainer = make(model=model, constructor={"callbacks": [FailOnce()]})
    with pytest.raises(RuntimeError, match="stop here"):
        trainer.train()
    assert toys.is_trained(model)
    with pytest.raises(HoEError, match="this trainer has run"):
        trainer.train()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["make_trainer", "make_grpo"])
def test_a_run_that_failed_in_its_first_step_begins_anew(
    kind: str, request: pytest.FixtureRequest, toys: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the backward pass of its second micro-batch: weights, gradients and completions are as if it had not been."""
    make: Make = request.getfixturevalue(kind)
    settings = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "num_sample_generations": 0}
    if kind == "make_grpo":
        del settings["num_sample_generations"]
    untroubled, trainer = make(**settings), make(**settings)
    calls = []
    backward = trainer.accelerator.backward

    def fails(*args: Any, **others: Any) -> None:
        calls.append(1)
        if len(calls) == 2:
            raise RuntimeError("out of memory")
        backward(*args, **others)

    monkeypatch.setattr(trainer.accelerator, "backward", fails)
    with pytest.raises(RuntimeError, match="out of memory"):
        trainer.train()
    assert trainer.weights.updates == 0
    for each in (untroubled, trainer):
        torch.manual_seed(5)
        each.train()
    assert trainer.weights.log_w.tolist() == untroubled.weights.log_w.tolist()
    for x, y in zip(trainer.router.parameters(), untroubled.router.parameters(), strict=True):
        assert torch.equal(x, y)


def test_the_users_dropout_is_put_back(make: Make, toys: ModuleType) -> None:
    model = toys.make_policy()
    dropped = model.get_base_model().model.dropped = torch.nn.Dropout(0.25)
    trainer = make(model=model)
    assert dropped.p == 0.25
    trainer.train()
    assert dropped.p == 0.25


def test_a_run_shows_no_warning_of_others(make: Make, toys: ModuleType) -> None:
    """Of what TRL, PEFT, transformers and torch tell each other."""
    model = toys.make_policy()
    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("always")
        make(model=model, save_strategy="steps", save_steps=1).train()
    found = [str(warning.message) for warning in shown]
    assert [text for text in found if not text.startswith("Could not find a config file in  - ")] == []  # peft 0.18


def test_an_adapter_is_put_on_a_plain_model(make: Make, toys: ModuleType, tmp_path: Path) -> None:
    """As a script of TRL passes `peft_config`; a new adapter's experts are zero, and the remedy is said."""
    toys.make_policy().save_pretrained(tmp_path / "adapter")
    trainer = make(model=toys.make_base(), constructor={"peft_config": tmp_path / "adapter"})
    trainer.train()
    assert toys.is_trained(trainer.policy)
    config = HoEConfig(
        objectives=["low", "high"], routers=[[0.5, 0.5]], target_modules="all-linear", task_type="CAUSAL_LM"
    )
    with pytest.raises(HoEError, match=r"experts are all zero.*build_adapter.*peft_config=directory"):
        make(model=toys.make_base(), constructor={"peft_config": config})
    with pytest.raises(HoEError, match="model is a PeftModel and peft_config is given too"):
        make(model=toys.make_policy(), constructor={"peft_config": tmp_path / "adapter"})


@pytest.mark.parametrize(
    ("constructor", "text"),
    [
        ({"model": "org/name", "peft_config": "adapter"}, "model is the name 'org/name'; load it"),
        ({"model": "org/name"}, "model is the name 'org/name'; load it"),
        (
            {"peft_config": "nowhere/at/all"},
            "cannot load the adapter that peft_config names, 'nowhere/at/all': Can't find",
        ),
        ({}, r"LlamaForCausalLM has no HoE adapter; build one from policies with peft_hoe\.build_adapter and load it"),
    ],
)
def test_what_is_no_model_with_an_adapter_is_named(
    make: Make, toys: ModuleType, constructor: dict[str, Any], text: str
) -> None:
    """As TRL's trainers take names and plain models; an AttributeError told nothing."""
    given = {"model": toys.make_base(), **constructor}
    with pytest.raises(HoEError, match=text):
        make(model=given.pop("model"), constructor=given)


@pytest.mark.parametrize("kind", ["make_trainer", "make_grpo", "make_distillation"])
def test_evaluation_sets_by_name(kind: str, request: pytest.FixtureRequest, toys: ModuleType) -> None:
    make: Make = request.getfixturevalue(kind)
    rows = toys.TEXTS if kind == "make_distillation" else toys.PROMPTS
    found = make(constructor={"eval_dataset": {"a": rows[:2], "b": rows[2:4]}}).evaluate()
    for name in "ab":
        assert any(key.startswith(f"eval_{name}_") for key in found)


@pytest.mark.slow
def test_a_longer_schedule_goes_on_at_its_own_rate(make: Make, tmp_path: Path) -> None:
    """After a schedule that has come down to 0, the first update of the longer one moves the router."""
    settings = {"save_strategy": "steps", "save_steps": 2, "output_dir": tmp_path / "run", "average_routers": False}
    make(max_steps=2, **settings).train()
    longer = make(max_steps=4, **settings)
    seen: list[float] = []

    class Look(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            seen.append(longer.optimizer.param_groups[0]["lr"])

    longer.add_callback(Look())
    longer.train(resume_from_checkpoint=True)
    assert seen == pytest.approx([0.025, 0.0125])  # linear from 0.05 over 4 updates


@pytest.fixture
def padded(toys: ModuleType) -> Any:
    """A tokenizer whose padding token was added to it, and not to the model: scripts of TRL do so."""
    return toys.make_padded_tokenizer()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["make_trainer", "make_distillation"])
def test_padding_that_the_model_does_not_know(
    kind: str, request: pytest.FixtureRequest, toys: ModuleType, padded: Any
) -> None:
    """Prompts and responses of unequal lengths, own completions, payoff table, a module as reward: as with another token."""
    make: Make = request.getfixturevalue(kind)
    routers = []
    for tokenizer in (toys.make_tokenizer(), padded):
        torch.manual_seed(1)
        constructor: dict[str, Any] = {"processing_class": tokenizer}
        changes: dict[str, Any] = {"lmbda": 1.0, "max_new_tokens": 12}
        if kind == "make_trainer":
            config = toys.make_base().config
            models = [LlamaForSequenceClassification(config) for _ in range(2)]  # two outputs each
            constructor |= {"reward_model": models[0], "value_model": models[1], "normalizer": None}
            changes = {"stop_token": "eos", "response_length": 12, "payoff_prompts": 8}
        trainer = make(constructor=constructor, **changes)
        torch.manual_seed(2)
        trainer.train()
        routers.append([parameter.detach().clone() for parameter in trainer.router.parameters()])
    assert all(torch.equal(x, y) for x, y in zip(*routers, strict=True))


@pytest.mark.parametrize("kind", ["make_grpo", "make_dpo_trainer"])
def test_padding_that_trl_would_look_up_is_refused(kind: str, request: pytest.FixtureRequest, padded: Any) -> None:
    make: Make = request.getfixturevalue(kind)
    with pytest.raises(HoEError, match=r"'\[PAD\]' is token 32, for which the model has no embedding"):
        make(constructor={"processing_class": padded})


def test_an_adapter_that_is_disabled_or_merged_is_refused(make: Make, toys: ModuleType) -> None:
    """PPO trained a disabled one to no effect and marked its router as trained; DPO took a merged one apart."""
    model = toys.make_policy()
    trainer = make(model=model)
    model.base_model.disable_adapter_layers()
    with pytest.raises(PreferenceError, match=r"adapter 'default' is disabled.*enable_adapter_layers\(\)"):
        trainer.train()
    model.base_model.enable_adapter_layers()
    model.set_preference([1, 0])
    model.merge_adapter()
    with pytest.raises(PreferenceError, match=r"adapter 'default' is merged.*unmerge_adapter\(\)"):
        trainer.train()
    assert not toys.is_trained(model)
    model.unmerge_adapter()
    trainer.train()
    assert toys.is_trained(model)


@pytest.mark.parametrize("kind", ["make_trainer", "make_dpo_trainer"])
def test_a_reference_that_is_the_policy_itself_is_refused(
    kind: str, request: pytest.FixtureRequest, toys: ModuleType
) -> None:
    """The base that was given to PEFT carries the adapter: the KL divergence from it was 0 throughout."""
    make: Make = request.getfixturevalue(kind)
    model = toys.make_policy()
    for reference in (model, model.get_base_model()):
        with pytest.raises(HoEError, match=r"ref_model carries the policy's own adapter.*load the base a second time"):
            make(model=model, constructor={"ref_model": reference})
    changes = {"kl_coef": 0.05} if kind == "make_trainer" else {}
    make(model=model, constructor={"ref_model": toys.make_base()}, **changes)


@pytest.mark.parametrize("kind", ["make_trainer", "make_grpo", "make_distillation"])
@pytest.mark.parametrize(("rows", "text"), [([], "eval_dataset is empty"), ({}, "eval_dataset is empty")])
def test_an_empty_evaluation_set_is_told(
    kind: str, request: pytest.FixtureRequest, toys: ModuleType, rows: Any, text: str
) -> None:
    make: Make = request.getfixturevalue(kind)
    with pytest.raises(HoEError, match=text):
        make(constructor={"eval_dataset": rows})
    with pytest.raises(HoEError, match="the evaluation dataset 'b' is empty; give it at least one row"):
        make(constructor={"eval_dataset": {"a": toys.PROMPTS[:2], "b": rows or []}})


def test_a_token_that_was_added_to_the_tokenizer_alone_is_named(make: Make, toys: ModuleType) -> None:
    """In a prompt, a text or a pair; it was an IndexError deep in the model."""
    tokenizer = toys.make_tokenizer()
    tokenizer.add_tokens(["<new>"])
    rows = [{"prompt": "w1 <new>", "completion": "w2"}] * 16
    pairs = [{"prompt": "w1", "chosen": "<new>", "rejected": "w2", "objective": name} for name in ("low", "high")] * 8
    kind = type(make(constructor={})).__name__
    constructor = {"processing_class": tokenizer, "train_dataset": pairs if "DPO" in kind else rows}
    trainer = make(constructor=constructor)
    with pytest.raises(
        HoEError, match=r"token 32 \('<new>'\) in the (prompts|texts|pairs) is none of the 32 that the model"
    ):
        trainer.train()


@pytest.mark.parametrize("name", ["ref_model", "value_model"])
def test_a_model_with_fewer_tokens_is_named(make_trainer: Make, toys: ModuleType, name: str) -> None:
    other = LlamaForSequenceClassification(toys.make_base().config) if name == "value_model" else toys.make_base()
    other.resize_token_embeddings(4)
    with pytest.raises(HoEError, match=f"in the texts is none of the 4 that the {name} knows") as caught:
        make_trainer(constructor={name: other}, kl_coef=0.05).train()
    assert caught.value.argument == name


def test_an_adapter_that_is_not_active_is_refused(make: Make, toys: ModuleType) -> None:
    model = toys.make_policy()
    model.add_adapter("second", model.peft_config["default"])
    for name, parameter in model.named_parameters():
        if "hoe_B.second" in name:
            torch.nn.init.ones_(parameter)
    with pytest.raises(ExpertError, match=r"'second' is not active.*set_adapter\('second'\)"):
        make(model=model, model_adapter_name="second")


@pytest.mark.slow
def test_a_finished_router_belongs_to_its_weights(toys: ModuleType, tmp_path: Path) -> None:
    """How fast the weights forget has another name in GRPO's configuration; a resumed run compares it nevertheless."""
    pytest.importorskip("trl")
    from peft_hoe.training.every_router import train_routers

    def run(resume: bool, **changes: Any) -> None:
        one = toys.make_grpo_trainer(None, tmp_path, {}, max_steps=1, **changes)
        train_routers(
            toys.make_policy(), one.args, trainer="grpo", routers=["r0"], train_dataset=toys.PROMPTS,
            normalizer=one.normalizer, reward_funcs=toys.REWARDS, processing_class=toys.make_tokenizer(),
            resume_from_checkpoint=resume,
        )  # fmt: skip

    run(False)
    run(True)
    with pytest.raises(CheckpointError, match=r"'beta': 0\.5"):
        run(True, objective_beta=0.5)


@pytest.mark.parametrize(("kind", "rate"), [("token", 3.2 / 32), ("module", 0.3)])
def test_the_rate_goes_by_width_and_kind_and_the_arguments_stay(
    toys: ModuleType, tmp_path: Path, kind: str, rate: float
) -> None:
    """Not written into the arguments: a router of another kind may train with them."""
    model = toys.make_policy(routers=[RouterSpec([0.25, 0.75], kind=kind)])
    assert model.config.hidden_size == 32
    for make in (toys.make_trainer, *((toys.make_grpo_trainer,) if find_spec("trl") else ())):
        trainer = make(model, tmp_path, {}, learning_rate=None)
        trainer.create_optimizer()
        assert [group["lr"] for group in trainer.optimizer.param_groups][:2] == [rate, rate]
        assert trainer.args.learning_rate is None
