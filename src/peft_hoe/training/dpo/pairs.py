"""Pairs of answers, each preferred under one objective: how they are read, mixed by λ and made a batch."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from datasets import Dataset, concatenate_datasets

from ...errors import HoEError, HoEWarning
from ...preference import FloatArray

logger = logging.getLogger(__name__)

OBJECTIVE, MARGIN = "objective", "margin"
_KEPT = ("prompt", "chosen", "rejected", "tools", "chat_template_kwargs", MARGIN)


def read_pairs(pairs: Any, objectives: Sequence[str], preference: FloatArray, *, margin: bool = False) -> Dataset:
    """One dataset with an integer column `objective`; objectives with λ = 0 are left out.

    Args:
        pairs: `{objective: Dataset or list of rows}`, or one of them with a column `objective` of names. Rows have `chosen`
            and `rejected`, and `prompt` unless these begin with it.
        objectives: N names.
        preference: λ `(N,)`.
        margin: whether rows need a `margin`.

    Raises:
        HoEError: objectives are unknown or missing, or columns are.
    """
    found = _by_name(pairs) if not isinstance(pairs, Mapping) else {name: _table(rows) for name, rows in pairs.items()}
    unknown = [name for name in found if name not in objectives]
    if unknown:
        raise HoEError(
            f"there are pairs for {unknown}, which are no objectives; the objectives are {list(objectives)}",
            argument="train_dataset",
            value=unknown,
            allowed=list(objectives),
        )
    wanted = [name for name, weight in zip(objectives, preference, strict=True) if weight > 0]
    missing = [name for name in wanted if name not in found or len(found[name]) == 0]
    if missing:
        raise HoEError(
            f"there are no pairs for {missing}; the router's preference {np.asarray(preference).tolist()} gives them weight",
            argument="train_dataset",
            value=list(found),
        )
    unused = [name for name in found if name not in wanted]
    if unused:
        logger.warning("pairs of %s are not used: the router's preference gives them no weight", unused)
    tables = []
    for name in wanted:
        table = _checked(found[name], name, margin)
        tables.append(table.add_column(OBJECTIVE, [objectives.index(name)] * len(table)))
    try:
        return concatenate_datasets(tables)
    except ValueError as error:
        raise HoEError(
            f"the pairs of {wanted} have columns of different types: {error}", argument="train_dataset", value=wanted
        ) from error


def _table(rows: Any) -> Dataset:
    if isinstance(rows, Dataset):
        return rows
    if isinstance(rows, Sequence) and not isinstance(rows, str) and all(isinstance(row, Mapping) for row in rows):
        return Dataset.from_list([dict(row) for row in rows])
    raise HoEError(
        f"pairs are a {type(rows).__name__}; give a datasets.Dataset or a list of rows with prompt, chosen and rejected. A "
        "stream cannot be mixed by λ: load it first",
        argument="train_dataset",
        value=type(rows).__name__,
    )


def _by_name(pairs: Any) -> dict[str, Dataset]:
    table = _table(pairs)
    if OBJECTIVE not in table.column_names:
        raise HoEError(
            f"the dataset has the columns {table.column_names}, but no `{OBJECTIVE}` with the name of an objective; add it, or "
            "give {objective: dataset}",
            argument="train_dataset",
            value=table.column_names,
        )
    names = np.asarray(table[OBJECTIVE][:])
    return {str(name): table.select(np.flatnonzero(names == name)) for name in dict.fromkeys(names.tolist())}


def _checked(table: Dataset, name: str, margin: bool) -> Dataset:
    columns = set(table.column_names)
    images = columns & {"image", "images"}
    if images:
        raise HoEError(
            f"the pairs of {name!r} have {sorted(images)}; routers are trained on pairs of text only",
            argument="train_dataset",
            value=sorted(images),
        )
    needed = {"chosen", "rejected"} | ({MARGIN} if margin else set())
    if needed - columns:
        raise HoEError(
            f"the pairs of {name!r} have no {sorted(needed - columns)}; their columns are {sorted(columns)}",
            argument="train_dataset",
            value=sorted(columns),
            allowed=sorted(needed),
        )
    _check_difference(table, name)
    if margin:
        values = np.asarray(table[MARGIN][:], dtype=np.float64)
        if not np.isfinite(values).all():
            raise HoEError(
                f"{int((~np.isfinite(values)).sum())} margins of {name!r} are not finite; leave these pairs out",
                argument=MARGIN,
                value=values[~np.isfinite(values)].tolist(),
            )
    return table.select_columns([column for column in _KEPT if column in columns and (margin or column != MARGIN)])


def _check_difference(table: Dataset, name: str) -> None:
    """Pairs of the same answer twice teach nothing: all of them are an error, some are told.

    Raises:
        HoEError: no pair has two answers.
    """
    answers = zip(table["chosen"], table["rejected"], strict=True)
    same = [row for row, (chosen, rejected) in enumerate(answers) if chosen == rejected]
    if not same:
        return
    told = f"{len(same)} of the {len(table)} pairs of {name!r} have the same answer as chosen and rejected, first row {same[0]}"
    if len(same) == len(table):
        raise HoEError(
            f"{told}: nothing can be learnt from them. Check how the pairs were made",
            argument="train_dataset",
            value=same[0],
        )
    warnings.warn(f"{told}; nothing is learnt from these. Leave them out", HoEWarning, stacklevel=2)


def mixed(table: Dataset, preference: FloatArray, seed: int) -> Dataset:
    """Rows repeated so that objective k has the share λ_k of them and every row is there.

    The mean of a loss over the rows is then Σ_k λ_k L_k, up to the rounding of their numbers.

    Raises:
        HoEError: an objective has no rows left.
    """
    objectives = np.asarray(table[OBJECTIVE][:])
    rows = {k: np.flatnonzero(objectives == k) for k in np.flatnonzero(preference).tolist()}
    empty = [k for k in rows if len(rows[k]) == 0]
    if empty:
        raise HoEError(
            f"no pairs of the objectives {empty} are left: their prompts fill max_length; raise it",
            argument="max_length",
            value=empty,
        )
    weights = {k: float(preference[k]) / float(preference.sum()) for k in rows}
    total = max(len(rows[k]) / weights[k] for k in rows)
    generator = np.random.default_rng(seed)
    chosen = []
    for k, mine in rows.items():
        passes, rest = divmod(max(len(mine), round(total * weights[k])), len(mine))
        chosen += [mine] * passes + [generator.permutation(mine)[:rest]]
    return table.select(np.sort(np.concatenate(chosen)))


class PairCollator:
    """Another collator, with `objective` `(B,)` and, where rows have one, `margin` `(B,)` beside what it returns."""

    def __init__(self, collator: Any) -> None:
        self.collator = collator

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """The batch; the collator does not see what is added."""
        batch = dict(
            self.collator([{name: row[name] for name in row if name not in (OBJECTIVE, MARGIN)} for row in rows])
        )
        batch[OBJECTIVE] = torch.tensor([row[OBJECTIVE] for row in rows])
        if MARGIN in rows[0]:
            batch[MARGIN] = torch.tensor([float(row[MARGIN]) for row in rows])
        return batch
