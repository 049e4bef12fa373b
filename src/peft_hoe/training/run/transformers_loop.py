"""Routers on transformers' own training loop, for trainers that have no loop of their own."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback

from ...generation.settings import modes_kept
from ...tuner.functional import record_votes, use_preference
from .checkpoints import read_state, write_state
from .optimizer import follow_schedule
from .router_trainer import RouterTrainer
from .votes import vote_metrics, vote_statistics


class TransformersLoop(RouterTrainer):
    """A RouterTrainer that keeps transformers' `train`.

    The Trainer optimises, wraps and clips what it finds in the model, so the router's Parameters are a submodule of the policy
    while it trains. Checkpoints are the Trainer's, with `router_training.pt` beside them.
    """

    same_settings = (*RouterTrainer.same_settings, "train_batch_size", "gradient_accumulation_steps")

    _votes: tuple[dict[str, torch.Tensor], torch.Tensor] | None = None

    def _train(self, folder: Path | None, **others: Any) -> Any:
        callback = UpdateCallback(self)
        self.add_callback(callback)
        try:
            with _submodule(self.policy, self.router):
                return super(RouterTrainer, self).train(
                    resume_from_checkpoint=None if folder is None else str(folder), **others
                )
        finally:  # a run that failed before its first step may be tried again
            self.remove_callback(callback)

    def evaluate(self, *args: Any, **others: Any) -> Any:
        """As the trainer below does, at the router's preference."""
        here = use_preference(self.policy, {self.router.adapter: self.router.preference.tolist()})
        with self.model_settings.applied(), modes_kept(self.policy), here:
            return super().evaluate(*args, **others)

    def _token_mask(self, inputs: Any) -> torch.Tensor:
        """Which tokens `(B, S)` of a batch are text, for the statistics of the votes."""
        mask: torch.Tensor = inputs["attention_mask"]
        return mask

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **others: Any) -> Any:
        """The loss; how the router voted in its last forward is kept for the log."""
        with self.model_settings.applied(), record_votes(self.policy, self.router.adapter) as votes:
            loss = self._loss(model, inputs, *args, **others)
        if self.policy.training:
            kept = {name: vote.detach() for name, vote in votes.items()}
            self._votes = (kept, self._token_mask(inputs).bool())
        return loss

    def _loss(self, model: Any, inputs: Any, *args: Any, **others: Any) -> Any:
        """What `compute_loss` is for the trainer below; the student's forward is the last one in it."""
        return super().compute_loss(model, inputs, *args, **others)

    def log(self, logs: dict[str, float], *args: Any, **others: Any) -> None:
        """Log, with the votes of the last batch."""
        if self._votes is not None and self.policy.training:
            votes, mask = self._votes
            found = vote_statistics(votes, mask[:, 1:], mask.shape[1])
            logs |= vote_metrics(found, self.training_state.experts, self.router.voting_experts, self.accelerator)
        super().log(logs, *args, **others)

    def _save_checkpoint(self, model: Any, trial: Any, **others: Any) -> None:
        super()._save_checkpoint(model, trial, **others)
        state = self._run_state()  # on all processes: some of it is gathered
        if self.args.should_save:  # last, so that a folder with this file is a whole checkpoint
            folder = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
            write_state(folder, state)
        self.accelerator.wait_for_everyone()

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """The experts are what they were; only the router is read."""
        folder = Path(resume_from_checkpoint)
        saved = read_state(folder)
        self._check_settings(saved, folder)
        self._load_run_state(saved)

    def _load_run_state(self, saved: dict[str, Any]) -> None:
        """Continue from `_run_state`.

        Raises:
            HoEError: it belongs to other settings of the objectives' weights.
        """
        self.training_state.load_state_dict(saved, self.accelerator.device)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """And the rates of this run's schedule."""
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:
            follow_schedule(self.lr_scheduler)

    def _load_best_model(self) -> None:
        """Only the router of the best checkpoint is read; the end of the run writes it into the model."""
        saved = read_state(Path(str(self.state.best_model_checkpoint)))
        self.training_state.load_router(saved, self.accelerator.device)


class UpdateCallback(TrainerCallback):
    """Tells a trainer when a run begins and when an update has ended."""

    def __init__(self, trainer: RouterTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        """A resumed run may know its end."""
        self.trainer.follow_plateau()

    def on_step_end(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        """Average, and stop where SIGINT has asked for it."""
        self.trainer.update_ended()


@contextlib.contextmanager
def _submodule(policy: nn.Module, router: nn.Module) -> Iterator[None]:
    """The router inside the policy, under a name that no adapter's state dict includes."""
    policy.add_module("trained_router", router)
    try:
        yield
    finally:
        del policy.trained_router
