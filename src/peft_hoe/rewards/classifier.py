"""A reward that a classifier gives, which reads text.

Shapes: B samples, K outputs that are used.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import HoEError, RewardError, check_choice
from ..generation.checks import whole
from ..generation.prompt_rows import is_chat
from ..generation.vocabulary import check_tokens, tokenizer_of, vocabulary_size
from .model_outputs import device_of, output_index, signs_of

Text = str | tuple[str, str]
Template = str | Callable[[Any, str], Text]


@dataclass
class ClassifierReward:
    """A transformers sequence classifier with its own tokenizer: completions are decoded and tokenised again.

    The reward is `sign` times the logit of `output`. Callable as any reward is, also without a trainer.

    Args:
        model: such as AutoModelForSequenceClassification; set to evaluation mode.
        tokenizer: the classifier's, not the policy's.
        output: which logit, as an index or one of the model's labels; several for several objectives.
        sign: 1, or -1 where a high logit is bad; one for all outputs or one for each.
        template: the text that is scored, such as "{completion}" or "Q: {prompt} A: {completion}", or a function of prompt and
            completion that returns it, or two texts, which the tokenizer joins as a pair. Default: the prompt followed by the
            completion; for chat messages, the classifier's chat template with the completion as the assistant's turn.
        batch_size: texts at once. One at a time where tokenizer and model do not agree on a padding token.
        max_length: tokens; longer texts (of a pair, the longer one) are cut off. Default: what tokenizer and model can take.
        truncation_side: where, "left" or, if the completion comes first, "right".

    Raises:
        RewardError: no loaded model, an output that it does not have, a template that cannot be filled in, or another
            truncation_side.
        HoEError: batch_size or max_length is no whole number of at least 1, or the tokenizer is none.

    >>> from transformers import LlamaConfig, LlamaForSequenceClassification
    >>> from peft_hoe import demo
    >>> from peft_hoe.rewards import ClassifierReward
    >>> config = LlamaConfig(
    ...     vocab_size=2048, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, num_labels=1,
    ...     pad_token_id=0,
    ... )
    >>> reward = ClassifierReward(LlamaForSequenceClassification(config), demo.load_tokenizer())
    >>> reward(["One day"], [" they laughed."]).shape
    torch.Size([1, 1])
    """

    model: Any
    tokenizer: Any
    output: int | str | Sequence[int | str] = 0
    sign: int | Sequence[int] = 1
    template: Template | None = None
    batch_size: int = 16
    max_length: int | None = None
    truncation_side: str = "left"

    def __post_init__(self) -> None:
        check_choice("truncation_side", self.truncation_side, ("left", "right"), RewardError)
        whole("batch_size", self.batch_size, 1)
        if self.max_length is not None:
            whole("max_length", self.max_length, 1)
        if not hasattr(self.model, "config"):
            raise RewardError(
                f"the classifier is {self.model!r}; load it, with AutoModelForSequenceClassification.from_pretrained",
                argument="model", value=self.model,
            )  # fmt: skip
        tokenizer_of(self.tokenizer)
        self.model.eval()
        wanted = [self.output] if isinstance(self.output, (int, str)) else list(self.output)
        self._columns = [output_index(self.model.config, output) for output in wanted]
        self._signs = signs_of(self.sign, len(wanted))
        if isinstance(self.template, str):
            try:
                self.template.format(prompt="", completion="")
            except (KeyError, IndexError, ValueError) as error:
                raise RewardError(
                    f"the template {self.template!r} cannot be filled in ({type(error).__name__}: {error}); it may hold "
                    "{prompt} and {completion}, and other braces doubled",
                    argument="template",
                    value=self.template,
                ) from None

    @property
    def outputs(self) -> int:
        """K, the number of objectives that it covers."""
        return len(self._columns)

    @torch.no_grad()
    def __call__(self, prompts: Sequence[Any], completions: Sequence[str], **columns: Any) -> Tensor:
        """Rewards `(B, K)`, float32 on the CPU."""
        texts = [self._text(prompt, completion) for prompt, completion in zip(prompts, completions, strict=True)]
        # A chat template writes its own special tokens.
        chat = self.template is None and bool(prompts) and all(is_chat(prompt) for prompt in prompts)
        size = self.batch_size if self._can_pad() else 1
        logits = [self._logits(texts[start : start + size], not chat) for start in range(0, len(texts), size)]
        return torch.cat(logits)[:, self._columns] * self._signs

    def _logits(self, texts: Sequence[Text], special_tokens: bool) -> Tensor:
        limit = self.max_length or _longest(self.tokenizer, self.model.config)
        pairs = isinstance(texts[0], tuple)
        with _truncating(self.tokenizer, self.truncation_side):
            batch = self.tokenizer(
                *([list(side) for side in zip(*texts, strict=True)] if pairs else [list(texts)]),
                return_tensors="pt",
                padding=len(texts) > 1,
                truncation=limit is not None,
                max_length=limit,
                add_special_tokens=special_tokens,
                # Some fast tokenizers return them for decoders too: Llama refuses them, GPT-2 adds their embedding.
                return_token_type_ids=bool(getattr(self.model.config, "type_vocab_size", 0)),
            )
        try:
            check_tokens(batch["input_ids"], self.model, self.tokenizer, "texts")
        except HoEError as error:
            raise RewardError(
                f"{type(self.model).__name__}: {error}", argument="tokenizer", value=error.value
            ) from None
        logits: Tensor = self.model(**batch.to(device_of(self.model))).logits
        return logits.float().cpu()

    def _text(self, prompt: Any, completion: str) -> Text:
        if callable(self.template):
            return self.template(prompt, completion)
        if self.template is not None:
            return self.template.format(prompt=_plain(prompt), completion=completion)
        if not is_chat(prompt):
            return str(prompt) + completion
        if not self.tokenizer.chat_template:
            raise RewardError(
                "the prompts are chat messages, but the classifier's tokenizer has no chat template; state the text to score, "
                'such as ClassifierReward(..., template="{prompt}\\n{completion}")',
                argument="template",
            )
        messages = [*prompt, {"role": "assistant", "content": completion}]
        return str(self.tokenizer.apply_chat_template(messages, tokenize=False))

    def _can_pad(self) -> bool:
        """Decoders find a text's last token by the padding id of their configuration, so it must be the tokenizer's.

        The model's embedding must have a row for it, too.
        """
        padding, size = self.tokenizer.pad_token_id, vocabulary_size(self.model)
        return padding is not None and padding == self.model.config.pad_token_id and (size is None or padding < size)


def _plain(prompt: Any) -> str:
    return "\n".join(str(turn["content"]) for turn in prompt) if is_chat(prompt) else str(prompt)


def _longest(tokenizer: Any, config: Any) -> int | None:
    limits = [tokenizer.model_max_length, getattr(config, "max_position_embeddings", None) or -1]
    known = [limit for limit in limits if 0 < limit < 1_000_000]  # tokenizers without a limit say 1e30
    return min(known) if known else None


@contextmanager
def _truncating(tokenizer: Any, end: str) -> Iterator[None]:
    """Texts that are too long are cut off at that end, which is not where the completion stands."""
    side, tokenizer.truncation_side = tokenizer.truncation_side, end
    try:
        yield
    finally:
        tokenizer.truncation_side = side
