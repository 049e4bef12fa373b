"""Sweeps on disk: a directory of `sweep.json`, `rewards.npy` and `generations.jsonl`; and completions of other origin.

Shapes: S runs of training, K preferences, P prompts, T texts for each prompt, N objectives.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from ...errors import HoEError, HoEWarning
from ...generation.prompt_rows import Columns, split_rows
from ...objectives.normalizer import RewardNormalizer
from .batches import Texts
from .generations import FORMAT, Row, number_texts, preference_key, read_generations
from .result import REFERENCE_POINT, SweepResult, installed_versions
from .scoring import check_decoding, objective_names, own_corners, score, text_rewards

S = TypeVar("S", bound=SweepResult)


def save(sweep: SweepResult, directory: Path) -> None:
    """Write a sweep; each file is replaced at once, so that an interrupted save leaves the old one."""
    directory.mkdir(parents=True, exist_ok=True)
    state = {
        "format": "peft-hoe sweep",
        "name": sweep.name,
        "objectives": list(sweep.objectives),
        "preferences": sweep.preferences.tolist(),
        "prompts": sweep.prompts,
        "texts": sweep.rewards.shape[3],
        "payoff": None if sweep.normalizer is None else sweep.normalizer.state_dict(),
        "payoff_source": sweep.payoff_source,
        "reference_point": np.asarray(sweep.reference_point).tolist(),
        "runs": sweep.runs,
    }
    _replace(directory / "rewards.npy", lambda path: np.save(path, sweep.rewards))
    log = directory / "generations.jsonl"
    if not log.exists() or _keyed(read_generations(log)[1]) != _keyed(_rows(sweep)):  # a sweep's own log stays as it is
        header = {"format": FORMAT, "name": sweep.name, "objectives": list(sweep.objectives), "prompts": sweep.prompts}
        lines = "".join(json.dumps(row) + "\n" for row in [header, *_rows(sweep)])
        _replace(log, lambda path: path.write_text(lines, encoding="utf-8"))
    text = json.dumps(state, indent=1) + "\n"
    _replace(directory / "sweep.json", lambda path: path.write_text(text, encoding="utf-8"))


def load(directory: Path, kind: type[S]) -> S:
    """Read what `save` wrote, as a sweep of that class.

    Raises:
        HoEError: it is not there, or damaged.
    """
    try:
        state = json.loads((directory / "sweep.json").read_text(encoding="utf-8"))
        rewards = np.load(directory / "rewards.npy", allow_pickle=False)
        payoff = state["payoff"]
        points = np.asarray(state["preferences"], dtype=np.float64)
        rows = number_texts(read_generations(directory / "generations.jsonl")[1], state["objectives"])
        shape = (len(points), len(state["prompts"]), state["texts"])
        return kind(
            name=state["name"],
            objectives=tuple(state["objectives"]),
            preferences=points,
            prompts=state["prompts"],
            rewards=rewards,
            completions=_arranged(rows, points.tolist(), range(len(state["prompts"])), shape[2], len(rewards)),
            normalizer=None if payoff is None else RewardNormalizer.from_state_dict(payoff),
            payoff_source=state["payoff_source"],
            reference_point=state["reference_point"],
            runs=state["runs"],
        )
    except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
        raise HoEError(
            f"cannot read a sweep from {str(directory)!r}: {type(error).__name__}: {error}",
            argument="directory", value=str(directory),
        ) from error  # fmt: skip


def from_generations(
    source: Any,
    rewards: Any,
    kind: type[S],
    *,
    prompts: Any = None,
    objectives: Sequence[str] | None = None,
    name: str | None = None,
    payoff: RewardNormalizer | None = None,
    reference_point: Any = REFERENCE_POINT,
) -> S:
    """Score completions that any other method or engine wrote.

    Args:
        source: a file of JSON lines, see `evaluation.generations`, or rows: mappings, or triples (preference, prompt id,
            completion).
        rewards: as for `sweep`.
        kind: the class of what is returned.
        prompts: what the prompt ids stand for: what `sweep` takes (ids 0 to P - 1), or `{id: prompt}`; a prompt may be a row
            with columns for the rewards. Default: the header's, or the rows' own `prompt`.
        objectives: the N names, in the preferences' order; default the header's, or those of the rewards.
        name: of the method; default the header's, or the file's name.
        payoff: the scale; default the own corners, as for `sweep`.
        reference_point: of hypervolumes, in normalised rewards.

    Raises:
        HoEError: rows that are none, prompts that are missing, or no rows at all.
        PreferenceError: a preference is no point of the simplex.
        RewardError: a reward is missing or fails.

    Warns:
        HoEWarning: some prompts have no completion at some preference, or the scale is of another decoding than the header's.
    """
    header, raw = read_generations(source)
    if not raw:
        raise HoEError(
            "the generations hold no rows; give at least one completion",
            argument="source", value=raw, allowed="at least one row",
        )  # fmt: skip
    names = objective_names(objectives, header.get("objectives"), rewards)
    scorer = text_rewards(rewards, names)
    rows = number_texts(raw, names)
    ids, known, columns = _prompts(prompts if prompts is not None else header.get("prompts"), rows)
    points = list(dict.fromkeys(preference_key(row["preference"]) for row in rows))
    exact = {preference_key(row["preference"]): row["preference"] for row in rows}
    preferences = [exact[point] for point in points]
    texts = 1 + max(row["text"] for row in rows)
    runs = 1 + max(row["run"] for row in rows)
    completions = _arranged(rows, preferences, ids, texts, runs)
    empty = sum(
        all(text is None for text in by_text) for run in completions for by_prompt in run for by_text in by_prompt
    )
    if empty:
        warnings.warn(
            f"{empty} of {runs * len(points) * len(known)} pairs of preference and prompt have no completion; they count as "
            "without reward, and means are over other prompts than elsewhere",
            HoEWarning,
            stacklevel=3,
        )
    table = np.stack([score(scorer, known, run, columns) for run in completions])
    points_array, decoding = np.asarray(preferences, dtype=np.float64), header.get("decoding") or {}
    if payoff is None:
        normalizer = own_corners(table, points_array, names, decoding, {"prompts": len(known), "texts": texts})
    else:
        normalizer = payoff
        check_decoding(payoff, decoding)
    label = (
        name or header.get("name") or (Path(source).stem if isinstance(source, (str, os.PathLike)) else "generations")
    )
    origin = {key: header.get(key) for key in ("fingerprint", "decoding", "settings", "drawing")}
    origin["versions"] = dict(installed_versions())
    return kind(
        name=str(label), objectives=names, preferences=points_array, prompts=known, rewards=table,
        completions=completions, normalizer=normalizer, payoff_source="own corners" if payoff is None else "given",
        reference_point=reference_point, runs=[{**origin, "seed": None} for _ in range(runs)],
    )  # fmt: skip


def _prompts(given: Any, rows: Sequence[Row]) -> tuple[list[Any], list[Any], Columns]:
    """P ids, their prompts, and the columns beside them."""
    if given is None:
        given = {row["prompt_id"]: row["prompt"] for row in rows if "prompt" in row}
    known = given if isinstance(given, Mapping) else dict(enumerate(given))
    unknown = list(dict.fromkeys(row["prompt_id"] for row in rows if row["prompt_id"] not in known))
    if unknown:
        raise HoEError(
            f"the generations answer prompts {unknown[:5]} that are not known; give prompts= as a list (ids 0, 1, ...) or "
            "{id: prompt}, or write `prompt` into the rows",
            argument="prompt_id", value=unknown, allowed=[*known],
        )  # fmt: skip
    return [*known], *split_rows(known.values())


def _arranged(
    rows: Sequence[Row], preferences: Sequence[Sequence[float]], prompt_ids: Any, texts: int, runs: int
) -> list[Texts]:
    """Completions of each run as `(K, P, T)`."""
    place_of_point = {preference_key(point): k for k, point in enumerate(preferences)}
    place_of_prompt = {prompt: p for p, prompt in enumerate(prompt_ids)}
    arranged: list[Texts] = [[[[None] * texts for _ in place_of_prompt] for _ in place_of_point] for _ in range(runs)]
    for row in rows:
        k, p = place_of_point[preference_key(row["preference"])], place_of_prompt[row["prompt_id"]]
        arranged[row["run"]][k][p][row["text"]] = row["completion"]
    return arranged


def _rows(sweep: SweepResult) -> list[Row]:
    return [
        {"preference": point, "prompt_id": p, "text": t, "run": run, "completion": text}
        for run, completions in enumerate(sweep.completions)
        for point, by_prompt in zip(sweep.preferences.tolist(), completions, strict=True)
        for p, texts in enumerate(by_prompt)
        for t, text in enumerate(texts)
        if text is not None
    ]


def _keyed(rows: Sequence[Row]) -> dict[Any, str]:
    return {
        (preference_key(list(row["preference"])), row["prompt_id"], row.get("text"), row.get("run")): row["completion"]
        for row in rows
    }


def _replace(path: Path, write: Callable[[Path], Any]) -> None:
    part = path.with_name(f".part-{path.name}")
    write(part)
    os.replace(part, path)
