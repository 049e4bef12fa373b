"""The reward and cost models of Safe-RLHF (PKU-Alignment/beaver-7b-...), which transformers' Auto classes cannot load.

Their checkpoints are a Llama under `model.` and a linear layer under `score_head.`; the score of a text is that layer at the
last token (github.com/PKU-Alignment/safe-rlhf). Statistics under `normalizer.` are of training and unused.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaModel, LlamaPreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutput

from ..errors import RewardError


class ScoreModel(LlamaPreTrainedModel):
    """A Llama with a score head, which `ClassifierReward` takes as a classifier of `score_dim` outputs."""

    _keys_to_ignore_on_load_unexpected = [r"^normalizer\.", r"rotary_emb\.inv_freq$"]  # noqa: RUF012

    def __init__(self, config: Any) -> None:
        if getattr(config, "do_normalize", False):
            raise RewardError(
                "the score model normalises its scores (do_normalize in its config.json), which is not supported; set it to "
                "false: rewards are normalised where they are used",
                argument="do_normalize", value=config.do_normalize, allowed=False,
            )  # fmt: skip
        config.num_labels = getattr(config, "score_dim", 1)
        super().__init__(config)
        self.model = LlamaModel(config)
        self.score_head = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    def forward(self, input_ids: Tensor, attention_mask: Tensor, **inputs: Any) -> SequenceClassifierOutput:
        """Scores `(B, score_dim)` of tokens `(B, S)`, as `logits`."""
        hidden = self.model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).last_hidden_state
        last = attention_mask.shape[1] - 1 - attention_mask.flip(1).argmax(1)  # (B,)
        scores = self.score_head(hidden[torch.arange(len(last), device=hidden.device), last])
        return SequenceClassifierOutput(logits=scores)
