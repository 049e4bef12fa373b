"""HoEDistillationTrainer: a router learns to be the logit fusion of the single-objective experts, from text alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ...errors import HoEError
from ...generation.fusion import divergence, fusion_logprobs
from ...generation.logits import response_logits, sequence_inputs
from ...generation.prompt_rows import check_evaluation_rows
from ...generation.prompts import PromptBatch
from ...generation.responses import generate_responses
from ...generation.vocabulary import check_tokens, tokenizer_of
from ...tuner.functional import use_preference
from ..run.optimizer import frozen
from ..run.refused_arguments import check_given
from ..run.steered_policy import without_dropout
from ..run.transformers_loop import TransformersLoop
from .config import HoEDistillationConfig
from .texts import TextCollator, check_texts, has_completions


class HoEDistillationTrainer(TransformersLoop):
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
        peft_config: directory or Hub id of a built HoE adapter, to put on a plain `model`.

    Raises:
        HoEError: router, dataset or model do not fit together.

    >>> from peft_hoe import HoEDistillationConfig, HoEDistillationTrainer, demo
    >>> model = demo.load_demo_adapter(routers=[[0.75, 0.25]])
    >>> args = HoEDistillationConfig(
    ...     output_dir="run", max_steps=1, per_device_train_batch_size=4, max_new_tokens=8, save_strategy="no",
    ...     disable_tqdm=True, report_to="none", use_cpu=True,
    ... )
    >>> rows = [{"prompt": text} for text in demo.load_prompts()]
    >>> trainer = HoEDistillationTrainer(model, args, train_dataset=rows, processing_class=demo.load_tokenizer())
    >>> _ = trainer.train()
    {'loss': ...}
    >>> model.peft_config["default"].routers[0].trained
    True
    """

    same_settings = (
        *TransformersLoop.same_settings,
        "lmbda",
        "beta",
        "temperature",
        "top_k",
        "top_p",
        "max_new_tokens",
        "stop_strings",
        "chat_template_kwargs",
        "max_length",
    )

    _waiting: Sequence[dict[str, Any]] = ()  # micro-batches of the step that begins
    _tokens: torch.Tensor | None = None  # completion tokens of the step, on all processes

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
            raise HoEError(f"args is a {type(args).__name__}; use HoEDistillationConfig", argument="args")
        check_given(train_dataset=train_dataset, processing_class=processing_class)
        check_texts(train_dataset)
        check_evaluation_rows(eval_dataset)
        for each in eval_dataset.values() if isinstance(eval_dataset, dict) else (eval_dataset,):
            _check_evaluation(each)
        self.lmbda = args.lmbda if args.lmbda is not None else float(not has_completions(train_dataset[0]))
        if self.lmbda < 1 and not has_completions(train_dataset[0]):
            raise HoEError(
                f"lmbda is {self.lmbda}, but the training dataset holds prompts only; give completions or text, or lmbda=1",
                argument="lmbda",
                value=self.lmbda,
                allowed=(1,),
            )
        policy = self._choose_router(model, args, peft_config)
        self.decoding = args.decoding().resolved(policy, processing_class)
        with self.model_settings.applied(), frozen(policy):
            super().__init__(
                model=policy,
                args=args,
                data_collator=data_collator
                or TextCollator(processing_class, args.max_length, self.decoding.chat_template_kwargs),
                train_dataset=train_dataset,
                eval_dataset=eval_dataset,
                processing_class=processing_class,
                callbacks=callbacks,
                optimizers=optimizers,
            )
        self.model_accepts_loss_kwargs = True  # `_loss` is given the tokens of the step, and is no mean of means

    def _token_mask(self, inputs: Mapping[str, Any]) -> torch.Tensor:
        return torch.cat([torch.zeros_like(inputs["prompt_mask"]), inputs["completion_mask"]], dim=1)

    def get_batch_samples(self, *args: Any, **others: Any) -> Any:
        """The micro-batches of a step; what is counted of them depends on what the student samples."""
        self._waiting, count = super().get_batch_samples(*args, **others)
        return self._waiting, count

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Any:
        """A micro-batch of the dataset's completions, or of the student's own."""
        if self._waiting:  # not when they are collected: a resumed run sets its random state after that
            self._complete(self._waiting)
            self._waiting = ()
        return super().training_step(model, inputs, self._tokens)

    def _complete(self, batches: Sequence[dict[str, Any]]) -> None:
        """Sample where it is to be, in place, and count the step's completion tokens."""
        for batch in batches:
            if self.lmbda == 1 or (self.lmbda > 0 and float(torch.rand(())) < self.lmbda):
                batch.update(self._sampled(self._prepare_inputs(batch)))
        mine = sum(int(batch["completion_mask"].sum()) for batch in batches)
        tokens = torch.tensor(float(mine), device=self.accelerator.device)
        self._tokens = self.accelerator.reduce(tokens, reduction="sum").clamp(min=1)

    def _sampled(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """The prompts with completions by the student."""
        tokenizer: Any = tokenizer_of(self.processing_class)
        prompts = PromptBatch(inputs["prompt_ids"], inputs["prompt_mask"].bool(), [], {})
        self.policy.eval()
        with self.accelerator.autocast():
            responses = generate_responses(self.policy, prompts, tokenizer, self.decoding, len(prompts.ids))
        return {**inputs, "completion_ids": responses.ids, "completion_mask": responses.mask.long()}

    def _loss(self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None) -> Any:
        """Divergence per completion token, in nats; the student answers at the router's preference.

        The mean over this batch, or its share of the mean over `num_items_in_batch` tokens of all processes.
        """
        if self.policy.training:
            without_dropout(self.policy)  # teacher and student are one model
            self.policy.training = True
        ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
        mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1)
        check_tokens(ids * mask, self.policy, self.processing_class, "texts")
        length, counted = inputs["completion_ids"].shape[1], inputs["completion_mask"].bool()
        adapter, preference = self.router.adapter, self.router.preference
        teacher = fusion_logprobs(self.policy, adapter, preference, ids, mask, length)
        with use_preference(self.policy, {adapter: preference.tolist()}):
            logits, _ = response_logits(model, sequence_inputs(ids, mask), length)
        student = logits[counted].float().log_softmax(-1)
        total = divergence(student, teacher[counted], self.args.beta).sum()
        if num_items_in_batch is None:
            loss = total / counted.sum().clamp(min=1)
        else:  # DistributedDataParallel divides by the processes
            loss = total / num_items_in_batch * self.accelerator.num_processes
        return (loss, {}) if return_outputs else loss

    def evaluate(self, eval_dataset: Any = None, *args: Any, **others: Any) -> Any:
        """The divergence on the text of the evaluation dataset; the mean over batches, which count by their rows."""
        if not isinstance(eval_dataset, (str, dict)):
            _check_evaluation(eval_dataset)
        return super().evaluate(eval_dataset, *args, **others)

    def prediction_step(
        self, model: Any, inputs: Any, prediction_loss_only: bool, ignore_keys: Sequence[str] | None = None
    ) -> tuple[torch.Tensor, None, None]:
        """The divergence on the dataset's text."""
        with torch.no_grad():
            return self.compute_loss(model, self._prepare_inputs(inputs)).detach(), None, None


def _check_evaluation(dataset: Any) -> None:
    """See that a dataset, where there is one, has text to measure the divergence on; its first row is looked at."""
    if dataset is None:
        return
    check_texts(dataset)
    if not has_completions(dataset[0]):
        raise HoEError(
            "the evaluation dataset holds prompts only, and evaluation samples nothing; give rows with completions or text",
            argument="eval_dataset",
        )
