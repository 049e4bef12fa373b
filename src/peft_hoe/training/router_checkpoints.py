"""Saving and resuming of HoERouterTrainer."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

from accelerate.utils import gather_object

from ..errors import CheckpointError
from ..tuner.functional import mark_trained
from .averages import RunningMean
from .checkpoints import read_state, resume_folder, rng_state, rotate, set_rng_state, write_state
from .normalization import RewardNormalizer
from .objective_weights import ObjectiveWeights
from .trained_router import TrainedRouter

# Settings without which a resumed run would not be the uninterrupted one.
_SAME = ("seed", "advantage_scaling", "average_routers", "temperature", "response_length")


class RouterCheckpoints:
    """The part of the trainer that writes and reads what a run depends on."""

    args: Any
    accelerator: Any
    state: Any
    model: Any
    policy_model: Any
    optimizer: Any
    lr_scheduler: Any
    router: TrainedRouter
    weights: ObjectiveWeights
    normalizer: RewardNormalizer | None
    average: RunningMean | None
    is_fsdp_enabled: bool
    is_deepspeed_enabled: bool
    _critic: Any
    run: str | None = None  # of `train_routers`: which one its checkpoints belong to

    def put_router(self) -> None:
        """Write the trained router, or its mean over the updates, into its place in the model, and mark it."""
        averaged = self.average is not None and self.average.count > 0
        self.router.write(self.average.values if averaged and self.average is not None else None)
        mark_trained(self.policy_model, self.router.router, adapter_name=self.router.adapter)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the adapter, its router trained, to `output_dir` (default `args.output_dir`)."""
        if not (self.args.should_save or self.is_fsdp_enabled or self.is_deepspeed_enabled):
            return  # transformers 5.23 asks for an attribute that PPOTrainer does not set
        if self.state.global_step > 0:
            self.put_router()
        wrapped, self.model = self.model, self.policy_model
        try:
            super().save_model(output_dir, _internal_call)  # type: ignore[misc]
        finally:
            self.model = wrapped

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Write `checkpoint-<update>`: whole, or not at all."""
        folder = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        unfinished = folder.with_name(f"unfinished-{folder.name}")
        state = self._training_state()
        self.save_model(str(unfinished), _internal_call=True)
        if self.accelerator.is_main_process:
            write_state(unfinished, state)
            self.state.save_to_json(str(unfinished / "trainer_state.json"))
            shutil.rmtree(folder, ignore_errors=True)
            os.replace(unfinished, folder)
            rotate(self.args.output_dir, self.args.save_total_limit, keep=folder)
        self.accelerator.wait_for_everyone()

    def _training_state(self) -> dict[str, Any]:
        return {
            "run": self.run,
            "router_name": self.router.router,
            "router": self.router.state_dict(),
            "critic": self._critic.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.lr_scheduler.state_dict(),
            "weights": self.weights.state_dict(),
            "normalizer": None if self.normalizer is None else self.normalizer.state_dict(),
            "average": None if self.average is None else self.average.state_dict(),
            "rng": gather_object([rng_state()]),
            "batch_size": self.args.batch_size,
            "settings": {name: getattr(self.args, name) for name in _SAME},
        }

    def _resume(self, resume: str | os.PathLike[str] | bool) -> None:
        """Continue from a checkpoint.

        Raises:
            CheckpointError: it belongs to another router, batch size, seed, scaling or number of processes.
            HoEError: it belongs to other settings of the objectives' weights.
        """
        folder = resume_folder(resume, self.args.output_dir)
        saved = read_state(folder)
        here = {"router": self.router.router, "batch_size": self.args.batch_size}
        there = {"router": saved["router_name"], "batch_size": saved["batch_size"]}
        here |= {name: getattr(self.args, name) for name in _SAME}
        there |= saved["settings"]
        here["processes"], there["processes"] = self.accelerator.num_processes, len(saved["rng"])
        if here != there:
            raise CheckpointError(f"{folder} was written by a run with {there}, but this one has {here}")
        self.weights.load_state_dict(saved["weights"])
        self.router.load_state_dict(saved["router"])
        self._critic.load_state_dict(saved["critic"])
        self.optimizer.load_state_dict(saved["optimizer"])
        self.lr_scheduler.load_state_dict(saved["scheduler"])
        if saved["normalizer"] is not None:
            self.normalizer = RewardNormalizer.from_state_dict(saved["normalizer"])
        if self.average is not None and saved["average"] is not None:
            self.average.load_state_dict(saved["average"], self.accelerator.device)
        progress = type(self.state).load_from_json(str(folder / "trainer_state.json"))
        for name in ("global_step", "episode", "epoch", "log_history"):
            setattr(self.state, name, getattr(progress, name))
        set_rng_state(saved["rng"][self.accelerator.process_index])
