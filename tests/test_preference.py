from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch

from peft_hoe import PreferenceError, das_dennis, parse_preference, preference_grid
from peft_hoe.preference import read_preference, written

NAMES = ["helpful", "harmless"]


@pytest.mark.parametrize(
    "value", [[0.7, 0.3], (0.7, 0.3), np.array([0.7, 0.3]), torch.tensor([0.7, 0.3], dtype=torch.float64)]
)
def test_every_kind_of_vector_is_read(value):
    np.testing.assert_allclose(parse_preference(value, NAMES), [0.7, 0.3], atol=1e-12)


def test_a_mapping_is_ordered_by_objective_and_may_leave_zeros_out():
    np.testing.assert_allclose(parse_preference({"harmless": 0.3, "helpful": 0.7}, NAMES), [0.7, 0.3])
    np.testing.assert_allclose(parse_preference({"harmless": 1}, NAMES), [0, 1])


def test_a_sum_within_two_and_a_half_percent_is_divided_out():
    np.testing.assert_allclose(parse_preference([0.33, 0.33, 0.33], ["a", "b", "c"]), [1 / 3] * 3)
    np.testing.assert_allclose(parse_preference([0.35, 0.28, 0.35], ["a", "b", "c"]).sum(), 1.0)
    assert parse_preference([0.5, 0.525], NAMES).sum() == pytest.approx(1)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([-0.1, 1.1], "negative"),
        ([float("nan"), 1.0], "NaN"),
        ([float("inf"), 0.0], "infinity"),
        ([1.0], "1 numbers, but there are 2 objectives"),
        ([0.2, 0.3, 0.5], "3 numbers"),
        ([0.5, 0.4], r"\[0.5, 0.4\] sums to 0.9"),
        ([0.6, 0.6], "sums to 1.2"),
        ({"helpful": 0.5, "funny": 0.5}, "'funny'"),
        (0.5, "float"),
        ("0.5,0.5", "str"),
        (["x", "y"], "not a number"),
        ([[1, 0], [0, 1]], "several rows"),
        (torch.ones(2, device="meta"), "cannot be read .*meta"),
        (torch.eye(2)[0].to_sparse(), "cannot be read"),
        (torch.nested.nested_tensor([torch.ones(1), torch.ones(1)], layout=torch.jagged), "cannot be read"),
        (torch.tensor([1 + 1j, 0]), "not a number"),
        (np.array(0.5), "ndarray"),
        ([0.5, [0.5]], "several rows"),
        ([], "0 numbers"),
    ],
)
def test_bad_preferences_are_refused_by_name(value, message):
    with pytest.raises(PreferenceError, match=message):
        parse_preference(value, NAMES)


@pytest.mark.parametrize("deep", [[[[1, 0]]], np.ones((2, 2, 2)) / 2, torch.eye(2)[None]])
def test_more_than_rows_is_refused(deep):
    with pytest.raises(PreferenceError, match="nested too deeply"):
        parse_preference(deep, NAMES, rows=True)


@pytest.mark.parametrize(
    ("total", "good"),
    [
        (1.025, True),
        (1.02501, False),
        (0.97499, False),
        (1.0251, False),
        (1.026, False),
        (0.975, True),
        (0.9749, False),
        (0.974, False),
    ],
)
def test_the_tolerance_of_a_sum_ends_at_two_and_a_half_percent(total, good):
    value = [total - 0.5, 0.5]
    if good:
        np.testing.assert_allclose(parse_preference(value, NAMES), [1 - 0.5 / total, 0.5 / total], rtol=1e-14)
    else:
        with pytest.raises(PreferenceError, match="sums to"):
            parse_preference(value, NAMES)


def test_an_error_carries_what_was_given_and_what_may_be():
    with pytest.raises(PreferenceError) as refused:
        parse_preference({"funny": 1}, NAMES)
    assert (refused.value.argument, refused.value.value) == ("preference", {"funny": 1})
    assert refused.value.allowed == NAMES
    again = pickle.loads(pickle.dumps(refused.value))
    assert (str(again), again.value) == (str(refused.value), {"funny": 1})


def test_an_error_about_a_long_value_is_short():
    with pytest.raises(PreferenceError, match="2000 numbers") as refused:
        parse_preference([0.0005] * 2000, NAMES)
    assert len(str(refused.value)) < 1000


def test_a_parsed_preference_parses_to_itself():
    for point in np.random.default_rng(0).dirichlet(np.ones(3), 300):
        once = parse_preference(point, ["a", "b", "c"])
        assert parse_preference(once.tolist(), ["a", "b", "c"]).tolist() == once.tolist()


def test_rows():
    rows = parse_preference([[1, 0], {"helpful": 0.5, "harmless": 0.5}], NAMES, rows=True)
    np.testing.assert_allclose(rows, [[1, 0], [0.5, 0.5]])
    np.testing.assert_allclose(parse_preference(torch.eye(2), NAMES, rows=True), np.eye(2))


def test_command_line_forms():
    assert read_preference("0.7, 0.3") == [0.7, 0.3]
    assert read_preference("helpful=0.7,harmless=0.3") == {"helpful": 0.7, "harmless": 0.3}
    assert read_preference("helpful = 0.7, harmless = 0.3,") == {"helpful": 0.7, "harmless": 0.3}
    assert read_preference("[0.7, 0.3]") == [0.7, 0.3]
    with pytest.raises(PreferenceError, match="cannot read"):
        read_preference("a lot")


def test_names_with_commas_blanks_and_equal_signs_are_read_from_a_command_line():
    # The first comma ended the name, and the rest was refused.
    assert read_preference("kind, but brief=0.7,to the point=0.3") == {"kind, but brief": 0.7, "to the point": 0.3}
    assert read_preference("a=b=0.4,c=0.6") == {"a=b": 0.4, "c": 0.6}
    for text in ("kind=much,brief=0.3,rest", "kind=", "=,x"):
        with pytest.raises(PreferenceError, match="cannot read the preference"):
            read_preference(text)


def test_grids_lie_on_the_simplex():
    assert preference_grid(2).shape == (11, 2)
    assert preference_grid(2)[3].tolist() == pytest.approx([0.3, 0.7])
    assert preference_grid(3).shape == (13, 3)
    for n in (1, 2, 3, 4, 5, 8):
        grid = preference_grid(n)
        np.testing.assert_allclose(grid.sum(axis=1), 1)
        assert (grid >= 0).all()
        assert len(grid) <= 100


def test_das_dennis_counts():
    assert len(das_dennis(3, 4)) == 15  # C(6, 2)
    assert das_dennis(2, 1).tolist() == [[1, 0], [0, 1]]


def test_preferences_are_written_as_people_write_them():
    """Never 0.30000000000000004; the grid has no such numbers in the first place."""
    assert written([0.1 + 0.2, 0.7]) == "0.3, 0.7"
    assert written([1 / 3, 2 / 3, 0.0]) == "0.333, 0.667, 0"
    for n in (2, 3):
        assert all(float(f"{weight:.12g}") == weight for row in preference_grid(n) for weight in row if weight != 1 / 3)
