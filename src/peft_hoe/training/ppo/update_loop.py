"""The loop over the updates of `RouterPPO`: prompts, evaluation, logging, saving and resuming."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from accelerate.utils import gather_object
from accelerate.utils.memory import clear_device_cache

from ...errors import HoEError
from ...generation.prompt_rows import check_evaluation_rows, drawn_rows, prompt_rows, rows_of_all
from ...generation.prompts import PromptBatch, PromptCollator, as_prompt_batch
from ...generation.settings import evaluating
from ...objectives.normalizer import RewardNormalizer
from ...tuner.functional import use_preference
from ..run.checkpoints import finish_checkpoint, read_state, rng_state, set_rng_state, write_state
from ..run.optimizer import follow_schedule
from ..run.processes import on_first_process
from ..run.router_trainer import RouterTrainer
from ..run.verdict import HeldOut, Verdict
from .evaluation import evaluation_metrics, process_share
from .logged import sample_table
from .router_ppo import RouterPPO


class UpdateLoop(RouterTrainer):
    """A RouterTrainer with a loop of its own, once its constructor has made `ppo`.

    Attributes:
        ppo: what makes the updates.
    """

    # Trainer's, which are there once its constructor has run.
    model: Any
    lr_scheduler: Any
    train_dataset: Any
    eval_dataset: Any
    state: Any  # with `episode`, as PPOTrainer has it

    same_settings = (
        "seed",
        "data_seed",
        "average_routers",
        "advantage_scaling",
        "temperature",
        "top_k",
        "top_p",
        "response_length",
        "stop_token",
        "stop_token_id",
        "stop_strings",
        "chat_template_kwargs",
        "batch_size",
        "num_generations",
        "baseline",
    )
    ppo: RouterPPO

    # -- prompts ---

    def next_prompts(self) -> PromptBatch:
        """This process's prompts of the next update, as the update's number says."""
        args, size = self.args, len(self.train_dataset)
        seed = args.seed if args.data_seed is None else args.data_seed
        prompts = args.batch_size // args.num_generations
        chosen = prompt_rows(size, self.state.global_step * prompts, prompts, seed)
        mine = chosen[self.accelerator.process_index :: self.accelerator.num_processes]
        return self._prompts(self.train_dataset, [row for row in mine for _ in range(args.num_generations)])

    def _prompts(self, dataset: Any, numbers: Sequence[int]) -> PromptBatch:
        """The rows of these numbers."""
        rows, collate = [dataset[number] for number in numbers], self.data_collator
        batch = collate(rows, numbers) if type(collate) is PromptCollator else collate(rows)
        return as_prompt_batch(batch, self.processing_class, self.accelerator.device)

    def measure_payoff(self) -> RewardNormalizer:
        """The payoff table at this run's decoding, on evaluation prompts where there are any, else on training prompts."""
        return self.ppo.measure_payoff(
            self._drawn(self.train_dataset if self.eval_dataset is None else self.eval_dataset)
        )

    def _drawn(self, source: Any) -> PromptBatch:
        """Prompts of a dataset, or of several together, drawn by the seed."""
        source = rows_of_all(source)
        return self._prompts(source, drawn_rows(len(source), self.args.payoff_prompts, self.args.seed))

    def _held_out(self) -> HeldOut | None:
        if self.eval_dataset is None:
            return None
        ppo = self.ppo
        return HeldOut(
            self._drawn(self.eval_dataset), ppo.rewards, ppo.tokenizer, ppo.settings.decoding, ppo.settings.rollout_batch,
            ppo.settings.seed, ppo.actor_critic.bf16,
        )  # fmt: skip

    def _computed(self, compute: Callable[[], Verdict]) -> Verdict:
        return on_first_process(self.accelerator, compute, together=self.args.shard_policy)

    def generate_completions(self, sampling: bool = False) -> None:
        """Print greedy responses to the first prompts of the evaluation set, with their rewards, at the router's preference.

        Args:
            sampling: PPOTrainer prints the first batch of the set, or all of it; here it makes no difference.
        """
        main = self.accelerator.is_main_process
        if self.eval_dataset is None or not (main or self.args.shard_policy):  # shards are gathered by all together
            return
        rows = next(iter(self.eval_dataset.values())) if isinstance(self.eval_dataset, Mapping) else self.eval_dataset
        prompts = self._prompts(rows, range(min(len(rows), self.args.per_device_eval_batch_size)))
        here = use_preference(self.policy, {self.router.adapter: self.router.preference.tolist()})
        with evaluating(self.policy), here:
            responses = self.ppo.respond(prompts, self.ppo.greedy)
        if main:
            sample_table(prompts, responses, self.ppo.score_responses(prompts, responses), self.objectives)

    # -- the loop ---

    def _train(self, folder: Path | None, **others: Any) -> None:
        self._begin(folder)
        self.control = self.callback_handler.on_train_begin(self.args, self.state, self.control)
        self.control = self.callback_handler.on_epoch_begin(self.args, self.state, self.control)
        if self.args.eval_on_start:
            self.evaluate()
        while self.state.global_step < self.state.max_steps and not self.control.should_training_stop:
            self.control = self.callback_handler.on_step_begin(self.args, self.state, self.control)
            started = time.monotonic()
            metrics = self.ppo.step(self.next_prompts())
            metrics["eps"] = self.args.batch_size / (time.monotonic() - started)
            self._finish_step(metrics)
            every = self.args.torch_empty_cache_steps
            if every is not None and self.state.global_step % every == 0:
                clear_device_cache()
        if self.args.load_best_model_at_end and self.state.best_model_checkpoint is not None:
            best = read_state(Path(self.state.best_model_checkpoint))
            self.training_state.load_router(best, self.accelerator.device)
        if self.args.push_to_hub:
            self._finish_current_push()
        self.control = self.callback_handler.on_train_end(self.args, self.state, self.control)

    def _begin(self, folder: Path | None) -> None:
        """Fresh state, or a checkpoint's; and the scale of the rewards."""
        args, state = self.args, self.state
        state.global_step, state.episode, state.epoch = 0, 0, 0.0
        state.max_steps = args.num_total_batches
        state.num_train_epochs = math.ceil(args.num_total_batches * args.batch_size / len(self.train_dataset))
        state.compute_steps(args, state.max_steps)
        self.control.should_training_stop = False
        self.optimizer.zero_grad()  # of a run that failed in its first update
        if folder is not None:
            self._resume(folder)
        self.follow_plateau()
        if self.normalizer is None:
            self.normalizer = self.measure_payoff()
        else:
            self.normalizer.check_objectives(self.objectives)
            self.normalizer.tell_uncertain()

    def _finish_step(self, metrics: dict[str, float]) -> None:
        """Count, log, evaluate, save, and stop where someone asked for it."""
        args, state, size = self.args, self.state, len(self.train_dataset)
        epochs = state.episode // size
        self._count(state.global_step + 1)
        metrics |= {"lr": self.lr_scheduler.get_last_lr()[0], "episode": state.episode}
        self.lr_scheduler.step()
        self.control = self.callback_handler.on_step_end(args, state, self.control)
        self.update_ended()
        epoch_ended = state.episode // size > epochs or self.control.should_training_stop
        if epoch_ended:
            self.control = self.callback_handler.on_epoch_end(args, state, self.control)
        if self.control.should_log:
            self.log(metrics)
        if self.control.should_evaluate:
            best = self._determine_best_metric(metrics=self.evaluate(), trial=None)
            self.control.should_save = best if args.save_strategy == "best" else self.control.should_save
        if self.control.should_save:
            self._save_checkpoint(self.model, trial=None)
            self.control = self.callback_handler.on_save(args, state, self.control)
        if epoch_ended and not self.control.should_training_stop:
            self.control = self.callback_handler.on_epoch_begin(args, state, self.control)
        every = max(1, args.num_total_batches // max(1, args.num_sample_generations))
        if args.num_sample_generations > 0 and (state.global_step - 1) % every == 0:
            self.generate_completions(sampling=True)

    def _count(self, updates: int) -> None:
        """So many updates are made."""
        self.state.global_step = updates
        self.state.episode = updates * self.args.batch_size
        self.state.epoch = self.state.episode / len(self.train_dataset)

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """What responses to evaluation prompts earn, see `evaluation_metrics`; logged, and given to callbacks.

        Args:
            eval_dataset: rows with `prompt` or `input_ids`, or several of them by name; None for the constructor's.
            ignore_keys: of a model's output; there is none here.
            metric_key_prefix: before each name.

        Raises:
            HoEError: there is no evaluation dataset, or it is empty.
        """
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        if dataset is None:
            raise HoEError(
                "there is nothing to evaluate on; give eval_dataset to the trainer or to evaluate()",
                argument="eval_dataset",
            )
        check_evaluation_rows(dataset)
        named = dataset if isinstance(dataset, Mapping) else {"": dataset}
        found: dict[str, float] = {}
        with self.model_settings.applied():
            if self.normalizer is None:
                self.normalizer = self.measure_payoff()
            for name, rows in named.items():
                mine, counted = process_share(len(rows), self.accelerator.process_index, self.accelerator.num_processes)
                metrics = evaluation_metrics(self.ppo, self._prompts(rows, mine), counted)
                prefix = f"{metric_key_prefix}_{name}_" if name else f"{metric_key_prefix}_"
                found |= {f"{prefix}{key}": value for key, value in metrics.items()}
        self.log(found)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, found)
        return found

    # -- saving and resuming ---

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the adapter, its router trained, to `output_dir` (default `args.output_dir`)."""
        if not self.args.should_save:
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
        state = self._run_state()
        self.save_model(str(unfinished), _internal_call=True)
        if self.state.best_global_step == self.state.global_step:
            self.state.best_model_checkpoint = str(folder)
        if self.accelerator.is_main_process:
            write_state(unfinished, state)
            self.state.save_to_json(str(unfinished / "trainer_state.json"))
            finish_checkpoint(unfinished, folder, self.args.save_total_limit, self.state.best_model_checkpoint)
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(folder))
        self.accelerator.wait_for_everyone()

    def _run_state(self) -> dict[str, Any]:
        scheduler, rng = self.lr_scheduler.state_dict(), gather_object([rng_state()])
        return super()._run_state() | self.ppo.state_dict() | {"scheduler": scheduler, "rng": rng}

    def _resume(self, folder: Path) -> None:
        """Continue from a checkpoint."""
        saved = read_state(folder)
        self._check_settings(saved, folder)
        self.ppo.load_state_dict(saved)
        self.lr_scheduler.load_state_dict(saved["scheduler"])
        follow_schedule(self.lr_scheduler)
        progress = json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))
        self._count(progress["global_step"])
        self.state.log_history = progress["log_history"]
        set_rng_state(saved["rng"][self.accelerator.process_index])
