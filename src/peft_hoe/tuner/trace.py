"""Which expert worked on which token: the votes of a generate or a forward, kept and shown.

The layers hand their votes to `record_votes`' recorder anyway, when there is one; outside the block nothing is asked and
nothing costs. Shapes: B rows, T tokens, L experts.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import HoEError, check_choice
from .adapter import Adapter
from .cache_owner import given_cache
from .calls import THIS_THREAD
from .functional import adapter_of
from .steering import Steering
from .trace_page import page

_LAYER = re.compile(r"\.(\d+)\.")


class RoutingTrace:
    """The votes of one batch of texts, from its first token on.

    A forward without a filled key-value cache begins anew, so that the trace is of the last text; one with a cache goes on. The
    last token that generate writes is not there: no module has read it. Beam search exchanges rows: trace greedy or
    sampled texts.

    Args:
        adapter: whose votes they are.
        modules: names, or the ends of names, of the modules to keep; None for all.

    Attributes:
        experts: names of the L experts.

    >>> import peft_hoe
    >>> model, tokenizer = peft_hoe.demo.load_demo_adapter(), peft_hoe.demo.load_tokenizer()
    >>> with peft_hoe.trace_routing(model) as trace:
    ...     _ = model(**tokenizer("Once upon a time", return_tensors="pt"), preference=[0, 1])
    >>> isinstance(trace, peft_hoe.RoutingTrace), trace.mean()[0, 0].tolist()  # of cheerful, vivid and centroid
    (True, [0.0, 1.0, 0.0])
    """

    def __init__(self, adapter: Adapter, modules: Sequence[str] | None = None) -> None:
        self.experts = adapter.expert_names
        self._wanted = None if modules is None else tuple(modules)
        self._ids: list[Tensor] = []
        self._votes: dict[str, list[Tensor]] = {}

    # -- what was recorded ---

    @property
    def modules(self) -> list[str]:
        """Names, in the order in which they run."""
        return list(self._votes)

    @property
    def tokens(self) -> Tensor | None:
        """Ids `(B, T)`; None before the first forward, or where the model was given embeddings."""
        return torch.cat(self._ids, dim=1) if self._ids else None

    def votes(self, module: str) -> Tensor:
        """Votes `(B, T, L)` float32 of a module, by its name or the end of it.

        Raises:
            HoEError: no module, or several, are called so.
        """
        found = [name for name in self._votes if name == module or name.endswith(f".{module}")]
        if len(found) != 1:
            raise HoEError(
                f"the trace has {len(found)} modules called {module!r}; it has {self.modules}",
                argument="module",
                value=module,
                allowed=self.modules,
            )
        return torch.cat(self._votes[found[0]], dim=1)

    def mean(self) -> Tensor:
        """Votes `(B, T, L)`, the mean over modules.

        Raises:
            HoEError: nothing was recorded.
        """
        return torch.stack([self.votes(module) for module in self._recorded()]).mean(0)

    # -- shown ---

    def to_html(self, tokenizer: Any = None, *, row: int = 0, module: str | None = None) -> str:
        """A page without scripts: every token on the colours of its experts, each as wide as its vote (as in paper figure 10).

        Args:
            tokenizer: for the tokens' texts; without one their ids are shown.
            row: of the batch.
            module: of which; default the mean over all.

        Raises:
            HoEError: nothing was recorded, or there is no such row or module.
        """
        votes = self._row(self.mean() if module is None else self.votes(module), row)
        ids = self.tokens
        if ids is None:
            texts = [str(place) for place in range(len(votes))]
        elif tokenizer is None:
            texts = [f"{token} " for token in ids[row].tolist()]
        else:
            texts = _pieces(tokenizer, ids[row].tolist())
        return page(texts, votes.tolist(), self.experts, module or f"mean over {len(self.modules)} modules")

    def plot(self, by: str = "layer", *, row: int = 0) -> Any:
        """Mean votes as a matplotlib Figure.

        Args:
            by: "layer": over the tokens of each layer. "position": over the modules at each token.
            row: of the batch.

        Raises:
            HoEError: nothing was recorded, there is no such row, or matplotlib is missing.
        """
        check_choice("by", by, ("layer", "position"))
        from .trace_plot import stacked

        if by == "position":
            votes = self._row(self.mean(), row)
            return stacked(range(len(votes)), votes.tolist(), self.experts, "token")
        layers: dict[int, list[Tensor]] = {}
        for module in self._recorded():
            number = _LAYER.search(module)
            layers.setdefault(int(number[1]) if number else -1, []).append(self._row(self.votes(module), row).mean(0))
        heights = [torch.stack(layers[layer]).mean(0).tolist() for layer in sorted(layers)]
        return stacked(sorted(layers), heights, self.experts, "layer")

    def _recorded(self) -> list[str]:
        if not self._votes:
            raise HoEError("nothing was recorded; run the model inside the block of trace_routing")
        return self.modules

    def _row(self, votes: Tensor, row: int) -> Tensor:
        if not 0 <= row < len(votes):
            raise HoEError(
                f"row is {row}, but {len(votes)} were recorded", argument="row", value=row, allowed=range(len(votes))
            )
        return votes[row]

    # -- recording ---

    def add(self, ids: Tensor | None, votes: dict[str, Tensor], *, anew: bool) -> None:
        """Take over a forward over new tokens.

        Args:
            ids: `(B, S)`.
            votes: by module, broadcastable to `(B, S, L)`.
            anew: whether it begins a text.
        """
        if anew or (ids is not None and self._ids and len(ids) != len(self._ids[0])):
            self._ids, self._votes = [], {}
        if ids is not None:
            self._ids.append(ids.detach().cpu())
        for module, vote in votes.items():
            if self._wanted is None or module.endswith(self._wanted):
                whole = vote if ids is None or vote.ndim > 2 else vote.expand(*ids.shape, vote.shape[-1])
                if ids is not None:
                    whole = whole.expand(*ids.shape, whole.shape[-1])
                self._votes.setdefault(module, []).append(whole.float().cpu())


@contextlib.contextmanager
def trace_routing(
    model: nn.Module, modules: Sequence[str] | None = None, *, adapter_name: str | None = None
) -> Iterator[RoutingTrace]:
    """Keep the votes of the model's forwards and generates of this thread.

    Args:
        model: any decoder-only model that carries HoE layers.
        modules: names, or ends of names, such as `["q_proj"]`; default all.
        adapter_name: default the first active adapter.

    Raises:
        HoEError: the model has an encoder.
        PreferenceError: there is no such adapter.

    >>> import peft_hoe
    >>> model, tokenizer = peft_hoe.demo.load_demo_adapter(), peft_hoe.demo.load_tokenizer()
    >>> prompt = tokenizer("Once upon a time", return_tensors="pt")
    >>> with peft_hoe.trace_routing(model) as trace:
    ...     _ = model.generate(**prompt, preference=[0.75, 0.25], max_new_tokens=3, do_sample=False)
    >>> trace.experts, [round(vote, 3) for vote in trace.mean()[0, -1].tolist()]
    (['cheerful', 'vivid', 'centroid'], [0.5, 0.0, 0.5])
    """
    whole: Any = model
    root = whole.get_base_model() if hasattr(whole, "get_base_model") else whole
    if getattr(getattr(root, "config", None), "is_encoder_decoder", False):
        raise HoEError(
            f"{type(root).__name__} has an encoder; a trace is of one text, of a decoder-only model",
            argument="model",
            value=type(root).__name__,
        )
    adapter = adapter_of(model, adapter_name)
    trace = RoutingTrace(adapter, modules)
    votes: dict[str, Tensor] = {}
    state: dict[str, Any] = {}

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        votes.clear()
        cache = given_cache(kwargs)
        state["anew"] = cache is None or not hasattr(cache, "get_seq_length") or int(cache.get_seq_length()) == 0
        state["ids"] = kwargs.get("input_ids", args[0] if args else None)

    def after(module: nn.Module, args: Any, output: Any) -> None:
        trace.add(state["ids"], dict(votes), anew=state["anew"])

    outer, THIS_THREAD.recorder = THIS_THREAD.recorder, (Steering.of(model), adapter.name, votes)
    hooks = [root.register_forward_pre_hook(before, with_kwargs=True), root.register_forward_hook(after)]
    try:
        yield trace
    finally:
        THIS_THREAD.recorder = outer
        for hook in hooks:
            hook.remove()


def _pieces(tokenizer: Any, ids: list[int]) -> list[str]:
    """The text that each token adds to those before it."""
    whole = [tokenizer.decode(ids[: end + 1], clean_up_tokenization_spaces=False) for end in range(len(ids))]
    return [text[len(before) :] for before, text in zip(["", *whole], whole, strict=False)]
