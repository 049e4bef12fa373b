"""Saving and resuming of HoERouterTrainer, whose loop is its own."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

from accelerate.utils import gather_object

from ..run.checkpoints import read_state, rng_state, rotate, set_rng_state, write_state
from ..run.router_run import RouterRun


class RouterCheckpoints(RouterRun):
    """The part of the trainer that writes and reads what a run depends on."""

    model: Any
    lr_scheduler: Any
    is_fsdp_enabled: bool
    is_deepspeed_enabled: bool
    _critic: Any
    _same = (
        "seed",
        "average_routers",
        "advantage_scaling",
        "temperature",
        "response_length",
        "stop_strings",
        "batch_size",
    )

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the adapter, its router trained, to `output_dir` (default `args.output_dir`)."""
        if not (self.args.should_save or self.is_fsdp_enabled or self.is_deepspeed_enabled):
            return  # transformers 5.23 asks for an attribute that PPOTrainer does not set
        wrapped, self.model = self.model, self.policy
        try:
            super().save_model(output_dir, _internal_call)
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
        return self._run_state() | {
            "critic": self._critic.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.lr_scheduler.state_dict(),
            "rng": gather_object([rng_state()]),
        }

    def _resume(self, folder: Path) -> None:
        """Continue from a checkpoint."""
        saved = read_state(folder)
        self._load_run_state(saved, folder)
        self._critic.load_state_dict(saved["critic"])
        self.optimizer.load_state_dict(saved["optimizer"])
        self.lr_scheduler.load_state_dict(saved["scheduler"])
        progress = type(self.state).load_from_json(str(folder / "trainer_state.json"))
        for name in ("global_step", "episode", "epoch", "log_history"):
            setattr(self.state, name, getattr(progress, name))
        set_rng_state(saved["rng"][self.accelerator.process_index])
