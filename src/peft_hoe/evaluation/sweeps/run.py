"""Running a sweep: every prompt at every preference, in few large batches of mixed preferences.

Shapes: K preferences, P prompts, T texts for each prompt, N objectives.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ...errors import HoEError, PreferenceError
from ...generation.prompt_rows import check_prompts, split_rows
from ...objectives.normalizer import RewardNormalizer
from ...preference import FloatArray, parse_preference, preference_grid, written
from ..methods.hoe import HoEMethod
from .batches import BatchedMethod
from .result import REFERENCE_POINT, installed_versions
from .scoring import check_decoding, objective_names, own_corners, score, text_rewards
from .sweep import Sweep


def sweep(
    model: Any = None,
    tokenizer: Any = None,
    prompts: Any = (),
    rewards: Any = None,
    preferences: Any = "grid",
    *,
    generate: Any = None,
    objectives: Sequence[str] | None = None,
    name: str | None = None,
    payoff: Any = None,
    decoding: Any = None,
    texts: int = 1,
    routers: str = "keep",
    seed: int = 0,
    batch_size: int = 128,
    reference_point: Any = REFERENCE_POINT,
    output_dir: Any = None,
    overwrite: bool = False,
    progress: bool = True,
) -> Sweep:
    """Complete every prompt at every preference and score the completions.

    Args:
        model: carries HoE layers; its first active HoE adapter is steered. None with `generate`.
        tokenizer: the policy's.
        prompts: P texts, continued as they are; lists of chat messages, which go through the chat template; or rows with
            `prompt` and columns for the rewards, such as a datasets.Dataset.
        rewards: a Rewards, or what makes one; sources that read texts, not token ids.
        preferences: `(K, N)`, rows as `parse_preference` takes them, or "grid" for `preference_grid`.
        generate: any other method in place of a HoE model, see `evaluation.methods`; with a decoding of its own.
        objectives: the N names, where neither model nor method knows them; default those of the rewards.
        name: of the method, in tables and plots.
        payoff: the scale for hypervolumes: a RewardNormalizer, the payoff table of the single-objective experts at this
            decoding; or held-out prompts to measure that table on, with the same method and decoding. None takes the sweep's
            own rows at the one-hot preferences, recorded as "own corners".
        decoding: what `Decoding.of` takes; default greedy, 64 new tokens. Not with `generate`, which has its own.
        texts: T, texts for each prompt and preference.
        routers: "keep", "static" or "drop", see `HoEMethod`.
        seed: of sampling, through torch's random numbers.
        batch_size: completions at once.
        reference_point: of hypervolumes, in normalised rewards.
        output_dir: completions are written there as batches finish, and read there when an interrupted sweep is run again;
            the result is saved there.
        overwrite: begin anew where `output_dir` holds another sweep.
        progress: show a bar.

    Raises:
        HoEError: no prompts, options that contradict each other, a method that returns something else than texts, or an
            `output_dir` that holds another sweep.
        PreferenceError: a preference is no point of the simplex, or given twice.
        RewardError: a reward is missing or fails.

    Warns:
        HoEWarning: plain strings for a tokenizer with a chat template, a normaliser of another decoding, own corners that give
            no scale, or experts that hardly differ in an objective.

    >>> from peft_hoe import Decoding, demo, sweep
    >>> model, tokenizer = demo.load_demo_adapter(), demo.load_tokenizer()
    >>> found = sweep(
    ...     model, tokenizer, demo.load_prompts()[:4], demo.REWARDS, [[1, 0], [0.5, 0.5], [0, 1]], decoding=Decoding(16),
    ...     progress=False,
    ... )
    >>> found.rewards.shape  # runs, preferences, prompts, texts, objectives
    (1, 3, 4, 1, 2)
    """
    prompts, columns = split_rows(prompts)
    normalizer = payoff if isinstance(payoff, RewardNormalizer) else None
    held_out, held_out_columns = split_rows(() if payoff is normalizer else payoff, "payoff prompts")
    method = _method(model, tokenizer, decoding, routers, generate)
    plain = [prompt for prompt in [*prompts, *held_out] if isinstance(prompt, str)]
    if generate is None and plain:
        check_prompts([{"prompt": plain[0]}], tokenizer)
    names = objective_names(objectives, getattr(method, "objectives", None), rewards)
    scorer = text_rewards(rewards, names)
    points = _preferences(preferences, names)
    check_decoding(normalizer, getattr(method, "decoding", {}))
    run = BatchedMethod(method, name or method_name(method), texts, seed, batch_size, progress, overwrite)
    directory = None if output_dir is None else Path(output_dir)
    source = "given"
    if payoff is not normalizer:  # first, so that a reward that fails does so early
        corners = run.complete(held_out, np.eye(len(names)), names, _inside(directory, "payoff.jsonl"))
        table = score(scorer, held_out, corners, held_out_columns)
        measurement = {"prompts": len(held_out), **run.drawing}
        normalizer = RewardNormalizer.measured(table, names, run.decoding, measurement)
        source = "payoff prompts"
    completions = run.complete(prompts, points, names, _inside(directory, "generations.jsonl"))
    table = score(scorer, prompts, completions, columns)[None]
    if normalizer is None:
        measurement = {"prompts": len(prompts), **run.drawing}
        normalizer, source = own_corners(table, points, names, run.decoding, measurement), "own corners"
    result = Sweep(
        name=run.name, objectives=names, preferences=points, prompts=prompts, rewards=table,
        completions=[completions], normalizer=normalizer, payoff_source=source, reference_point=reference_point,
        runs=[{
            "fingerprint": run.fingerprint, "decoding": run.decoding, "settings": run.settings, "drawing": run.drawing,
            "seed": seed, "versions": installed_versions(), "calibrates": method.calibrates() if generate is None else None,
            "sample": method.sample() if generate is None else None,
        }],
    )  # fmt: skip
    if directory is not None:
        result.save(directory)
    return result


def _method(model: Any, tokenizer: Any, decoding: Any, routers: str, generate: Any) -> Any:
    """What completes prompts: the HoE model, or another method, which has a model, tokenizer and decoding of its own."""
    if generate is None:
        return HoEMethod(model, tokenizer, decoding=decoding, routers=routers)
    for what, given in (("a model", model), ("a tokenizer", tokenizer), ("decoding=", decoding)):
        if given is not None:
            raise HoEError(
                f"both {what} and generate= are given; leave {what} out, the method has its own", argument="generate"
            )
    if routers != "keep":
        raise HoEError(
            f"routers is {routers!r}, but generate= is given; give routers= to the method",
            argument="routers",
            value=routers,
            allowed=["keep"],
        )
    return generate


def method_name(method: Any) -> str:
    """What a method calls itself."""
    return str(getattr(method, "name", None) or getattr(method, "__name__", type(method).__name__))


def _preferences(value: Any, objectives: Sequence[str]) -> FloatArray:
    if isinstance(value, str):
        if value != "grid":
            raise PreferenceError(
                f'preferences is {value!r}; use "grid" or give rows of {len(objectives)} numbers',
                argument="preferences",
                value=value,
                allowed=["grid"],
            )
        return preference_grid(len(objectives))
    points = np.atleast_2d(parse_preference(value, objectives, rows=True))
    if not points.size:
        raise PreferenceError("there are no preferences; give at least one", argument="preferences", value=value)
    _, first = np.unique(points.round(9), axis=0, return_index=True)
    twice = sorted(set(range(len(points))) - set(first.tolist()))
    if twice:
        raise PreferenceError(
            f"the preference [{written(points[twice[0]])}] is given twice; give each once",
            argument="preferences",
            value=points[twice[0]].tolist(),
        )
    return points


def _inside(directory: Path | None, name: str) -> Path | None:
    return None if directory is None else directory / name
