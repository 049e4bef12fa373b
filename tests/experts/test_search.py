"""Settings that are chosen by a score: every candidate is built and scored, the best one stays."""

from __future__ import annotations

import itertools
import json

import pytest

from peft_hoe import CheckpointError, ExpertError, HoEError, Merging, build_adapter
from peft_hoe.experts import builder, plan_build, search

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")
SETTINGS = {"r": 2, "progress": False}


def scored(values, seen=None):
    """A score that reads the options from the candidate's report."""

    def score(adapter):
        options = json.loads((adapter / "build_report.json").read_text())["options"]
        if seen is not None:
            seen.append(adapter)
        return values(options)

    return score


def test_the_best_factor_is_built_and_the_curve_reported(llama, policies, tmp_path):
    seen = []
    chosen = search(scored(lambda options: -abs(options["rescale"] - 1.4), seen), [1.0, 1.5, 2])
    report = build_adapter(llama, policies, tmp_path / "out", rescale=chosen, **SETTINGS)
    assert report.options["rescale"] == 1.5
    assert [row["point"] for row in report.search] == [{"rescale": 1.0}, {"rescale": 1.5}, {"rescale": 2.0}]
    assert [row["score"] for row in report.search] == pytest.approx([-0.4, -0.1, -0.6])
    assert json.loads((tmp_path / "out" / "build_report.json").read_text())["search"] == report.search
    assert "searched: rescale 1.5: -0.1 (best)" in report.table()
    assert report.table().count("(best)") == 1
    assert not any(adapter.exists() for adapter in seen)
    build_adapter(llama, policies, tmp_path / "fixed", rescale=1.5, **SETTINGS)
    weights = "adapter_model.safetensors"
    assert (tmp_path / "out" / weights).read_bytes() == (tmp_path / "fixed" / weights).read_bytes()


def test_factor_pruning_and_options_of_the_merge_together(llama, policies, tmp_path):
    space = {"prune": [0.0, 0.5], "density": [0.9, 0.5], "gamma": [0.1]}

    def value(options):
        merging = options["merging"]["options"]
        return options["pruning"]["share"] - merging["density"] + merging["gamma"]

    merging = Merging("breadcrumbs", {"gamma": 0.2})
    chosen = search(scored(value), space)
    report = build_adapter(llama, policies, tmp_path / "out", rescale=chosen, merging=merging, **SETTINGS)
    tried = [tuple(row["point"].values()) for row in report.search]
    assert tried == list(itertools.product([0.0, 0.5], [0.9, 0.5], [0.1]))
    assert report.options["pruning"] == {"share": 0.5, "scope": "global"}
    assert report.options["merging"] == {
        "method": "breadcrumbs",
        "options": {"density": 0.5, "gamma": 0.1},
        "experts": {},
    }
    assert report.options["rescale"] == "norm"


def test_of_candidates_with_one_score_the_first_is_the_best(llama, policies, tmp_path):
    report = build_adapter(llama, policies, tmp_path / "out", rescale=search(lambda adapter: 1, [1.2, 1.0]), **SETTINGS)
    assert report.options["rescale"] == 1.2
    assert [line for line in report.table().splitlines() if "(best)" in line] == ["searched: rescale 1.2: 1 (best)"]


def test_the_plan_of_a_search_counts_all_its_builds(llama, policies, monkeypatch):
    monkeypatch.setattr("peft_hoe.experts.plan.estimated_seconds", lambda *given: {"SVD": 2.0})
    once = plan_build(llama, policies)
    grid = plan_build(llama, policies, rescale=search(None, {"rescale": [1, 1.5, 2], "density": [0.4, 0.6]}))
    space = {"rescale": (0.5, 2), "density": (0.1, 0.9)}
    cma = plan_build(llama, policies, rescale=search(None, space, method="cma", evaluations=30))
    assert (once.builds, grid.builds, cma.builds) == (1, 7, 31)
    assert (grid.seconds, grid.parts, grid.read_bytes) == (14.0, {"SVD": 14.0}, 7 * once.read_bytes)
    assert grid.adapter_bytes == once.adapter_bytes
    assert "7 builds, without their scores" in grid.table()
    assert "search" not in once.table()
    with pytest.raises(ExpertError, match=r"the grid names \['gamma'\]"):
        plan_build(llama, policies, rescale=search(None, {"gamma": [0.1]}))


