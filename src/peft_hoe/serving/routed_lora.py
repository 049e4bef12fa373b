"""A LoRA that carries its routers: what a gate between A and B needs, written into the LoRA's own tensors.

An engine keeps for every adapter in memory an A `(r, d_in)` and a B `(d_out, r)` for each module, and knows nothing else. So
A gets the routers' rows beside the experts', which makes A x their logits too, and B, whose columns there must not add
anything, has room for what the gate reads:

    places    0 ... H           H ... H + R        V routers' slots        V more
    A         zeros             experts' rows      router rows             what rounding them left
    B         the header        experts' columns   one column for each     zeros

The header are four numbers that no other LoRA has there, then those of `Header`, column after column. A slot's column says
which router and expert it belongs to, the router's weight and the slot's bias. Every number stands there as two, the first
rounded to bfloat16, so that a 16-bit engine has 16 bits of it and a float32 engine all. The temperature is divided out.

Shapes: S experts in play of ranks that sum to R, V slots; a format has room for L >= S and for V.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..config import HoEConfig
from ..errors import HoEError
from ..preference import FloatArray
from ..tuner.lengths import gram_root
from .lora_factors import LoraFactors
from .source import AdapterSource

MAGIC = (227.0, 181.0)  # the other two are L and V
SLOT_NUMBERS = 6  # router, expert, and weight and bias as two numbers each


class Header(NamedTuple):
    """What the gate reads of one adapter in one module; a leading axis where it is read of several at once.

    Attributes:
        ends: `(L,)`, after how many ranks an expert's end.
        static: `(L,)`, the votes that do not depend on the input.
        lengths: `(L,)`, |e_j|.
        root: `(L, L)`, which makes of votes a vector as long as their experts' sum (`tuner/lengths.py`).
    """

    ends: Tensor
    static: Tensor
    lengths: Tensor
    root: Tensor


@dataclass(frozen=True)
class RoutedFormat:
    """How much room files and gate leave; both must have the same.

    Attributes:
        experts: L, at most so many are in play.
        slots: V, at most so many slots vote.
    """

    experts: int
    slots: int

    @property
    def magic(self) -> tuple[float, float, float, float]:
        """The four numbers at the beginning of a header."""
        return (*MAGIC, float(self.experts), float(self.slots))

    @property
    def numbers(self) -> int:
        """Length of a header without them, each number counted once."""
        return self.experts * (3 + self.experts)

    def columns(self, d_out: int) -> int:
        """H, the columns that a header fills."""
        return -(-(4 + 2 * self.numbers) // d_out)

    def rank(self, d_out: int, experts: int) -> int:
        """The rank of a LoRA whose experts' ranks sum to `experts`."""
        return self.columns(d_out) + experts + 2 * self.slots

    def split(self, numbers: Tensor) -> Header:
        """The header's parts of its numbers `(..., numbers)`."""
        size = self.experts
        ends, static, lengths, root = numbers.split([size, size, size, size * size], dim=-1)
        return Header(ends, static, lengths, root.unflatten(-1, (size, size)))


@dataclass(frozen=True)
class RoutedVotes:
    """The votes of one preference of which some depend on the input.

    Attributes:
        static: `(all experts,)` float64, those that do not.
        live: `(routers,)`, the weight of each trained router. Where it votes by module, its rows are 0 and its biases vote.
        members: of every router the experts that it votes for, ascending.
        by_input: whether one of these votes by the input.
    """

    static: FloatArray
    live: FloatArray
    members: Sequence[Sequence[int]]
    by_input: bool

    @property
    def routers(self) -> list[int]:
        """Those that were trained and have a weight here."""
        return np.flatnonzero(self.live).tolist()

    @property
    def experts(self) -> list[int]:
        """Those in play, ascending."""
        voted = {expert for router in self.routers for expert in self.members[router]}
        return sorted(voted | set(np.flatnonzero(self.static).tolist()))

    @property
    def slots(self) -> int:
        """How many slots vote."""
        return sum(len(self.members[router]) for router in self.routers)


def routed_votes(config: HoEConfig, point: FloatArray) -> RoutedVotes:
    """The votes of a preference `(N,)`, trained routers voting by the input."""
    weights, _ = config.preference_router().weights(point)
    trained = np.asarray([bool(spec.trained) for spec in config.routers or []], dtype=bool)
    by_token = np.asarray([spec.kind == "token" for spec in config.routers or []], dtype=bool)
    experts, routers = np.split(weights, [len(config.expert_names)])
    live = routers * trained
    static = experts + (routers * ~trained) @ config.static_votes()
    return RoutedVotes(static, live, config.votes(), by_input=bool(live[by_token].any()))


