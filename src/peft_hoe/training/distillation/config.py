"""HoEDistillationConfig: TrainingArguments, and what the distillation of a router adds to it."""

from __future__ import annotations

from dataclasses import dataclass, field

from transformers import TrainingArguments

from ...errors import HoEError
from ..run.arguments import RouterArguments


@dataclass
class HoEDistillationConfig(RouterArguments, TrainingArguments):  # type: ignore[misc]
    """Configuration of `HoEDistillationTrainer`; names and meanings are those of TRL's GKDConfig.

    Args:
        lmbda: share of the batches whose completions the student samples; the others use the dataset's text. None: 0 where the
            dataset holds text, 1 where it holds prompts only.
        beta: the divergence: 0 is KL(teacher ‖ student), 1 is KL(student ‖ teacher), in between a Jensen-Shannon divergence.
        temperature: of the student's sampling.
        max_new_tokens: length of a sampled completion.
        max_length: tokens of the dataset's text that are used; None for all.

    The rest of what is new is in `RouterArguments`.
    """

    lmbda: float | None = field(default=None, metadata={"help": "Share of batches with the student's own completions."})
    beta: float = field(default=0.0, metadata={"help": "0: KL(teacher, student); 1: KL(student, teacher)."})
    temperature: float = field(default=1.0, metadata={"help": "Of the student's sampling."})
    max_new_tokens: int = field(default=64, metadata={"help": "Length of a sampled completion."})
    max_length: int | None = field(default=None, metadata={"help": "Tokens of the dataset's text; default all."})

    def __post_init__(self) -> None:
        self.remove_unused_columns = False  # rows are text, not a model's arguments
        super().__post_init__()
        for name in ("lmbda", "beta"):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= 1:
                raise HoEError(f"{name} is {value}; it must lie between 0 and 1")
        if not self.temperature > 0:
            raise HoEError(f"temperature is {self.temperature}; it must be above 0")
        for name in ("max_new_tokens", "max_length"):
            value = getattr(self, name)
            if value is not None and value < 1 + (name == "max_length"):
                raise HoEError(f"{name} is {value}; at least {1 + (name == 'max_length')} tokens are needed")
