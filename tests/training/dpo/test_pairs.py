from __future__ import annotations

import logging
from typing import Any

import numpy as np
import pytest

pytest.importorskip("datasets")

from datasets import Dataset, disable_progress_bars

from peft_hoe import HoEError, HoEWarning
from peft_hoe.training.dpo.pairs import PairCollator, mixed, read_pairs

disable_progress_bars()

OBJECTIVES = ["safe", "kind", "short"]


def rows(count: int, **columns: Any) -> list[dict[str, Any]]:
    return [{"prompt": f"p{i}", "chosen": f"c{i}", "rejected": f"r{i}", **columns} for i in range(count)]


def test_a_dictionary_and_a_column_of_names_are_the_same() -> None:
    by_name = read_pairs(
        {"kind": rows(2), "safe": Dataset.from_list(rows(3, extra=1))}, OBJECTIVES, np.array([0.5, 0.5, 0])
    )
    table = [row | {"objective": name} for name, row in zip(["safe", "kind"] * 2 + ["safe"], rows(5), strict=True)]
    by_column = read_pairs(Dataset.from_list(table), OBJECTIVES, np.array([0.5, 0.5, 0]))
    assert by_name["objective"][:] == by_column["objective"][:] == [0, 0, 0, 1, 1]
    assert by_column["prompt"][:] == ["p0", "p2", "p4", "p1", "p3"]
    assert by_name.column_names == ["prompt", "chosen", "rejected", "objective"]


def test_objectives_without_weight_are_left_out_and_said(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        table = read_pairs({"safe": rows(2), "short": rows(2)}, OBJECTIVES, np.array([1.0, 0, 0]))
    assert table["objective"][:] == [0, 0]
    assert "['short'] are not used" in caplog.text


def test_every_row_is_there_and_objectives_have_their_share() -> None:
    """λ = [0.25, 0.75] of 4 and 3 rows: 4 of the one, so 12 of the other, each row 4 times."""
    preference = np.array([0.25, 0.75, 0])
    table = read_pairs({"safe": rows(4), "kind": rows(3)}, OBJECTIVES, preference)
    found = mixed(table, preference, seed=0)
    assert np.bincount(found["objective"][:]).tolist() == [4, 12]
    kind = [row["prompt"] for row in found if row["objective"] == 1]
    assert {name: kind.count(name) for name in kind} == {"p0": 4, "p1": 4, "p2": 4}
    # 10 of one, so 10 / 0.75 · 0.25 = 3.33 of the other, which has 2: each once, one of them twice.
    table = read_pairs({"safe": rows(2), "kind": rows(10)}, OBJECTIVES, preference)
    assert np.bincount(mixed(table, preference, seed=0)["objective"][:]).tolist() == [3, 10]


def test_equal_shares_repeat_nothing() -> None:
    preference = np.full(3, 1 / 3)
    table = read_pairs({name: rows(7) for name in OBJECTIVES}, OBJECTIVES, preference)
    assert mixed(table, preference, seed=0)["prompt"][:] == table["prompt"][:]


def test_a_collator_does_not_see_objectives() -> None:
    seen: list[Any] = []

    def inner(batch: list[dict[str, Any]]) -> dict[str, Any]:
        seen.extend(batch)
        return {"input_ids": 1}

    batch = PairCollator(inner)([{"a": 1, "objective": 2, "margin": 0.5}, {"a": 2, "objective": 0, "margin": 1}])
    assert seen == [{"a": 1}, {"a": 2}]
    assert batch["objective"].tolist() == [2, 0]
    assert batch["margin"].tolist() == [0.5, 1.0]


@pytest.mark.parametrize(
    ("pairs", "margin", "said"),
    [
        ({"safe": rows(2)}, False, r"no pairs for \['kind'\]"),
        ({"safe": rows(2), "kind": []}, False, r"no pairs for \['kind'\]"),
        ({"safe": rows(2), "kind": rows(2), "rude": rows(1)}, False, r"\['rude'\], which are no objectives"),
        (rows(2), False, "no `objective`"),
        (rows(2, objective="rude"), False, "rude"),
        ({"safe": [{"prompt": "p", "chosen": "c"}], "kind": rows(2)}, False, r"no \['rejected'\]"),
        ({"safe": rows(2), "kind": rows(2)}, True, r"no \['margin'\]"),
        ({"safe": rows(2, margin=float("nan")), "kind": rows(2, margin=0.0)}, True, "2 margins of 'safe'"),
        ({"safe": rows(2, image="x"), "kind": rows(2)}, False, "text only"),
        ({"safe": rows(2), "kind": [{"prompt": [{"role": "user", "content": "p"}], "chosen": "c", "rejected": "r"}]}, False,
         "different types"),
        ({"safe": iter(rows(2)), "kind": rows(2)}, False, "stream"),
    ],
)  # fmt: skip
def test_bad_pairs(pairs: Any, margin: bool, said: str) -> None:
    with pytest.raises(HoEError, match=said):
        read_pairs(pairs, OBJECTIVES, np.array([0.5, 0.5, 0]), margin=margin)


def test_pairs_of_the_same_answer_twice_are_told() -> None:
    same = [row | {"rejected": row["chosen"]} for row in rows(3)]
    with pytest.warns(
        HoEWarning, match=r"2 of the 5 pairs of 'safe' have the same answer .*first row 3; .*Leave them out"
    ):
        read_pairs({"safe": rows(3) + same[:2]}, OBJECTIVES, np.array([1.0, 0, 0]))
    with pytest.raises(HoEError, match=r"3 of the 3 pairs of 'safe'.*: nothing can be learnt"):
        read_pairs({"safe": same}, OBJECTIVES, np.array([1.0, 0, 0]))
