"""Completions of other origin, and sweeps on disk."""

from __future__ import annotations

import json

import numpy as np
import pytest

from peft_hoe import HoEWarning, PreferenceError
from peft_hoe.errors import HoEError, RewardError
from peft_hoe.evaluation import Sweep
from peft_hoe.objectives import RewardNormalizer

UNIT = RewardNormalizer(np.eye(2), ["long", "loud"])


def long(prompts, completions):
    return [float(len(text)) for text in completions]


def loud(prompts, completions):
    return [float(text.isupper()) if text else None for text in completions]


REWARDS = {"long": long, "loud": loud}
ROWS = [
    {"preference": [1, 0], "prompt_id": 0, "completion": "abc"},
    {"preference": {"loud": 1}, "prompt_id": 0, "completion": "A"},
    {"preference": [1, 0], "prompt_id": 1, "completion": "abcde"},
    {"preference": [0, 1], "prompt_id": 1, "completion": ""},
]


def written(path, rows):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def test_rows_of_a_file_are_scored(tmp_path):
    path = written(tmp_path / "soup.jsonl", ROWS)
    found = Sweep.from_generations(path, REWARDS, prompts=["p", "q"], payoff=UNIT)
    np.testing.assert_array_equal(found.preferences, [[1, 0], [0, 1]])
    np.testing.assert_array_equal(found.values, [[[[3, 0], [5, 0]], [[1, 1], [0, np.nan]]]])
    np.testing.assert_array_equal(found.points, [[4, 0], [0.5, 1]])
    assert found.name == "soup"
    assert found.completions == [[[["abc"], ["abcde"]], [["A"], [""]]]]


def test_triples_texts_and_named_prompts():
    rows = [([0.5, 0.5], "x", "ab"), ([0.5, 0.5], "y", "ABC"), ([0.5, 0.5], "x", "ABCD")]
    found = Sweep.from_generations(rows, REWARDS, prompts={"x": "p", "y": "q"}, payoff=UNIT)
    np.testing.assert_array_equal(found.rewards[0, 0, :, :, 0], [[2, 4], [3, np.nan]])  # a second text for x only
    np.testing.assert_array_equal(found.values[0, 0], [[3, 0.5], [3, 1]])
    assert found.prompts == ["p", "q"]


def test_rows_bring_their_prompts_and_line_separators_survive(tmp_path):
    rows = [{**row, "prompt": f"\u2028 prompt {row['prompt_id']}"} for row in ROWS]
    found = Sweep.from_generations(written(tmp_path / "a.jsonl", rows), REWARDS, payoff=UNIT)
    assert found.prompts == ["\u2028 prompt 0", "\u2028 prompt 1"]


def test_own_corners_give_the_scale():
    found = Sweep.from_generations(ROWS, REWARDS, prompts=["p", "q"])
    np.testing.assert_array_equal(found.normalizer.payoff, [[4, 0], [0.5, 1]])
    np.testing.assert_array_equal(found.normalized(found.points), [[1, 0], [0, 1]])


def test_gaps_are_told():
    with pytest.warns(HoEWarning, match="1 of 4 pairs of preference and prompt have no completion"):
        found = Sweep.from_generations(ROWS[:3], REWARDS, prompts=["p", "q"], payoff=UNIT)
    assert np.isnan(found.values[0, 1, 1]).all()
    assert found.completions[0][1][1] == [None]


def test_without_corners_there_is_no_scale():
    with pytest.warns(HoEWarning, match=r"the one-hot preferences of \['loud'\] are not in the sweep"):
        found = Sweep.from_generations([ROWS[0]], REWARDS, prompts=["p"])
    assert found.normalizer is None


@pytest.mark.parametrize(
    ("rows", "options", "error", "match"),
    [
        ([], {}, HoEError, "no rows"),
        ([{"preference": [1, 0], "prompt_id": 0}], {}, HoEError, r"row 0 of the generations lacks \['completion'\]"),
        (["text"], {}, HoEError, "lacks"),
        ([{**ROWS[0], "completion": 3}], {}, HoEError, "completion must be text"),
        ([{**ROWS[0], "preference": [1, 1]}], {}, PreferenceError, "sums to 2"),
        ([{**ROWS[0], "text": 0}, {**ROWS[0], "text": 0}], {}, HoEError, "text 0 of prompt 0 .* twice"),
        (ROWS, {"prompts": ["p"]}, HoEError, r"answer prompts \[1\] that are not known"),
        (ROWS, {"prompts": None}, HoEError, "not known"),
        (ROWS, {"objectives": ["a", "b"]}, RewardError, "missing"),
    ],
)
def test_bad_generations(rows, options, error, match):
    with pytest.raises(error, match=match):
        Sweep.from_generations(rows, REWARDS, **{"prompts": ["p", "q"], **options})


def test_bad_files(tmp_path):
    with pytest.raises(HoEError, match="cannot read the generations"):
        Sweep.from_generations(tmp_path / "none.jsonl", REWARDS)
    (tmp_path / "bad.jsonl").write_text('{"preference": [1, 0]\n')
    with pytest.raises(HoEError, match=r"bad.jsonl, line 1 is not JSON"):
        Sweep.from_generations(tmp_path / "bad.jsonl", REWARDS)
    with pytest.raises(HoEError, match="cannot read a sweep"):
        Sweep.load(tmp_path)


def test_what_is_saved_is_loaded(make_sweep, tmp_path):
    first = make_sweep([[1.0, 0.1], [1 / 3, 2.0]], noise=0.3)
    first.rewards[0, 0, 1, 0, 1] = np.nan
    first.completions[0][0][1][0] = None
    stacked = Sweep.stack([first, make_sweep([[0.9, 0.2], [0.3, 1.9]])])
    for sweep in (first, stacked):
        sweep.save(tmp_path / sweep.name / str(len(sweep.runs)))
        again = Sweep.load(tmp_path / sweep.name / str(len(sweep.runs)))
        np.testing.assert_array_equal(again.rewards, sweep.rewards)
        np.testing.assert_array_equal(again.preferences, sweep.preferences)
        for name in ("name", "objectives", "prompts", "completions", "payoff_source", "reference_point", "runs"):
            assert getattr(again, name) == getattr(sweep, name), name
        assert again.normalizer.state_dict() == sweep.normalizer.state_dict()


def test_saved_completions_are_generations_for_others(make_sweep, tmp_path):
    sweep = make_sweep([[1.0, 0.0], [0.0, 1.0]])
    sweep.save(tmp_path)
    scored = Sweep.from_generations(tmp_path / "generations.jsonl", {"a": long, "b": long}, payoff=sweep.normalizer)
    assert scored.completions == sweep.completions
    assert scored.prompts == sweep.prompts
    np.testing.assert_array_equal(scored.points, [[5, 5], [5, 5]])  # "A 0 0"


def test_a_new_result_replaces_an_old_one(make_sweep, tmp_path):
    make_sweep([[1.0, 0.0], [0.0, 1.0]]).save(tmp_path)
    make_sweep([[2.0, 0.0], [0.0, 2.0]], name="B").save(tmp_path)
    again = Sweep.load(tmp_path)
    assert again.name == "B"
    assert again.completions[0][0][0] == ["B 0 0"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["generations.jsonl", "rewards.npy", "sweep.json"]
