"""Tokenizers, and which of their tokens a model has an embedding for.

A tokenizer may know more: tokens that were added to it and not to the model. Padding is masked and may be any; every other id
beyond the embedding would fail deep in the model, on a GPU with the whole process.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..errors import HoEError


def vocabulary_size(model: Any) -> int | None:
    """How many tokens a model has an embedding for, where it tells."""
    try:
        embedding = model.get_input_embeddings()
    except (AttributeError, NotImplementedError):
        return None
    while hasattr(embedding, "get_base_layer"):  # adapted
        embedding = embedding.get_base_layer()
    size: int | None = getattr(embedding, "num_embeddings", None)
    return size


def tokenizer_of(processing_class: Any) -> Any:
    """A tokenizer, or the one that a processor holds.

    Raises:
        HoEError: it is neither.
    """
    found = getattr(processing_class, "tokenizer", processing_class)
    if not hasattr(found, "pad_token_id"):
        what = repr(processing_class) if isinstance(processing_class, (str, type(None))) else type(found).__name__
        raise HoEError(
            f"the tokenizer is {what}; load the policy's, with transformers.AutoTokenizer.from_pretrained",
            argument="processing_class", value=processing_class,
        )  # fmt: skip
    return found


def check_tokens(
    ids: Tensor, model: Any, tokenizer: Any = None, argument: str = "texts", *, what: str = "model"
) -> None:
    """See that a model knows the tokens that it shall read.

    Args:
        ids: of texts, of any shape; padding as 0.
        model: any that tells its embedding.
        tokenizer: for the token's name in the error.
        argument: what the error calls the texts.
        what: what it calls the model.

    Raises:
        HoEError: there is one that it does not know.
    """
    size, largest = vocabulary_size(model), int(ids.max()) if ids.numel() else 0
    if size is not None and largest >= size:
        named = "" if tokenizer is None else f" ({tokenizer_of(tokenizer).decode([largest])!r})"
        raise HoEError(
            f"token {largest}{named} in the {argument} is none of the {size} that the {what} knows; take the tokenizer that "
            "belongs to it, or leave tokens out that were added to it",
            argument=argument if what == "model" else what, value=largest, allowed=f"below {size}",
        )  # fmt: skip
