"""The job of the demonstration: complete prompts at many preferences, score the completions, compare with the policies.

Shapes: P prompts, K preferences, N objectives.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from ..errors import HoEError
from ..preference import FloatArray, das_dennis, preference_grid, uniform
from .embedded import BASE, POLICIES, REWARDS, Reward, load_prompts

ROWS = 64  # completions generated at once
_TINY = 10_000_000  # parameters below which one thread is faster than several


@dataclass(frozen=True)
class Task:
    """What is steered, and how it is measured.

    Attributes:
        base: directory or Hub id.
        policies: `{objective: directory or Hub id}`.
        rewards: `{objective: function of prompts and completions}`, for every objective or none.
        prompts: P texts that are continued as they are.
        max_new_tokens: length of a completion.
    """

    base: str
    policies: Mapping[str, str]
    rewards: Mapping[str, Reward]
    prompts: Sequence[str]
    max_new_tokens: int

    @property
    def objectives(self) -> list[str]:
        """The N names."""
        return list(self.policies)


@dataclass
class Front:
    """Mean rewards by preference.

    Attributes:
        objectives: the N names.
        preferences: (K, N).
        rewards: (K, N).
        references: `{"base" or a policy's objective: its N mean rewards}`.
    """

    objectives: list[str]
    preferences: list[list[float]]
    rewards: list[list[float]]
    references: dict[str, list[float]] = field(default_factory=dict)

    def save(self, path: Path, **more: Any) -> None:
        """Write JSON, with more keys where given."""
        path.write_text(json.dumps({**asdict(self), **more}, indent=2) + "\n", encoding="utf-8")


def embedded_task(max_new_tokens: int) -> Task:
    """The tiny models that the package carries."""
    return Task(BASE, POLICIES, REWARDS, load_prompts(), max_new_tokens)


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


def load_tokenizer(source: str) -> Any:
    """The tokenizer, padding on the left as generation needs.

    Raises:
        HoEError: the model brings none.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise HoEError(f"cannot load a tokenizer from {source}: {error}") from None
    tokenizer.padding_side = "left"
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def complete(
    model: Any, tokenizer: Any, prompts: Sequence[str], max_new_tokens: int, preferences: FloatArray | None = None
) -> list[str]:
    """Greedy completions of P prompts, row p at `preferences[p]` (P, N) where they are given."""
    texts: list[str] = []
    for start in range(0, len(prompts), ROWS):
        rows = slice(start, start + ROWS)
        batch = tokenizer(list(prompts[rows]), return_tensors="pt", padding=True).to(model.device)
        steering = {} if preferences is None else {"preference": preferences[rows].tolist()}
        with torch.inference_mode():
            ids = model.generate(
                input_ids=batch["input_ids"],
                attention_mask=batch["attention_mask"],
                max_new_tokens=max_new_tokens,
                do_sample=False,
                **steering,
            )
        texts += tokenizer.batch_decode(ids[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    return texts


def mean_rewards(task: Task, completions: Sequence[str]) -> list[float]:
    """Mean of every reward over the P completions, (N,).

    Raises:
        HoEError: a reward did not return one number for each prompt.
    """
    means = []
    for name in task.objectives:
        values = np.asarray(task.rewards[name](list(task.prompts), list(completions)), dtype=np.float64)
        if values.shape != (len(task.prompts),) or not np.isfinite(values).all():
            raise HoEError(
                f"reward {name!r} returned {values!r}; it must return {len(task.prompts)} finite numbers, one for each prompt"
            )
        means.append(float(values.mean()))
    return means


def measure_front(task: Task, model: Any, tokenizer: Any) -> Front:
    """Mean rewards at every preference of the grid; the rows of a batch have different preferences."""
    grid = preference_grid(len(task.objectives))
    prompts = [prompt for _ in grid for prompt in task.prompts]
    texts = complete(model, tokenizer, prompts, task.max_new_tokens, grid.repeat(len(task.prompts), axis=0))
    size = len(task.prompts)
    means = [mean_rewards(task, texts[start : start + size]) for start in range(0, len(texts), size)]
    return Front(task.objectives, grid.tolist(), means)


def measure_reference(task: Task, source: str, tokenizer: Any) -> list[float]:
    """Mean rewards of the base or of one policy, (N,)."""
    return mean_rewards(task, complete(load_model(source), tokenizer, task.prompts, task.max_new_tokens))


@contextmanager
def calm() -> Iterator[None]:
    """No loading bars and no messages of transformers inside; the number of threads is put back at the end."""
    threads, verbosity = torch.get_num_threads(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # of transformers about its own attributes
            yield
    finally:
        torch.set_num_threads(threads)
        logging.set_verbosity(verbosity)
        logging.enable_progress_bar()
