"""HoEGRPOTrainer: the weights of objectives by STCH-OMD (paper section 3.4), on TRL's GRPOTrainer.

TRL's loop, loss and generation stay. Rewards enter through one method, `_calculate_rewards`, and the weights of objectives
through the attribute `reward_weights`, which TRL reads whenever it makes advantages.

Shapes: B completions of all processes, N objectives.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from accelerate.utils import gather_object

from ...errors import HoEError, RewardError
from ...generation.prompt_datasets import as_dataset, with_prompts
from ...generation.prompt_rows import check_evaluation_rows
from ...generation.settings import generating
from ...generation.vocabulary import tokenizer_of
from ...objectives.normalizer import RewardNormalizer
from ...objectives.payoff import measure_payoff
from ...objectives.weights import ObjectiveWeights
from ...preference import FloatArray
from ...rewards.functions import ObjectiveFunction
from ...rewards.sources import Rewards
from ..run.logged import weighing_metrics
from ..run.optimizer import frozen
from ..run.refused_arguments import check_given, refuse_arguments
from ..run.steered_policy import reaching_threads
from ..run.transformers_loop import TransformersLoop
from ..run.verdict import HeldOut
from .config import HoEGRPOConfig
from .held_out import held_out
from .rewards import fill_missing, known_means, processing_classes, reward_functions
from .stopping_trainer import StoppingTrainer

# Arguments of GRPOTrainer that cannot work here.
_NOT_TAKEN = {
    "quantization_config": "the model is loaded already; load its base quantised, then put the adapter on it",
    "tools": "the payoff table, which rewards are scaled by, is measured on single answers; train without tools",
    "rollout_func": "the payoff table, which rewards are scaled by, is measured on answers of the model's own generate",
    "environment_factory": "the payoff table, which rewards are scaled by, is measured on single answers",
}


class HoEGRPOTrainer(TransformersLoop, StoppingTrainer):  # type: ignore[misc]
    """Trains one router of a HoE adapter for its preference; everything else stays as it is, to the bit.

    Args:
        model: a PeftModel with a HoE adapter.
        reward_funcs: one for each objective, see `reward_functions`.
        args: the configuration.
        train_dataset: a Dataset, or a list of rows, with `prompt` (text or chat messages); rewards get the other columns.
        eval_dataset: likewise, or several by name; where there is no `normalizer`, its prompts measure the payoff table.
        processing_class: the policy's tokenizer; None for the base model's.
        reward_processing_classes: tokenizers of classifiers, as TRL takes them, or by objective.
        callbacks: as in transformers.
        optimizers: optimizer and scheduler; the optimizer's settings are used, what it held is replaced.
        peft_config: directory or Hub id of a built HoE adapter, to put on a plain `model`.
        normalizer: the scale of the rewards; None to measure it before the first update.
        others: GRPOTrainer's other arguments are refused by name.

    Raises:
        HoEError: rewards, router, dataset or model do not fit together.

    >>> from peft_hoe import HoEGRPOConfig, HoEGRPOTrainer, demo
    >>> args = HoEGRPOConfig(
    ...     output_dir="run", per_device_train_batch_size=8, num_generations=4, report_to="none", use_cpu=True, bf16=False
    ... )
    >>> trainer = HoEGRPOTrainer(
    ...     demo.load_demo_adapter(routers=[[0.75, 0.25]]), reward_funcs=demo.REWARDS, args=args,
    ...     train_dataset=[{"prompt": text} for text in demo.load_prompts()], processing_class=demo.load_tokenizer(),
    ... )
    >>> trainer.router.router, trainer.objectives
    ('r0', ['cheerful', 'vivid'])
    """

    same_settings = (
        *TransformersLoop.same_settings,
        "beta", "advantage_scaling", "scale_rewards", "loss_type", "temperature", "num_generations",
        "num_iterations", "generation_batch_size", "max_completion_length", "top_k", "top_p", "min_p",
        "repetition_penalty", "generation_kwargs", "chat_template_kwargs", "stop_strings",
    )  # fmt: skip

    _buffered_inputs: Any
    _epochs_before = 0

    def __init__(
        self,
        model: Any,
        reward_funcs: Any,
        args: HoEGRPOConfig,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        reward_processing_classes: Any = None,
        callbacks: list[Any] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        *,
        peft_config: Any = None,
        normalizer: RewardNormalizer | None = None,
        **others: Any,
    ) -> None:
        refuse_arguments(others, _NOT_TAKEN)
        if not isinstance(args, HoEGRPOConfig):
            raise HoEError(
                f"args is a {type(args).__name__}; use HoEGRPOConfig, which extends GRPOConfig", argument="args"
            )
        check_given(train_dataset=train_dataset, reward_funcs=reward_funcs)
        check_evaluation_rows(eval_dataset)
        policy = self._choose_router(model, args, peft_config)
        functions = reward_functions(reward_funcs, self.objectives, timeout=args.reward_timeout)
        tokenizers = processing_classes(reward_processing_classes, self.objectives, functions)
        if normalizer is not None:
            normalizer.check_objectives(self.objectives)
            normalizer.tell_uncertain()
        train_dataset = with_prompts(train_dataset, processing_class)
        with self.model_settings.applied(), frozen(policy), _without_reference(args):
            super().__init__(
                stop_strings=args.stop_strings or (),
                model=policy,
                reward_funcs=functions,
                args=args,
                train_dataset=train_dataset,
                eval_dataset=as_dataset(eval_dataset),
                processing_class=processing_class,
                reward_processing_classes=tokenizers,
                callbacks=callbacks,
                optimizers=optimizers,
            )
        for function in functions:  # TRL moves the classifiers that it knows
            if isinstance(function, ObjectiveFunction):
                function.to(self.accelerator.device)
        self.beta = args.beta  # with no model for it, TRL's reference is the policy with its adapter off
        self.reward_func_names = list(self.objectives)
        self.normalizer = normalizer
        self._weigh_objectives(args, args.objective_beta)
        self._use_weights()

    @property
    def weights(self) -> ObjectiveWeights:
        """The weights of the objectives."""
        return cast(ObjectiveWeights, super().weights)  # the constructor makes them

    # -- rewards ---

    def _calculate_rewards(self, inputs: Any, prompts: Any, completions: Any, completion_ids_list: Any) -> torch.Tensor:
        """Normalised rewards `(B, N)` of all processes; a training batch moves the weights that TRL mixes them by."""
        gathered = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        if self.normalizer is None:
            raise HoEError(
                "there is no normalizer yet: call train() or evaluate(), or set it to measure_payoff()",
                argument="normalizer",
            )
        raw = np.asarray(gathered.cpu(), dtype=np.float64)
        rewards = self.normalizer.normalize(raw)
        training = bool(self.policy.training)
        if training:
            self._weigh(known_means(rewards))
        found = weighing_metrics(self.normalizer, known_means(raw), known_means(rewards), self.weights)
        for name, value in found.items():
            self._metrics["train" if training else "eval"][name].append(value)
        if self.args.advantage_scaling == "joint":  # the other one leaves a missing reward at 0 after it has centred
            group: Any = self.num_generations if training else self.num_generations_eval
            rewards = fill_missing(rewards, group)
        return torch.as_tensor(rewards, dtype=gathered.dtype, device=gathered.device)

    def _weigh(self, means: FloatArray) -> None:
        if np.isnan(means).all():
            raise RewardError(
                f"the rewards of {self.objectives} returned no number for any completion of the batch, only None or NaN; a "
                "batch without a reward cannot be trained on",
                argument="reward_funcs",
            )
        self.weights.update(means)
        self._use_weights()

    def _use_weights(self) -> None:
        self.reward_weights = torch.tensor(self.weights.u, dtype=torch.float32)

    def measure_payoff(self) -> RewardNormalizer:
        """The payoff table at this run's decoding, on evaluation prompts where there are any, else on training prompts."""
        held = self._drawn(self.train_dataset if self.eval_dataset is None else self.eval_dataset)
        return measure_payoff(
            self.policy, self.router.adapter, held.prompts, held.rewards, processing_class=held.processing_class,
            decoding=held.decoding, batch_size=held.batch_size, seed=held.seed, bf16=held.bf16,
        )  # fmt: skip

    def _held_out(self) -> HeldOut | None:
        return None if self.eval_dataset is None else self._drawn(self.eval_dataset)

    def _drawn(self, source: Any) -> HeldOut:
        rewards = Rewards(self._raw_rewards, self.objectives)
        return held_out(self.policy, self.processing_class, source, rewards, self.generation_config, self.args)

    def _raw_rewards(self, prompts: Sequence[Any], completions: Sequence[str], **columns: Any) -> Any:
        """Rewards `(B, N)` of texts that all processes have, as TRL calls for them in training: those of the first process."""
        inputs = [
            {"prompt": prompt, **{name: column[row] for name, column in columns.items()}}
            for row, prompt in enumerate(prompts)
        ]
        tokenizer: Any = tokenizer_of(self.processing_class)
        ids = tokenizer(list(completions), add_special_tokens=False)["input_ids"]
        answers: list[Any] = [
            text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]
            for prompt, text in zip(prompts, completions, strict=True)
        ]
        gathered = super()._calculate_rewards(inputs, list(prompts), answers, ids)
        return gathered[: len(inputs)].tolist()

    # -- the loop ---

    def _train(self, folder: Path | None, **others: Any) -> Any:
        if folder is None and self.normalizer is None:  # a checkpoint brings its own
            self.normalizer = self.measure_payoff()
        # A run that failed before its first update leaves some of a generation.
        self._step, self._buffered_inputs = 0, None
        self._use_weights()
        return super()._train(folder, **others)

    def evaluate(self, *args: Any, **others: Any) -> Any:
        """As TRL's, at the router's preference; the weights of objectives stay as they are."""
        if self.normalizer is None:
            with self.model_settings.applied():
                self.normalizer = self.measure_payoff()
        return super().evaluate(*args, **others)

    def _generate_single_turn(self, *args: Any, **others: Any) -> Any:
        """TRL's completions, as token ids, and their log-probabilities."""
        if self.use_transformers_continuous_batching:
            return self._generate_in_a_thread(*args, **others)
        # As for the payoff table, nothing is filled in from the model's own settings.
        with generating(self.policy, self.generation_config):
            return super()._generate_single_turn(*args, **others)

    def _generate_in_a_thread(self, *args: Any, **others: Any) -> Any:
        training = self.policy.training
        try:
            with reaching_threads(self.policy, self.router):
                return super()._generate_single_turn(*args, **others)
        finally:
            self.policy.train(training)  # TRL leaves it in training mode here, also in evaluation

    def _get_train_sampler(self, *args: Any, **others: Any) -> Any:
        """TRL's, whose random generator goes on from epoch to epoch; a resumed run starts in the epoch that it is in."""
        sampler = super()._get_train_sampler(*args, **others)
        for _ in range(self._epochs_before):
            next(iter(sampler), None)
        return sampler

    def _token_mask(self, inputs: Mapping[str, Any]) -> torch.Tensor:
        return torch.cat([torch.zeros_like(inputs["prompt_mask"]), inputs["completion_mask"]], dim=1)

    # -- saving and resuming ---

    def _run_state(self) -> dict[str, Any]:
        """Also where TRL is between two generations, and what it has left of the last one."""
        steps = self.args.steps_per_generation * self.num_iterations
        rest = None if self._step % steps == 0 else self._buffered_inputs
        place = {"micro_step": self._step, "epochs": int(self.state.epoch or 0)}
        return super()._run_state() | place | {"generated": gather_object([rest and _moved(rest, "cpu")])}

    def _load_run_state(self, saved: dict[str, Any]) -> None:
        super()._load_run_state(saved)
        self._use_weights()
        self._step, self._epochs_before = saved["micro_step"], saved["epochs"]
        rest = saved["generated"][self.accelerator.process_index]
        self._buffered_inputs = rest and _moved(rest, self.accelerator.device)


@contextlib.contextmanager
def _without_reference(args: HoEGRPOConfig) -> Iterator[None]:
    """TRL's constructor copies the whole adapter, experts included, for a reference when beta is not 0."""
    beta, args.beta = args.beta, 0.0
    try:
        yield
    finally:
        args.beta = beta


def _moved(batches: list[dict[str, Any]], device: Any) -> list[dict[str, Any]]:
    """Batches with their tensors on a device."""
    return [
        {name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in batch.items()}
        for batch in batches
    ]
