"""HoEDPOTrainer: a router from pairs of answers, each preferred under one objective (MODPO), on TRL's DPOTrainer."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from trl import DPOTrainer  # type: ignore[attr-defined]
from trl.trainer.utils import selective_log_softmax

from ...errors import HoEError
from ...generation.settings import evaluating
from ...generation.vocabulary import check_tokens
from ...tuner.functional import use_preference
from ..run.optimizer import frozen
from ..run.processes import over_processes
from ..run.refused_arguments import check_given, refuse_arguments
from ..run.steered_policy import check_padding, check_reference
from ..run.transformers_loop import TransformersLoop
from .config import HoEDPOConfig
from .margins import answer_logprobs, check_experts, other_experts
from .pairs import MARGIN, OBJECTIVE, PairCollator, mixed, read_pairs

# Arguments of DPOTrainer that cannot work here.
_NOT_TAKEN = {"quantization_config": "the model is loaded already; load its base quantised, then put the adapter on it"}
_BASE = object()  # in the place of a reference model: the policy with its adapters off


class HoEDPOTrainer(TransformersLoop, DPOTrainer):  # type: ignore[misc]
    """Trains one router of a HoE adapter on pairs of answers to its preference λ; everything else stays as it is, to the bit.

    Pairs of objective k are a share λ_k of what is trained on, so the loss is Σ_k λ_k L_k. A policy that maximises Σ_j λ_j r_j
    − β KL(π ‖ π_ref) has β log π/π_ref = Σ_j λ_j r_j + const; solved for r_k and put into the likelihood of the pairs of k,

        L_k = −log σ( 1/λ_k [ β Δ log π/π_ref − Σ_{j≠k} λ_j Δ r_j ] ),   Δ f = f(chosen) − f(rejected)

    (MODPO, arXiv 2310.03708). `args.margin` says where the r_j come from:

    - "experts": r_j = `margin_beta` · log π_j/π_base, the implicit reward of this adapter steered to j alone. With β the
      optimum of L_k is the experts' fusion (`fusion_logprobs`), but for r_k, which is what the pairs say.
    - "column": the column `margin` of the dataset holds Σ_{j≠k} λ_j Δ r_j.
    - "none": L_k = −log σ(β Δ log π/π_ref), the λ-weighted DPO loss. Pairs that disagree then compete.

    Another `loss_type` sees the same log-ratios less margin/β, and β/λ_k as its β.

    Args:
        model: a PeftModel with a HoE adapter.
        ref_model: the reference π_ref, used as given; None for the base model (adapters off, no copy).
        args: the configuration.
        data_collator: used as given, on rows without `objective` and `margin`; None for TRL's.
        train_dataset: `{objective: rows}`, or rows with a column `objective` (`read_pairs`); rows have `prompt`, `chosen` and
            `rejected`, text or chat messages.
        eval_dataset: likewise.
        processing_class: the policy's tokenizer; None for the base model's.
        compute_metrics: as in TRL.
        callbacks: as in transformers.
        optimizers: optimizer and scheduler; the optimizer's settings are used, what it held is replaced.
        peft_config: directory or Hub id of a built HoE adapter, to put on a plain `model`.

    Raises:
        HoEError: router, dataset or model do not fit together.

    >>> from peft_hoe import HoEDPOConfig, HoEDPOTrainer, demo
    >>> pairs = [{"prompt": "Once upon a time", "chosen": " they laughed.", "rejected": " they cried."}]
    >>> args = HoEDPOConfig(output_dir="run", per_device_train_batch_size=1, report_to="none", use_cpu=True, bf16=False)
    >>> trainer = HoEDPOTrainer(
    ...     demo.load_demo_adapter(routers=[[0.75, 0.25]]), args=args, train_dataset={"cheerful": pairs, "vivid": pairs},
    ...     processing_class=demo.load_tokenizer(),
    ... )
    >>> trainer.router.preference.tolist()
    [0.75, 0.25]
    """

    same_settings = (
        *TransformersLoop.same_settings,
        "beta", "margin", "margin_beta", "loss_type", "loss_weights", "label_smoothing", "ld_alpha",
        "max_length",
    )  # fmt: skip

    def __init__(
        self,
        model: Any,
        ref_model: Any = None,
        args: HoEDPOConfig | None = None,
        data_collator: Any = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        compute_metrics: Any = None,
        callbacks: list[Any] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        peft_config: Any = None,
        **others: Any,
    ) -> None:
        refuse_arguments(others, _NOT_TAKEN)
        if not isinstance(args, HoEDPOConfig):
            raise HoEError(
                f"args is a {type(args).__name__}; use HoEDPOConfig, which extends DPOConfig", argument="args"
            )
        check_given(train_dataset=train_dataset)
        used = () if ref_model is None else (ref_model,)
        policy = self._choose_router(model, args, peft_config, *used)
        check_reference(ref_model, policy)
        self._margin = args.margin
        if args.margin == "experts":
            check_experts(self.router, self.objectives)
        self._pairs = {mode: np.zeros((4, len(self.objectives))) for mode in ("train", "eval")}
        with self.model_settings.applied(), frozen(policy):
            super().__init__(
                model=policy,
                ref_model=cast(Any, _BASE if ref_model is None else ref_model),
                args=args,
                data_collator=None if data_collator is None else PairCollator(data_collator),
                train_dataset=self._read(train_dataset),
                eval_dataset=None if eval_dataset is None else self._read(eval_dataset),
                processing_class=processing_class,
                compute_metrics=compute_metrics,
                callbacks=callbacks,
                optimizers=optimizers,
            )
        check_padding(policy, self.processing_class, "DPOTrainer")

    # -- what TRL's constructor sets ---

    @property
    def ref_model(self) -> Any:
        """The user's reference model; None for the base model."""
        return self._ref_model

    @ref_model.setter
    def ref_model(self, model: Any) -> None:
        # TRL copies the adapter, all experts with it, unless it is given a reference model. It then finds none here and
        # takes the policy with its adapters off.
        self._ref_model = None if model is _BASE else model

    @property
    def data_collator(self) -> Any:
        """TRL's or the user's, with the pairs' objectives."""
        return self._data_collator

    @data_collator.setter
    def data_collator(self, collator: Any) -> None:
        self._data_collator = collator if isinstance(collator, PairCollator) else PairCollator(collator)

    def _read(self, pairs: Any) -> Any:
        return read_pairs(pairs, self.objectives, self.router.preference, margin=self._margin == "column")

    def _prepare_dataset(self, dataset: Any, processing_class: Any, args: Any, dataset_name: str) -> Any:
        """Tokenise, then mix: pairs that are dropped because their prompts are long do not change the shares."""
        prepared = super()._prepare_dataset(dataset, processing_class, args, dataset_name)
        return mixed(prepared, self.router.preference, args.seed)

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        columns: Any = self._signature_columns
        self._signature_columns = cast(Any, [*dict.fromkeys([*columns, OBJECTIVE, MARGIN])])

    # -- the loss ---

    def _token_mask(self, inputs: Mapping[str, Any]) -> Tensor:
        mask: Tensor = inputs["completion_mask"]
        return mask

    def _loss(self, model: Any, inputs: Any, *args: Any, **others: Any) -> Any:
        """TRL's loss, with each pair's margin in its reference and each pair's β."""
        adapter, preference, objectives = self.router.adapter, self.router.preference, inputs[OBJECTIVE]
        check_tokens(inputs["input_ids"] * inputs["attention_mask"], self.policy, self.processing_class, "pairs")
        policy = _FirstOutput(model)
        batch = _without_ours(inputs)
        reference = self._reference_logprobs(inputs)
        beta: Any = self.beta
        if self._margin != "none":
            reference = reference + self._others(inputs, reference) / self.beta
            weights = torch.as_tensor(preference, dtype=reference.dtype, device=reference.device)
            beta = self.beta / weights[objectives]
        batch["ref_chosen_logps"], batch["ref_rejected_logps"] = reference.chunk(2)
        steered = use_preference(self.policy, {adapter: preference.tolist()})
        with self._given(beta), steered:
            loss = super()._loss(policy, batch, *args, **others)
        with torch.no_grad():
            ratios = self._policy_logprobs(policy.output, batch) - reference
            chosen, rejected = ratios.chunk(2)
            self._count(objectives, beta * (chosen - rejected))
        return loss

    @contextlib.contextmanager
    def _given(self, beta: Any) -> Iterator[None]:
        """TRL takes the reference from the batch, and β `(B,)`: where its losses have β, they are elementwise."""
        before = self.beta, self.precompute_ref_logps
        self.beta, self.precompute_ref_logps = beta, True
        try:
            yield
        finally:
            self.beta, self.precompute_ref_logps = before

    def compute_ref_log_probs(self, model: Any, inputs: Any) -> Any:
        """TRL's reference log-probabilities, `(B,)` of the chosen and of the rejected."""
        with self.model_settings.applied():
            return super().compute_ref_log_probs(model, _without_ours(inputs))

    @torch.no_grad()
    def _reference_logprobs(self, inputs: Mapping[str, Any]) -> Tensor:
        """Log π_ref `(2B,)` of the answers, chosen first."""
        if self.precompute_ref_logps:
            return torch.cat([inputs["ref_chosen_logps"], inputs["ref_rejected_logps"]])
        with self.accelerator.autocast(), evaluating(self.policy):
            return torch.cat(self.compute_ref_log_probs(self.ref_model or self.model, inputs))

    @torch.no_grad()
    def _others(self, inputs: Mapping[str, Any], reference: Tensor) -> Tensor:
        """What the other objectives give to each answer, Σ_{j≠k} λ_j r_j `(2B,)`, up to a constant for each prompt."""
        if self._margin == "column":
            margin = inputs[MARGIN].to(reference)
            return torch.cat([margin, torch.zeros_like(margin)])
        with self.accelerator.autocast(), evaluating(self.policy):
            ratios = other_experts(
                self.policy, self.router.adapter, self.router.preference, inputs, base=None if self.ref_model else reference,
                ld_alpha=self.ld_alpha,
            )  # fmt: skip
        return ratios * (self.args.beta if self.args.margin_beta is None else self.args.margin_beta)

    def _policy_logprobs(self, output: Any, inputs: Mapping[str, Any]) -> Tensor:
        """Log π `(2B,)` of the answers, from what the policy returned."""
        tokens = getattr(output, "log_probs", None)  # TRL since 1.16
        if tokens is None:
            tokens = selective_log_softmax(output.logits[:, :-1], inputs["input_ids"][:, 1:])
        return answer_logprobs(tokens, inputs["completion_mask"][:, 1:], self.ld_alpha)

    # -- what is logged ---

    def _count(self, objectives: Tensor, margins: Tensor) -> None:
        columns = [torch.ones_like(margins), -F.logsigmoid(margins), (margins > 0).to(margins), margins]
        totals = self._pairs["train" if self.policy.training else "eval"]
        for row, column in zip(totals, torch.stack(columns).double().cpu().numpy(), strict=True):
            np.add.at(row, objectives.cpu().numpy(), column)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log, with each objective's loss, accuracy and margin."""
        mode, prefix = ("train", "") if self.policy.training else ("eval", "eval_")
        count, *sums = over_processes(self.accelerator, self._pairs[mode])
        self._pairs[mode][:] = 0
        for k in np.flatnonzero(count):
            for name, values in zip(("loss", "accuracy", "margin"), sums, strict=True):
                logs[f"{prefix}{name}/{self.objectives[k]}"] = float(values[k] / count[k])
        super().log(logs, start_time)

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """The loss on pairs, at the router's preference; `eval_dataset` as in the constructor."""
        pairs = eval_dataset if eval_dataset is None or isinstance(eval_dataset, str) else self._read(eval_dataset)
        found: dict[str, float] = super().evaluate(pairs, ignore_keys, metric_key_prefix)
        return found


class _FirstOutput:
    """A model in a loss; what it returned first is kept."""

    def __init__(self, model: Any) -> None:
        self._model, self.output = model, None

    def __call__(self, *args: Any, **inputs: Any) -> Any:
        output = self._model(*args, **inputs)
        self.output = output if self.output is None else self.output
        return output


def _without_ours(inputs: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in inputs.items() if name not in (OBJECTIVE, MARGIN)}
