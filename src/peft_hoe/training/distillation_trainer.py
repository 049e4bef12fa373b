"""HoEDistillationTrainer: a router learns to be the logit fusion of the single-objective experts, from text alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers import Trainer

from ..errors import HoEError
from ..tuner.functional import use_preference
from . import policies
from .actor_critic import response_logits, sequence_inputs
from .distillation_config import HoEDistillationConfig
from .fusion import divergence, fusion_logprobs
from .optimization import frozen
from .prompts import PromptBatch
from .rollouts import generate_responses
from .router_loop import RouterLoop
from .texts import TextCollator, check_texts, has_completions


class HoEDistillationTrainer(RouterLoop, Trainer):  # type: ignore[misc]
    """Trains one router of a HoE adapter on the λ-weighted logit fusion of the adapter's own one-hot experts.

    No rewards and no second model: the teacher is this model, steered to each objective, see `fusion_logprobs`. The loss is the
    mean divergence per token of completions.

    Args:
        model: a PeftModel with a HoE adapter.
        args: the configuration.
        train_dataset: rows with `text`, `messages`, `input_ids`, or `prompt` (text or chat messages) with or without
            `completion`.
        eval_dataset: likewise; always measured on its text, never on samples, so it needs more than prompts.
        processing_class: the policy's tokenizer, with a padding token.
        data_collator: used as given; None for `TextCollator`.
        callbacks: as in transformers.
        optimizers: optimizer and scheduler; the optimizer's settings are used, what it held is replaced.
        peft_config: a HoEConfig, to make the adapter here.

    Raises:
        HoEError: router, dataset or model do not fit together.
    """

    def __init__(
        self,
        model: Any,
        args: HoEDistillationConfig,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        data_collator: Any = None,
        callbacks: list[Any] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        peft_config: Any = None,
    ) -> None:
        if not isinstance(args, HoEDistillationConfig):
            raise HoEError(f"args is a {type(args).__name__}; use HoEDistillationConfig")
        if train_dataset is None or processing_class is None:
            raise HoEError("train_dataset and processing_class are required")
        check_texts(train_dataset)
        self.lmbda = args.lmbda if args.lmbda is not None else float(not has_completions(train_dataset[0]))
        if self.lmbda < 1 and not has_completions(train_dataset[0]):
            raise HoEError(
                f"lmbda is {self.lmbda}, but the training dataset holds prompts only; give completions or text, or lmbda=1"
            )
        policy = self._choose_router(model, args, peft_config)
        with self.model_settings.applied(), frozen(policy):
            super().__init__(
                model=policy,
                args=args,
                data_collator=data_collator or TextCollator(processing_class, args.max_length),
                train_dataset=train_dataset,
                eval_dataset=eval_dataset,
                processing_class=processing_class,
                callbacks=callbacks,
                optimizers=optimizers,
            )
        self.model_accepts_loss_kwargs = False  # the loss is a mean over this batch's tokens

    _same = (*RouterLoop._same, "lmbda", "beta", "temperature", "max_new_tokens", "max_length", "train_batch_size")

    def _token_mask(self, inputs: Mapping[str, Any]) -> torch.Tensor:
        return torch.cat([torch.zeros_like(inputs["prompt_mask"]), inputs["completion_mask"]], dim=1)

    def training_step(self, model: Any, inputs: Any, *args: Any, **others: Any) -> Any:
        """A step on the dataset's completions, or on the student's own."""
        inputs = self._prepare_inputs(inputs)
        if self.lmbda == 1 or (self.lmbda > 0 and float(torch.rand(())) < self.lmbda):
            inputs = self._sampled(inputs)
        return super().training_step(model, inputs, *args, **others)

    def _sampled(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """The prompts with completions by the student."""
        tokenizer: Any = getattr(self.processing_class, "tokenizer", self.processing_class)
        prompts = PromptBatch(inputs["prompt_ids"], inputs["prompt_mask"].bool(), [], {})
        settings = policies.sampling(tokenizer, tokenizer.eos_token_id, self.args.max_new_tokens, self.args.temperature)
        self.policy.eval()
        with policies.generating(self.policy, settings), self.accelerator.autocast():
            responses = generate_responses(self.policy, prompts, tokenizer, settings, len(prompts.ids))
        return {**inputs, "completion_ids": responses.ids, "completion_mask": responses.mask.long()}

    def _loss(self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None) -> Any:
        """Mean divergence per completion token, in nats; the student answers at the router's preference."""
        ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
        mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1)
        length, counted = inputs["completion_ids"].shape[1], inputs["completion_mask"].bool()
        adapter, preference = self.router.adapter, self.router.preference
        teacher = fusion_logprobs(self.policy, adapter, preference, ids, mask, length)
        with use_preference(self.policy, {adapter: preference.tolist()}):
            logits, _ = response_logits(model, sequence_inputs(ids, mask), length)
        student = logits[counted].float().log_softmax(-1)
        loss = divergence(student, teacher[counted], self.args.beta).mean()
        return (loss, {}) if return_outputs else loss

    def prediction_step(
        self, model: Any, inputs: Any, prediction_loss_only: bool, ignore_keys: Sequence[str] | None = None
    ) -> tuple[torch.Tensor, None, None]:
        """The divergence on the dataset's text."""
        with torch.no_grad():
            return self.compute_loss(model, self._prepare_inputs(inputs)).detach(), None, None