def routed_factors(source: AdapterSource, module: str, votes: RoutedVotes, layout: RoutedFormat) -> LoraFactors:
    """A and B of a module, float32.

    Args:
        source: the adapter.
        module: its name.
        votes: of a preference at which a router votes.
        layout: the room that there is.

    Raises:
        HoEError: the module has too few outputs.
    """
    a, b = (factor.float() for factor in source.factors(module))
    d_out, d_in = b.shape[0], a.shape[1]
    if d_out < SLOT_NUMBERS:
        raise HoEError(
            f"{module} has {d_out} outputs, too few to carry routers to vLLM ({SLOT_NUMBERS}); leave it out of target_modules, "
            "or serve with peft-hoe serve",
            argument="target_modules", value=module, allowed=f"modules of at least {SLOT_NUMBERS} outputs",
        )  # fmt: skip
    every = source.ranks(module)
    starts = np.concatenate([[0], np.cumsum(every)])
    ranks = torch.tensor(
        [int(starts[expert]) + k for expert in votes.experts for k in range(every[expert])], dtype=torch.int64
    )
    first = layout.columns(d_out)
    last = first + len(ranks)
    wide_a, wide_b = (
        a.new_zeros(layout.rank(d_out, len(ranks)), d_in),
        b.new_zeros(d_out, layout.rank(d_out, len(ranks))),
    )
    wide_a[first:last], wide_b[:, first:last] = a[ranks], b[:, ranks]
    header = torch.cat([torch.tensor(layout.magic), _twice(_numbers(source, module, votes, layout)).flatten()])
    columns = torch.zeros(first * d_out)
    columns[: len(header)] = header
    wide_b[:, :first] = columns.view(first, d_out).T
    rows, slots = _slots(source, module, votes)
    rounded = _twice(rows)
    wide_a[last : last + len(rows)] = rounded[..., 0]
    wide_a[last + layout.slots : last + layout.slots + len(rows)] = rounded[..., 1]
    wide_b[:SLOT_NUMBERS, last : last + len(rows)] = slots.T
    return LoraFactors(wide_a.contiguous(), wide_b.contiguous(), float("nan"), 0.0)


def _numbers(source: AdapterSource, module: str, votes: RoutedVotes, layout: RoutedFormat) -> Tensor:
    """The header's numbers, float64."""
    experts, size = votes.experts, layout.experts
    ranks = torch.zeros(size, dtype=torch.float64)
    ranks[: len(experts)] = torch.tensor([source.ranks(module)[expert] for expert in experts], dtype=torch.float64)
    static, lengths = torch.zeros(size, dtype=torch.float64), torch.ones(size, dtype=torch.float64)
    static[: len(experts)] = torch.from_numpy(votes.static[experts])
    root = torch.zeros(size, size, dtype=torch.float64)
    gram = source.gram(module)
    if gram is None:
        root[0] = 1.0  # as long as votes' sum is, whatever they are: the factor is 1
    else:
        found, each = gram_root(gram[experts][:, experts])
        root[: len(experts), : len(experts)], lengths[: len(experts)] = found, each[0]
    return torch.cat([ranks.cumsum(0), static, lengths, root.flatten()])


def _slots(source: AdapterSource, module: str, votes: RoutedVotes) -> tuple[Tensor, Tensor]:
    """The voting slots' rows `(V, d_in)` float64 over the temperature, and their numbers `(V, 6)`."""
    weight, bias = source.router(module)
    temperature = source.config.router_temperature
    starts = np.concatenate([[0], np.cumsum([len(members) for members in votes.members])])
    rows: list[int] = []
    numbers: list[list[float]] = []
    for place, router in enumerate(votes.routers):
        for k, expert in enumerate(votes.members[router]):
            rows.append(int(starts[router]) + k)
            numbers.append([place + 1, votes.experts.index(expert)])
    live = torch.tensor([votes.live[router] for router in votes.routers for _ in votes.members[router]])
    weighed = torch.stack([live, bias[rows].double() / temperature], dim=1)
    return weight[rows].double() / temperature, torch.cat([torch.tensor(numbers), _twice(weighed).flatten(1)], dim=1)


def _twice(numbers: Tensor) -> Tensor:
    """Every number `(...)` as two `(..., 2)` float32 whose sum it is; the first is exact in bfloat16."""
    first = numbers.to(torch.bfloat16).double()
    return torch.stack([first, numbers.double() - first], dim=-1).float()
