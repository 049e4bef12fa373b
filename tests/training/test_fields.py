"""Every field of the configurations of GRPO, DPO and distillation is used or refused by name, the fields of TRL included.

`tests/training/ppo/test_arguments.py` does it for HoERouterConfig.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import transformers
from packaging.version import Version

from peft_hoe import HoEError
from peft_hoe.training.run.refused_arguments import REFUSED_BY_ALL, refuse_changed

pytest.importorskip("trl")

from peft_hoe.training.distillation import config as distillation
from peft_hoe.training.dpo import config as dpo
from peft_hoe.training.grpo import config as grpo

CONFIGURATIONS = {
    "make_grpo": grpo.HoEGRPOConfig,
    "make_dpo_trainer": dpo.HoEDPOConfig,
    "make_distillation": distillation.HoEDistillationConfig,
}
OWN = {"make_grpo": grpo.REFUSED, "make_dpo_trainer": dpo.REFUSED, "make_distillation": distillation.REFUSED}
REFUSED = {maker: {**REFUSED_BY_ALL, **own, "deepspeed": "", "fsdp": ""} for maker, own in OWN.items()}
FIELDS = {
    maker: {field.name: field.default for field in dataclasses.fields(kind) if field.init}
    for maker, kind in CONFIGURATIONS.items()
}

# Read by TrainingArguments itself when it starts.
SET_UP = {"ddp_timeout", "local_rank", "tf32", "torch_compile", "use_transformers_paged"}
# For scripts, which TRL's and transformers' own trainers do not read either.
SCRIPTS = {"do_train", "do_eval", "do_predict", "resume_from_checkpoint"}
# Where model or tokenizer have to be loaded; both are given here.
LOADING = {"trust_remote_code"}
# They mean something beside another field or argument only.
BESIDE = {
    "fsdp_config": "fsdp", "length_column_name": "train_sampling_strategy", "liger_kernel_config": "use_liger_kernel",
    "ref_model_mixup_alpha": "sync_ref_model", "ref_model_sync_steps": "sync_ref_model",
    "prediction_loss_only": "compute_metrics", "precompute_ref_batch_size": "precompute_ref_log_probs",
    "discopop_tau": "loss_type", "log_completions_hub_repo": "log_completions", "use_bias_correction_kl": "beta",
    "transformers_continuous_batching_config": "use_transformers_continuous_batching",
}  # fmt: skip
FAMILIES = (
    "vllm_",
    "entropy_coef",
    "entropy_target",
    "sapo_",
    "vespo_",
)  # beside use_vllm, use_adaptive_entropy and a loss_type
# Read by callbacks of reports, and by what pushes to the Hub.
REPORTS = {"project", "run_name", "trackio_space_id", "trackio_bucket_id", "trackio_static_space_id"}
HUB = {"hub_model_id", "hub_token", "hub_private_repo", "hub_revision", "hub_strategy", "hub_always_push"}
ELSEWHERE = SET_UP | SCRIPTS | LOADING | set(BESIDE) | REPORTS | HUB
# What writes, compares or checks all fields does not use them.
NO_USE = {"__init__", "__post_init__", "__repr__", "__str__", "to_dict", "refuse_changed", "settings_to_resume"}


def other(default: Any) -> Any:
    """Another value than the default."""
    return not default if isinstance(default, bool) else "something"


@pytest.mark.parametrize(("maker", "name"), [(maker, name) for maker in FIELDS for name in sorted(REFUSED[maker])])
def test_refused_by_name(maker: str, name: str) -> None:
    if name not in FIELDS[maker]:
        pytest.skip(f"there is no {name} in these versions")
    with pytest.raises(HoEError) as caught:
        CONFIGURATIONS[maker](output_dir="run", use_cpu=True, **{name: other(FIELDS[maker][name])})
    if name not in ("deepspeed", "fsdp"):
        assert str(caught.value).startswith(f"{name}=")
        assert REFUSED[maker][name] in str(caught.value)
    assert caught.value.argument == name


def is_refused(arguments: Any, name: str) -> bool:
    """Whether a field is refused as it is, whatever the others are."""
    try:
        refuse_changed(arguments, {name: "because"})
    except HoEError as error:
        return error.argument == name
    return False


@pytest.mark.parametrize("maker", FIELDS)
def test_defaults_are_no_arguments(maker: str) -> None:
    """Also after TrainingArguments has put others in their place."""
    arguments = CONFIGURATIONS[maker](output_dir="run", use_cpu=True)
    assert [name for name in REFUSED[maker] if is_refused(arguments, name)] == []
    arguments.label_names = ["label"]
    assert [name for name in REFUSED[maker] if is_refused(arguments, name)] == ["label_names"]


SETTINGS = {
    "make_grpo": {"per_device_train_batch_size": 8, "metric_for_best_model": "reward", "average_routers": True},
    "make_dpo_trainer": {"per_device_train_batch_size": 4, "metric_for_best_model": "loss"},
    "make_distillation": {"per_device_train_batch_size": 8, "metric_for_best_model": "loss", "lmbda": 0.5},
}


@pytest.mark.slow
@pytest.mark.parametrize("maker", FIELDS)
def test_what_is_not_refused_is_read(
    maker: str, request: pytest.FixtureRequest, toys: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a run with evaluation and checkpoints, or by one that goes on from its checkpoint."""
    make: Callable[..., Any] = request.getfixturevalue(maker)
    evaluation = {
        "make_grpo": toys.PROMPTS[:4],
        "make_dpo_trainer": {name: toys.make_pairs(name) for name in toys.REWARDS},
        "make_distillation": toys.TEXTS[:4],
    }
    constructor = {"eval_dataset": evaluation[maker], **({"normalizer": None} if maker == "make_grpo" else {})}
    settings = {
        **SETTINGS[maker], "save_strategy": "steps", "save_steps": 1, "eval_strategy": "steps", "eval_steps": 1,
        "load_best_model_at_end": True, "logging_strategy": "steps", "max_steps": 2, **toys.checkpointing(),
    }  # fmt: skip
    read: set[str] = set()

    def watched(self: Any, name: str) -> Any:
        if name in FIELDS[maker]:
            caller = sys._getframe(1).f_code
            if not (
                caller.co_name in NO_USE and ("_config" in caller.co_filename or "arguments" in caller.co_filename)
            ):
                read.add(name)
        return object.__getattribute__(self, name)

    make_first = make(constructor=constructor, **settings)
    monkeypatch.setattr(CONFIGURATIONS[maker], "__getattribute__", watched)
    make_first.train()
    make(constructor=constructor, **{**settings, "max_steps": 3}).train(resume_from_checkpoint=True)
    expected = FIELDS[maker].keys() - REFUSED[maker].keys() - ELSEWHERE
    unread = sorted(name for name in expected - read if not name.startswith(FAMILIES))
    if Version(transformers.__version__) >= Version("5.23"):  # before, there are fields that are gone since
        assert unread == []
    assert sorted(REFUSED[maker].keys() & (ELSEWHERE - {"prediction_loss_only"})) == []


def test_what_another_setting_has_no_use_for_is_refused() -> None:
    """It was ignored."""
    for scale in ("group", "none"):
        with pytest.raises(HoEError, match=f"scale_rewards='{scale}' has no use") as caught:
            grpo.HoEGRPOConfig(output_dir="run", use_cpu=True, advantage_scaling="objective", scale_rewards=scale)
        assert caught.value.argument == "scale_rewards"
    for margin in ("column", "none"):
        with pytest.raises(HoEError, match=f"margin_beta is 0.1, but margin='{margin}'") as caught:
            dpo.HoEDPOConfig(output_dir="run", use_cpu=True, margin=margin, margin_beta=0.1)
        assert caught.value.argument == "margin_beta"
