"""The arithmetic of the fronts benchmark."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from peft_hoe import RewardNormalizer

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def costs(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("fronts_costs")


@pytest.fixture
def tables(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("fronts_tables")


def test_parameters_of_llama_2_7b(costs):
    """6,738,415,616 is what the published checkpoint has; an expert has r (d_in + d_out) for each of 224 layers."""
    assert costs.LLAMA_2_7B.parameters == 6_738_415_616
    assert costs.LLAMA_2_7B.expert(128) == 32 * 128 * (4 * 8192 + 3 * (4096 + 11008))
    found = costs.stored(costs.LLAMA_2_7B, 3, 128, 13, routers=1, votes=3)
    assert found["hoe"] - found["rs"] == costs.LLAMA_2_7B.expert(128)
    router = 3 * 32 * (6 * 4097 + 11009)
    assert found["hoe_merged_trained"] - found["hoe"] == router
    assert found["hoe_trained"] - found["rs"] == 2 * router
    assert found["rs_dense"] == 3 * 6_738_415_616
    assert found["ties"] == found["prompting"] + 13 * costs.LLAMA_2_7B.expert(128)


def test_ranks_are_clamped_and_tied_embeddings_count_once(costs):
    shapes = costs.llama_shapes(8, 12, 1, 10, 4, tied=True)
    assert shapes.parameters == 2 * 8 * 8 + 2 * 4 * 8 + 3 * 8 * 12 + 3 * 8 + 10 * 8
    assert shapes.expert(6) == 6 * 16 * 2 + 4 * 12 * 2 + 6 * 20 * 3  # keys and values have 4 rows


def test_fronts_by_hand(tables, make_sweep):
    """Squares from −0.1: three points and their hypervolumes; MORLHF is met at its own preferences only."""
    grid = [[1, 0], [0.75, 0.25], [0.25, 0.75], [0, 1]]
    hoe = make_sweep([[1, 0], [0.9, 0.9], [0.9, 0.9], [0, 1]], name="hoe", preferences=grid)
    rs = make_sweep([[1, 0], [0.4, 0.4], [0.4, 0.4], [0, 1]], name="rs", preferences=grid)
    morlhf = make_sweep([[0.9, 0.4]] * 2, name="morlhf", preferences=grid[1:3])
    sweeps: dict[str, Any] = {"hoe": hoe, "rs": rs, "morlhf": morlhf}
    found = tables.Front(sweeps, dict.fromkeys(sweeps, 1000), {"one LoRA": 2.0, "hoe": 3.0}).to_dict()
    volumes = {name: row["hypervolume"][0] for name, row in found["methods"].items()}
    np.testing.assert_allclose(volumes["hoe"], 1.0 * 1.0 + 2 * 0.1 * 0.1)
    np.testing.assert_allclose(volumes["rs"], 0.5 * 0.5 + 2 * 0.6 * 0.1)
    np.testing.assert_allclose(volumes["morlhf"], 1.0 * 0.5)
    soup, trained = found["pairs"]["hoe / rs"], found["pairs"]["hoe / morlhf"]
    np.testing.assert_allclose(soup["ratio"], [1.02 / 0.37] * 3)
    assert soup["coverage"][0] == 1.0  # of the interior points; the corners are shared
    assert soup["coverage_back"][0] == 0.0
    assert soup["share_coverage_at_least_0.9"] == soup["share_coverage_back_at_most_0.1"] == 1.0
    np.testing.assert_allclose(trained["ratio"][0], 1.0 / 0.5)  # [.9, .9] alone
    assert found["methods"]["hoe"]["relative_time"] == 1.5
    assert found["methods"]["rs"]["relative_time"] is None
    assert found["methods"]["morlhf"]["spearman"] == [None, None]  # both points are the same
    np.testing.assert_allclose(found["methods"]["hoe"]["igd_plus"], [0, 0, 0], atol=1e-12)
    assert found["payoff_prompts"] == 0  # the table is of given numbers


def table_of(spreads: list[float]) -> RewardNormalizer:
    """Of two objectives, whose own expert earns the spread on each prompt, and the other's nothing."""
    cells = np.asarray([[spreads, [0.0] * len(spreads)], [[0.0] * len(spreads), spreads]])  # (expert, objective, P)
    return RewardNormalizer.measured(np.moveaxis(cells, 2, 1)[:, :, None], ["a", "b"])


def test_the_prompts_of_the_payoff_table_are_drawn(tables, make_sweep):
    """1 on spreads of 2 and 4 is 1/3; a draw of the first prompt twice makes it 1/2, of the second 1/4."""
    sweeps = {
        name: make_sweep([[1, 1], [1, 1]], name=name, preferences=[[0.6, 0.4], [0.4, 0.6]]) for name in ("hoe", "rs")
    }
    for sweep in sweeps.values():
        sweep.normalizer = table_of([2.0, 4.0])
    front = tables.Front(sweeps, dict.fromkeys(sweeps, 1000), {})
    found = front.to_dict()
    np.testing.assert_allclose(found["methods"]["hoe"]["hypervolume"], [(1 / 3 + 0.1) ** 2, 0.35**2, 0.6**2])
    np.testing.assert_allclose(found["pairs"]["hoe / rs"]["difference"], [0, 0, 0], atol=1e-12)
    assert found["payoff_prompts"] == 2
    assert front.tables().endswith("The payoff table: its 2 prompts are drawn in every replicate.")


def test_replicates_without_a_scale_are_counted(tables, make_sweep):
    """The experts differ on one prompt of two: a quarter of the draws leaves it out."""
    sweeps = {
        name: make_sweep([[1, 1], [1, 1]], name=name, preferences=[[0.6, 0.4], [0.4, 0.6]]) for name in ("hoe", "rs")
    }
    for sweep in sweeps.values():
        sweep.normalizer = table_of([2.0, 0.0])
    found = tables.Front(sweeps, dict.fromkeys(sweeps, 1000), {}).to_dict()
    for name in ("hypervolume", "igd_plus", "control_regret"):
        assert found["methods"]["hoe"][name][3] / 1000 == pytest.approx(0.25, abs=0.06)
    assert found["pairs"]["hoe / rs"]["coverage"][3] == found["methods"]["hoe"]["hypervolume"][3]


def test_texts_of_a_prompt_are_drawn_together(monkeypatch):
    """Two prompts, answered three times over: the second prompt is columns 1, 3 and 5."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    by_prompt = importlib.import_module("problem").by_prompt
    found = by_prompt(table_of([1.0, 4.0, 2.0, 4.0, 3.0, 10.0]), 2)
    np.testing.assert_allclose(found.samples[0, :, 0], [2, 6])
    np.testing.assert_array_equal(found.payoff, [[4, 0], [0, 4]])
    np.testing.assert_allclose(found.measurement["spread_errors"], [2, 2])  # of 2 and 6
    assert found.measurement["texts"] == 3
