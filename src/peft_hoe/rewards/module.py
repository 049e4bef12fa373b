"""A reward that a module gives, which reads the policy's tokens.

Shapes: B samples, S tokens of prompt and completion, K outputs that are used.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..errors import RewardError
from ..generation.checks import whole
from ..generation.vocabulary import vocabulary_size
from .model_outputs import device_of, signs_of


@dataclass
class ModuleReward:
    """A module with the interface of TRL's PPO, on the policy's tokens: a backbone named by `base_model_prefix`, and `score`.

    The reward is `score` of the backbone's last hidden state at the last token of the text. Padding is masked, and positions
    are counted without it.

    Args:
        model: set to evaluation mode.
        output: which outputs of `score`, one or several.
        sign: 1, or -1 where a high score is bad; one for all outputs or one for each.
        batch_size: rows at once.

    Raises:
        RewardError: the module has another interface, or not these outputs.
        HoEError: batch_size is no whole number of at least 1.

    >>> import torch
    >>> from peft_hoe.rewards import Rewards
    >>> from transformers import LlamaConfig, LlamaForSequenceClassification
    >>> config = LlamaConfig(
    ...     vocab_size=64, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, num_labels=1,
    ...     pad_token_id=0,
    ... )
    >>> rewards = Rewards({"good": LlamaForSequenceClassification(config)}, ["good"])
    >>> ids = torch.tensor([[5, 6, 7]])
    >>> rewards(["a"], ["b"], input_ids=ids, attention_mask=torch.ones_like(ids)).shape
    (1, 1)
    """

    model: nn.Module
    output: int | Sequence[int] = 0
    sign: int | Sequence[int] = 1
    batch_size: int = 16

    def __post_init__(self) -> None:
        whole("batch_size", self.batch_size, 1)
        prefix = getattr(self.model, "base_model_prefix", None)
        if not (isinstance(prefix, str) and hasattr(self.model, prefix) and hasattr(self.model, "score")):
            raise RewardError(
                f"{type(self.model).__name__} has not the interface of TRL's reward models (a backbone named by "
                "base_model_prefix, and score); wrap a classifier as peft_hoe.rewards.ClassifierReward(model, "
                "its_tokenizer)",
                argument="model",
                value=type(self.model).__name__,
            )
        self.model.eval()
        self._columns = [self.output] if isinstance(self.output, int) else list(self.output)
        self._signs = signs_of(self.sign, len(self._columns))
        width = getattr(self.model.score, "out_features", None)
        if width is not None and not all(0 <= column < width for column in self._columns):
            raise RewardError(
                f"{type(self.model).__name__}.score has {width} outputs; outputs {self._columns} are asked for",
                argument="output",
                value=self._columns,
                allowed=width,
            )

    @property
    def outputs(self) -> int:
        """K, the number of objectives that it covers."""
        return len(self._columns)

    @torch.no_grad()
    def __call__(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Rewards `(B, K)`, float32 on the CPU.

        Args:
            input_ids: the policy's tokens `(B, S)`, prompt and completion; padding may be on both sides.
            attention_mask: `(B, S)`, 0 on padding.
        """
        self._check_vocabulary(input_ids[attention_mask.bool()])
        device = device_of(self.model)
        parts = []
        for start in range(0, len(input_ids), self.batch_size):
            rows = slice(start, start + self.batch_size)
            parts.append(self._scores(input_ids[rows].to(device), attention_mask[rows].to(device).bool()).float().cpu())
        return torch.cat(parts)[:, self._columns] * self._signs

    def _scores(self, input_ids: Tensor, mask: Tensor) -> Tensor:
        """All outputs `(B, outputs of score)` at each row's last token."""
        backbone = getattr(self.model, str(self.model.base_model_prefix))
        answer = backbone(
            input_ids=input_ids.masked_fill(~mask, 0),
            attention_mask=mask,
            position_ids=mask.long().cumsum(1) - mask.long(),
            return_dict=True,
            output_hidden_states=True,
            use_cache=False,
        )
        last = mask.shape[1] - 1 - mask.long().flip(1).argmax(1)  # (B,)
        hidden = answer.hidden_states[-1][torch.arange(len(last), device=last.device), last]
        score: Tensor = self.model.score(hidden)  # type: ignore[operator]
        return score

    def _check_vocabulary(self, input_ids: Tensor) -> None:
        """Of the ids that it reads: those of padding are masked, and may be any."""
        size = vocabulary_size(self.model)
        if size is not None and input_ids.numel() and int(input_ids.max()) >= size:
            raise RewardError(
                f"{type(self.model).__name__} knows {size} tokens, but the policy's ids go up to {int(input_ids.max())}: "
                "it has another tokenizer; wrap it as peft_hoe.rewards.ClassifierReward(model, its_tokenizer)",
                argument="model",
                value=int(input_ids.max()),
                allowed=size,
            )