@pytest.mark.slow
def test_cma_finds_the_top_of_a_hill(llama, policies, tmp_path):
    pytest.importorskip("cma")

    def value(options):
        density = options["merging"]["options"]["density"]
        return -((options["rescale"] - 1.3) ** 2) - (density - 0.4) ** 2

    space = {"rescale": (0.5, 2.5), "density": (0.1, 0.9)}
    chosen = search(scored(value), space, method="cma", evaluations=30, seed=1)
    report = build_adapter(llama, policies, tmp_path / "out", rescale=chosen, **SETTINGS)
    assert len(report.search) == 30
    best = max(report.search, key=lambda row: row["score"])
    assert best["score"] > -0.02
    assert report.options["rescale"] == best["point"]["rescale"]
    again = build_adapter(llama, policies, tmp_path / "again", rescale=chosen, **SETTINGS)
    assert again.search == report.search


@pytest.mark.parametrize(
    ("grid", "settings", "message"),
    [
        ([], {}, r"grid is \[\]; give at least one value"),
        ({}, {}, r"grid is \{\}; give at least one value"),
        ({"density": []}, {}, "give at least one value for each setting"),
        ([float("nan")], {}, "grid has nan for 'rescale'; it must be a finite number"),
        ([1.0], {"method": "random"}, "method is 'random'; use one of 'grid', 'cma'"),
        ({"rescale": [1, 2, 3], "density": [0, 1]}, {"method": "cma"}, "takes the lowest and the highest value"),
        ([1.0, 2.0], {"method": "cma"}, "method='cma' takes two or more"),
        ([1.0], {"evaluations": 0}, "evaluations is 0; it must be a whole number"),
    ],
)
def test_searches_that_make_no_sense_are_refused(grid, settings, message):
    with pytest.raises(ExpertError, match=message):
        search(lambda adapter: 0.0, grid, **settings)


def test_what_cannot_be_searched_or_written_is_refused_before_the_work(llama, policies, tmp_path, monkeypatch):
    monkeypatch.setattr(builder, "open_inputs", None)
    wrong = search(lambda adapter: 0.0, {"gamma": [0.1]})
    with pytest.raises(
        ExpertError, match=r"the grid names \['gamma'\]; with this merge method .*'density'.* can be searched"
    ):
        build_adapter(llama, policies, tmp_path / "out", rescale=wrong, **SETTINGS)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("x")
    with pytest.raises(CheckpointError, match="is not empty"):
        build_adapter(llama, policies, tmp_path / "full", rescale=search(lambda adapter: 0.0, [1.0]), **SETTINGS)


def test_what_a_killed_search_left_is_removed_by_the_next_work_for_its_output(llama, policies, tmp_path, monkeypatch):
    def score(adapter):
        assert adapter.is_relative_to(tmp_path)  # on the disk of the output, which must hold an adapter anyway
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("peft_hoe.unfinished.shutil.rmtree", lambda *arguments, **options: None)  # as after a kill
        with pytest.raises(KeyboardInterrupt):
            build_adapter(llama, policies, tmp_path / "out", rescale=search(score, [1.0]), **SETTINGS)
    assert [path for path in tmp_path.iterdir() if path.name.startswith(".peft_hoe-")]
    build_adapter(llama, policies, tmp_path / "out", **SETTINGS)
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".peft_hoe-")]


@pytest.mark.parametrize("score", [None, float("nan"), "good"])
def test_a_score_that_is_no_number_is_refused_with_its_point(llama, policies, tmp_path, score):
    with pytest.raises(HoEError, match=r"the score of \{'rescale': 1.0\} is .*; it must be a finite number"):
        build_adapter(llama, policies, tmp_path / "out", rescale=search(lambda adapter: score, [1.0]), **SETTINGS)
    assert not (tmp_path / "out").exists()
