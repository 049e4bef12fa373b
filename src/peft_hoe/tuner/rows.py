"""From the rows of a plan to the rows of a layer's input.

A row of preferences is for a row of the batch. What reaches a layer may be those rows, each repeated (beams), each as long as
the sequence (flattened inputs), or something else: tokens sent to an expert, patches of pictures. Where that cannot be told
apart, different preferences in one batch are an error.

Pictures and sounds come in an order of their own, as many as the texts have places for. They are in the rows' order, and as
many for each, exactly if each row has the same number of placeholder tokens.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from ..errors import RowsError
from .calls import Call, Media
from .plan import Plan

_INPUTS = (
    "input_ids",
    "inputs_embeds",
    "decoder_input_ids",
    "decoder_inputs_embeds",
    "inputs",
    "pixel_values",
    "labels",
)
# Where the tokens of a batch arrive in an order of their own, perhaps as many as there are rows.
_DISPATCHED = re.compile(r"(^|\.)experts?(\.|$)")
_MEDIA = re.compile(r"pixel|image|video|audio|input_features|input_values|patches|speech")
_SEES_MEDIA = re.compile(r"vision|visual|image|video|audio|speech|projector|connector|resampler|perceiver|qformer|mm_")
_PLACEHOLDER = re.compile(r"(image|video|audio|speech|sound)\w*_token_(id|index)$")
_HEAD = re.compile(r"(^|\.)(lm_head|score|classifier|head|qa_outputs)$")


def extent(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[int | None, frozenset[int]]:
    """The batch size (None where no tensor tells) and the sequence lengths of a call."""
    named = [kwargs[name] for name in _INPUTS if name in kwargs]
    tensors = [item for item in (*args, *named) if isinstance(item, torch.Tensor) and item.ndim > 0]
    batch = int(tensors[0].shape[0]) if tensors else None
    return batch, frozenset(int(tensor.shape[1]) for tensor in tensors if tensor.ndim > 1)


def media_of(root: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Media | None:
    """The pictures and sounds that a call of the root model brings beside its text; None without any."""
    media = [
        item
        for name, item in kwargs.items()
        if _MEDIA.search(name) and isinstance(item, torch.Tensor) and item.is_floating_point()
    ]
    text = kwargs.get("input_ids", args[0] if args else None)
    if not media or (text is None and kwargs.get("inputs_embeds") is None):
        return None  # without text, the rows are those of the media
    if text is None:
        return Media(False, _text_part(root))
    config = getattr(root, "config", None)
    places = [getattr(config, name, None) for name in dir(config) if _PLACEHOLDER.search(name)]
    counts = [(text == place).sum(-1) for place in places if isinstance(place, int)]
    if counts:
        even = all(bool((count == count[0]).all()) for count in counts)
    else:  # they belong to rows of the batch, not to places in the text
        even = all(item.shape[0] == text.shape[0] for item in media)
    return Media(even, _text_part(root))


def check_rows(x: torch.Tensor, plan: Plan, call: Call | None, module: str) -> None:
    """See that the rows of x are the plan's in order, each as often: once, what generate expands by, or times the length.

    Args:
        x: a module's input.
        plan: in effect.
        call: under way.
        module: its name.

    Raises:
        RowsError: the rows of x are no such multiple, so they are not samples in order; names the module.
    """
    if plan.rows is None:
        return
    repeat, rest = divmod(x.shape[0], plan.rows)
    if rest or plan.rows > 1 and not _in_order(x, repeat, call, module):
        raise RowsError(
            f"{module} was given an input of shape {tuple(x.shape)}, whose rows are not the {plan.rows} rows "
            "that preferences were given for (dispatched experts, packed batches, patches, and pictures that are not as many "
            "for each row are not); use one preference for the whole batch, or exclude this module",
            module=module,
            shape=x.shape,
        )


def _in_order(x: torch.Tensor, repeat: int, call: Call | None, module: str) -> bool:
    """Whether each row of the plan stands `repeat` times in x, one after the other."""
    if x.ndim == 2 and _DISPATCHED.search(module):
        return False
    if call is None:
        return repeat == 1
    if call.media is not None and _reads_media(module, call.media.text):
        return call.media.even
    if x.ndim == 2:
        flat = {length * expansion for length in call.lengths for expansion in call.expansions}
        return repeat in call.expansions | flat
    before, call.heights[module] = call.heights.get(module, repeat), repeat
    return repeat in call.expansions and repeat >= before


def _reads_media(module: str, text: str | None) -> bool:
    within_text = text is None or module.startswith(f"{text}.") or bool(_HEAD.search(module))
    return bool(_SEES_MEDIA.search(module)) or not within_text


def _text_part(root: nn.Module) -> str | None:
    """Name of the module that embeds tokens and what is built on them; None where that is the root itself, or unknown."""
    try:
        embeddings: Any = root.get_input_embeddings()  # type: ignore[operator]
    except (AttributeError, NotImplementedError):
        return None
    name = next((name for name, module in root.named_modules() if module is embeddings), "")
    return name.rpartition(".")[0] or None
