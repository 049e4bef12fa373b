"""HoEDistillationConfig: TrainingArguments, and what the distillation of a router adds to it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from transformers import TrainingArguments

from ...errors import HoEError
from ...generation.decoding import Decoding
from ..run.arguments import RouterArguments
from ..run.refused_arguments import NO_PREDICTIONS, refuse_changed

REFUSED = {
    **NO_PREDICTIONS,
    "average_tokens_across_devices": "the loss is always a mean over the tokens of all processes",
    "neftune_noise_alpha": "the teacher is the same model, so that neither it nor the student has noise or dropout",
}


@dataclass
class HoEDistillationConfig(RouterArguments, TrainingArguments):  # type: ignore[misc]
    """Configuration of `HoEDistillationTrainer`; names and meanings are those of TRL's GKDConfig.

    Args:
        lmbda: share of the batches whose completions the student samples; the others use the dataset's text. None: 0 where the
            dataset holds text, 1 where it holds prompts only.
        beta: the divergence: 0 is KL(teacher ‖ student), 1 is KL(student ‖ teacher), in between a Jensen-Shannon divergence.
        temperature: of the student's sampling.
        top_k: it draws from so many most likely tokens; 0 for the whole vocabulary.
        top_p: likewise from the most likely tokens of so much probability; 1 for the whole vocabulary.
        max_new_tokens: length of a sampled completion.
        stop_strings: texts that end one, besides the stop tokens of the tokenizer and of the policy's `generation_config`.
        max_length: tokens of the dataset's text that are used; None for all.
        chat_template_kwargs: arguments of the tokenizer's chat template, as in GRPOConfig; also as JSON.

    The rest of what is new is in `RouterArguments`.

    >>> from peft_hoe import HoEDistillationConfig
    >>> HoEDistillationConfig(output_dir="run", router="r0", max_new_tokens=16, use_cpu=True).decoding().max_new_tokens
    16
    """

    lmbda: float | None = field(default=None, metadata={"help": "Share of batches with the student's own completions."})
    beta: float = field(default=0.0, metadata={"help": "0: KL(teacher, student); 1: KL(student, teacher)."})
    temperature: float = field(default=1.0, metadata={"help": "Of the student's sampling."})
    top_k: int = field(default=0, metadata={"help": "Draw from so many most likely tokens; default all."})
    top_p: float = field(default=1.0, metadata={"help": "Draw from the most likely tokens of so much probability."})
    max_new_tokens: int = field(default=64, metadata={"help": "Length of a sampled completion."})
    stop_strings: list[str] | None = field(default=None, metadata={"help": "Texts that end a sampled completion."})
    max_length: int | None = field(default=None, metadata={"help": "Tokens of the dataset's text; default all."})
    chat_template_kwargs: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Arguments of the chat template."}
    )

    def __post_init__(self) -> None:
        refuse_changed(self, REFUSED)
        self.remove_unused_columns = False  # rows are text, not a model's arguments
        super().__post_init__()
        for name in ("lmbda", "beta"):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= 1:
                raise HoEError(
                    f"{name} is {value}; it must lie between 0 and 1", argument=name, value=value, allowed="0 to 1"
                )
        self.decoding()
        if self.max_length is not None and self.max_length < 2:
            raise HoEError(
                f"max_length is {self.max_length}; at least 2 tokens are needed",
                argument="max_length",
                value=self.max_length,
                allowed="at least 2",
            )

    def decoding(self) -> Decoding:
        """How the student samples.

        Raises:
            HoEError: the length, the temperature or a stop string is none.
        """
        return Decoding(
            max_new_tokens=self.max_new_tokens,
            do_sample=True,
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            stop_strings=self.stop_strings or (),  # type: ignore[arg-type]
            chat_template_kwargs=self.chat_template_kwargs,  # type: ignore[arg-type]
        )
