"""Prompts that measure: for the payoff table before a run, and for the verdict after it."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from transformers import GenerationConfig

from ...generation.completer import Completer
from ...generation.decoding import Decoding
from ...generation.prompt_rows import drawn_rows, rows_of_all
from ...rewards.sources import Rewards
from ..run.verdict import HeldOut
from .config import HoEGRPOConfig


def held_out(
    policy: Any, processing_class: Any, source: Any, rewards: Rewards, generation: GenerationConfig, args: HoEGRPOConfig
) -> HeldOut:
    """Prompts drawn by the seed, with the decoding of the run.

    Args:
        policy: the PeftModel.
        processing_class: its tokenizer.
        source: a dataset, or several by name, which are drawn from together; streams give their first rows, as many each.
        rewards: what scores the texts.
        generation: how TRL samples completions in the run.
        args: of the run.
    """
    settings: Any = args
    each = list(source.values()) if isinstance(source, Mapping) else [source]
    if all(hasattr(one, "__len__") for one in each):
        source = rows_of_all(source)
        rows = [source[row] for row in drawn_rows(len(source), args.payoff_prompts, settings.seed)]
    else:
        rows = [row for one in each for row in itertools.islice(one, -(-args.payoff_prompts // len(each)))]
    decoding = replace(
        Decoding.of(generation),
        chat_template_kwargs=settings.chat_template_kwargs,
        stop_strings=args.stop_strings or (),  # type: ignore[arg-type]
    )
    completer = Completer(policy, processing_class, decoding)
    return HeldOut(
        completer.batch(policy, rows), rewards, processing_class, completer.decoding,
        settings.per_device_train_batch_size * settings.steps_per_generation, settings.seed, bool(settings.bf16),
    )  # fmt: skip
