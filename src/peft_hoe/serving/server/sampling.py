"""The next token of one text, drawn from its own logits and by its own random numbers: no neighbour in the batch matters."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from transformers import TopKLogitsWarper, TopPLogitsWarper

from ...errors import HoEError


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen.

    Args:
        temperature: 0 takes the most likely token.
        top_k: draw from so many most likely tokens; 0 for the whole vocabulary.
        top_p: draw from the most likely tokens of so much probability; 1 for the whole vocabulary.
        seed: of the random numbers; None for new ones.

    Raises:
        HoEError: a value is out of range.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.temperature <= 100:
            raise HoEError(f"temperature is {self.temperature}; it must be from 0 to 100", argument="temperature")
        if self.top_k < 0:
            raise HoEError(f"top_k is {self.top_k}; it must be at least 0", argument="top_k")
        if not 0 < self.top_p <= 1:
            raise HoEError(f"top_p is {self.top_p}; it must be above 0 and at most 1", argument="top_p")

    def of_choice(self, number: int) -> Sampling:
        """The same for one of several texts of a prompt, which differ also where a seed is given."""
        return self if self.seed is None else replace(self, seed=self.seed + number)

    def generator(self) -> torch.Generator:
        """Random numbers of the seed, or new ones."""
        generator = torch.Generator()
        if self.seed is None:
            generator.seed()
        else:
            generator.manual_seed(self.seed)
        return generator

    def draw(self, logits: Tensor, generator: torch.Generator) -> int:
        """A token for logits `(V,)`."""
        scores = logits.float().cpu()[None]
        if self.temperature == 0:
            return int(scores.argmax())
        scores = scores / self.temperature
        nothing = torch.empty(1, 0, dtype=torch.long)
        if self.top_k:
            scores = TopKLogitsWarper(self.top_k)(nothing, scores)
        if self.top_p < 1:
            scores = TopPLogitsWarper(self.top_p)(nothing, scores)
        return int(torch.multinomial(scores.softmax(-1), 1, generator=generator))
