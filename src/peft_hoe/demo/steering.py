"""The job of the demonstration: complete prompts at many preferences, score the completions, compare with the policies.

Shapes: P prompts, K preferences, N objectives.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM
from transformers.utils import logging

from ..errors import HoEWarning
from ..evaluation import HoEMethod, Sweep, sweep
from ..generation import Decoding
from ..generation.completer import Completer
from ..generation.settings import evaluating
from ..preference import FloatArray, das_dennis, uniform
from .embedded import BASE, POLICIES, REWARDS, Reward, load_prompts

_TINY = 10_000_000  # parameters below which one thread is faster than several


@dataclass(frozen=True)
class Task:
    """What is steered, and how it is measured.

    Attributes:
        base: directory or Hub id.
        policies: `{objective: directory or Hub id}`.
        rewards: `{objective: function of prompts and completions}`, for every objective or none.
        prompts: P texts that are continued as they are.
        decoding: greedy, of some length.
    """

    base: str
    policies: Mapping[str, str]
    rewards: Mapping[str, Reward]
    prompts: Sequence[str]
    decoding: Decoding

    @property
    def objectives(self) -> list[str]:
        """The N names."""
        return list(self.policies)


def embedded_task(decoding: Decoding) -> Task:
    """The tiny models that the package carries."""
    return Task(BASE, POLICIES, REWARDS, load_prompts(), decoding)


def shown_preferences(n: int) -> FloatArray:
    """A few preferences to read texts at, (K, N): 5 for up to 4 objectives, else the corners and the centroid."""
    if n == 2:
        return das_dennis(2, 4)
    corners = [*np.eye(n), uniform(n)]
    return np.stack(corners if n > 3 else [*corners, np.asarray([0.5, 0.5, 0.0])])


def load_model(source: str) -> Any:
    """A causal language model for inference: a tiny one on one thread, any other on the GPU where there is one."""
    model = AutoModelForCausalLM.from_pretrained(source).eval()
    if model.num_parameters() < _TINY:
        torch.set_num_threads(1)
        return model
    return model.to("cuda" if torch.cuda.is_available() else "cpu")


class Alone:
    """A model that knows of no preference, as a method of a sweep.

    Args:
        name: what tables and pictures call it.
        model: any causal language model.
        tokenizer: its tokenizer.
        task: whose decoding it has.
    """

    def __init__(self, name: str, model: Any, tokenizer: Any, task: Task) -> None:
        self.name, self.model, self.objectives = name, model, tuple(task.objectives)
        self.completer = Completer(model, tokenizer, task.decoding)
        self.decoding = self.completer.decoding.record

    def __call__(self, prompts: Sequence[Any], preferences: FloatArray) -> list[str]:
        """Complete K prompts."""
        with evaluating(self.model):
            return self.completer.complete(self.model, prompts)


def texts_at(task: Task, model: Any, tokenizer: Any, preferences: FloatArray) -> list[str]:
    """Completions of the first prompt at each preference (K, N), in one batch."""
    return HoEMethod(model, tokenizer, decoding=task.decoding)([task.prompts[0]] * len(preferences), preferences)


def measure_front(task: Task, model: Any, tokenizer: Any) -> Sweep:
    """Mean rewards at every preference of the grid."""
    with _no_scale_needed():
        return sweep(
            model, tokenizer, task.prompts, task.rewards, decoding=task.decoding, name="HoE adapter", progress=False
        )


def measure_alone(task: Task, method: Alone) -> Sweep:
    """Mean rewards of one model; its only preference stands for any."""
    with _no_scale_needed():
        return sweep(
            prompts=task.prompts, rewards=task.rewards, preferences=[uniform(len(task.objectives))], generate=method,
            progress=False,
        )  # fmt: skip


@contextmanager
def _no_scale_needed() -> Iterator[None]:
    """A sweep warns where its rewards give no scale for hypervolumes; the demonstration shows raw rewards."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "rewards are not normalised", HoEWarning)
        yield


@contextmanager
def calm() -> Iterator[None]:
    """No loading bars and no messages of transformers inside; the number of threads is put back at the end."""
    threads, verbosity = torch.get_num_threads(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        logging.set_verbosity(verbosity)
        logging.enable_progress_bar()
