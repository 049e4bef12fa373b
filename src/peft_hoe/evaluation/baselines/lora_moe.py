"""An ordinary mixture of LoRA experts: one router over all of them, which knows no preference.

This stands in for LoRAMoE (Dou et al. 2024) with the project's own parts, and differs from it: the experts are the policies'
(task-SVD) and stay as they are; only the router trains, with reinforcement learning on the mean of the objectives (weights 1/N,
which do not move), not the experts and router together by supervised fine-tuning. The result is one point of the reward
space: it writes the same whatever the preference.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ...errors import HoEError
from ...preference import FloatArray, uniform
from ..methods.fingerprints import Source, source_digest
from ..methods.hoe import HoEMethod
from .adapters import built_adapter, check_made_with, load_adapted

# Of `training`: what may be others when a mixture is found again, for it says how a run is computed and told.
_HOW_COMPUTED = (
    "use_cpu", "disable_tqdm", "report_to", "logging_strategy", "logging_steps", "per_device_train_batch_size",
    "gradient_accumulation_steps", "local_rollout_forward_batch_size", "save_strategy", "save_steps", "save_total_limit",
)  # fmt: skip


def lora_moe(
    base: Source,
    policies: Mapping[str, Source],
    *,
    tokenizer: Any,
    folder: Source,
    rewards: Any = None,
    train_dataset: Any = None,
    normalizer: Any = None,
    training: Mapping[str, Any] | None = None,
    decoding: Any = None,
    model_options: Mapping[str, Any] | None = None,
    **build: Any,
) -> OnePoint:
    """A mixture of the policies' experts, trained once in `folder/lora_moe` and found there afterwards.

    Args:
        base: directory or Hub id.
        policies: `{objective: directory or Hub id}`.
        tokenizer: the policies'.
        folder: of adapters.
        rewards: as for HoERouterTrainer; needed for training only, like the next three.
        train_dataset: rows with `prompt`.
        normalizer: scale of the rewards; default measured.
        training: fields of HoERouterConfig, such as `{"max_steps": 60, "learning_rate": 0.05}`.
        decoding: what `Decoding.of` takes; default greedy, 64 new tokens.
        model_options: of `from_pretrained`.
        build: options of `build_adapter`.

    Raises:
        HoEError: it is not trained yet, and there are no rewards or prompts to train it with; or the one that is found was made
            of another base or other policies, or with other options than those given.
    """
    trained = Path(folder) / "lora_moe" / "trained"
    made_with = trained.with_name("trained.json")
    request = _request(base, policies, build, training)
    if not (trained / "adapter_config.json").is_file():
        if rewards is None or train_dataset is None:
            raise HoEError(
                f"there is no trained mixture in {trained}; give rewards= and train_dataset= to train one there",
                argument="rewards" if rewards is None else "train_dataset",
            )
        router = {"preference": uniform(len(policies)).tolist(), "name": "mixture", "votes_for": "all"}
        untrained = built_adapter(
            trained.with_name("untrained"), base, policies, routers=[router], **{"interpolation": "linear", **build}
        )
        model = load_adapted(base, untrained, model_options)
        made_with.write_text(json.dumps(request) + "\n", encoding="utf-8")  # first, for the mixture is complete at once
        _train(model, tokenizer, rewards, train_dataset, normalizer, dict(training or {}), trained)
    else:
        given = {what: value for what, value in request.items() if value}  # options that are left out may be any
        check_made_with(trained, made_with, given, "trained")
    return OnePoint(load_adapted(base, trained, model_options), tokenizer, decoding=decoding)


def _request(
    base: Source, policies: Mapping[str, Source], build: Mapping[str, Any], training: Mapping[str, Any] | None
) -> dict[str, Any]:
    """What tells a mixture from another one, as plain JSON; rewards and prompts are not compared."""
    training = {name: value for name, value in (training or {}).items() if name not in _HOW_COMPUTED}
    given = {"build options": build, "training": training}
    return {
        "base": source_digest(base),
        "policies": {name: source_digest(source) for name, source in policies.items()},
        **{what: {name: str(options[name]) for name in sorted(options)} for what, options in given.items()},
    }


def _train(
    model: Any, tokenizer: Any, rewards: Any, dataset: Any, normalizer: Any, settings: dict[str, Any], trained: Path
) -> None:
    """Train the router, and save the adapter in one step."""
    from ...training import HoERouterConfig, HoERouterTrainer

    part = trained.with_name("unfinished")
    shutil.rmtree(part, ignore_errors=True)
    args = HoERouterConfig(output_dir=str(part), router="mixture", **{"step": 0.0, **settings})  # step 0: u stays λ
    trainer = HoERouterTrainer(
        args=args, processing_class=tokenizer, model=model, reward_model=rewards, train_dataset=dataset, normalizer=normalizer
    )  # fmt: skip
    trainer.train()
    trainer.save_model(str(part))
    part.rename(trained)


class OnePoint(HoEMethod):
    """A model that is steered to the centroid, whatever the preference."""

    name = "LoRAMoE-like"

    def __call__(self, prompts: Sequence[Any], preferences: FloatArray) -> list[str]:
        """Complete K prompts; greedily each distinct one is completed once."""
        n = len(self.objectives)
        if self.completer.decoding.do_sample:
            return super().__call__(prompts, np.tile(uniform(n), (len(prompts), 1)))
        keys = [str(prompt) for prompt in prompts]
        distinct = dict(zip(keys, prompts, strict=True))
        found = super().__call__(list(distinct.values()), np.tile(uniform(n), (len(distinct), 1)))
        texts = dict(zip(distinct, found, strict=True))
        return [texts[key] for key in keys]
