from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import evaluate
import numpy as np
import pytest
import torch

from peft_hoe import HoEWarning, metrics
from peft_hoe.errors import MetricError
from peft_hoe.metrics.modules import NAMES

FRONT = [[0.2, 0.9], [0.7, 0.5]]
OTHER = [[0.1, 0.8], [0.6, 0.5], [0.9, 0.1]]
PREFERENCES = [[1.0, 0.0], [0.5, 0.5], [0.0, 1.0]]
REWARDS = [[0.9, 0.2], [0.6, 0.8], [0.1, 0.7]]


def test_hypervolume_by_its_path():
    hypervolume = evaluate.load(metrics.path("hypervolume"))
    assert hypervolume.name == "hypervolume"
    assert hypervolume.compute(predictions=FRONT, reference_point=[0, 0]) == {
        "hypervolume": pytest.approx(0.43),
        "reference_point": [0.0, 0.0],
        "points": 2,
        "non_dominated": 2,
        "clipped": 0,
        "warnings": [],
    }


def test_pareto_dominance_of_fronts_of_different_length():
    found = metrics.load("pareto_dominance").compute(predictions=FRONT, references=OTHER)
    assert found == {
        "dominates": False,
        "dominated": False,
        "coverage_predictions": pytest.approx(2 / 3),
        "coverage_references": 0.0,
        "share_predictions": 1.0,
        "share_references": pytest.approx(1 / 3),
        "epsilon_predictions": pytest.approx(0.2),
        "epsilon_references": pytest.approx(0.1),
        "points_predictions": 2,
        "points_references": 3,
        "non_dominated_predictions": 2,
        "non_dominated_references": 3,
        "warnings": [],
    }
    swapped = metrics.load("pareto_dominance").compute(predictions=OTHER[:2], references=FRONT)
    assert (swapped["dominates"], swapped["dominated"]) == (False, True)


def test_equal_fronts_say_so():
    with pytest.warns(HoEWarning, match="same points"):
        found = metrics.load("pareto_dominance").compute(predictions=FRONT, references=[*FRONT, FRONT[0]])
    assert not found["dominates"]
    assert found["warnings"] == ["both fronts have the same points: neither dominates the other"]


def test_steerability():
    found = metrics.load("steerability").compute(predictions=REWARDS, references=PREFERENCES)
    assert found["spearman"] == pytest.approx([1.0, 0.5])
    assert found["order_violations"] == pytest.approx([0, 1 / 3])
    assert found["expected_utility"] == pytest.approx(0.8)
    assert found["control_regret"] == pytest.approx(0.1 / 3)
    assert (found["rows"], found["preferences"], found["warnings"]) == (3, 3, [])


def test_answers_are_plain_json():
    for name in NAMES:
        found = metrics.load(name).compute(predictions=REWARDS, references=PREFERENCES, reference_point=0)
        assert json.loads(json.dumps(found)) == found


def test_warnings_are_in_the_answer():
    with pytest.warns(HoEWarning, match="hypervolume is 0"):
        found = metrics.load("hypervolume").compute(predictions=FRONT, reference_point=1)
    assert found["hypervolume"] == 0
    assert found["clipped"] == 2
    assert "no point is above the reference point [1.0, 1.0]" in found["warnings"][0]


@pytest.mark.parametrize("in_memory", [False, True])
def test_points_are_collected(in_memory):
    hypervolume = metrics.load("hypervolume", keep_in_memory=in_memory)
    hypervolume.add(prediction=FRONT[0])
    hypervolume.add_batch(predictions=np.asarray(FRONT[1:], dtype=np.float32))
    hypervolume.add_batch(predictions=torch.tensor([[0.1, 0.1]]))
    found = hypervolume.compute(reference_point=0)
    assert (found["points"], found["non_dominated"]) == (3, 2)
    assert found["hypervolume"] == pytest.approx(0.43)
    again = hypervolume.compute(predictions=FRONT[:1], reference_point=0)
    assert again["points"] == 1


def test_fronts_are_collected_apart():
    dominance = metrics.load("pareto_dominance")
    dominance.add_batch(predictions=np.asarray(FRONT))
    dominance.add_batch(references=OTHER[:1])
    dominance.add(prediction=None, reference=OTHER[1])
    dominance.add_batch(predictions=[], references=torch.tensor(OTHER[2:]))
    found = dominance.compute()
    assert found["points_predictions"] == 2
    assert found["points_references"] == 3
    assert found["coverage_predictions"] == pytest.approx(2 / 3)


def test_combine():
    combined = evaluate.combine([metrics.load(name) for name in NAMES])
    found = combined.compute(predictions=REWARDS, references=PREFERENCES, reference_point=0)
    assert found["hypervolume"] == pytest.approx(0.9 * 0.2 + 0.6 * 0.6)
    assert found["coverage_predictions"] == pytest.approx(1 / 3)  # (0.6, 0.8) dominates (0.5, 0.5)
    assert found["control_regret"] == pytest.approx(0.1 / 3)
    assert found["hypervolume_warnings"] == found["steerability_warnings"] == []
    combined = evaluate.combine({"mine": metrics.load("hypervolume"), "theirs": metrics.path("pareto_dominance")})
    combined.add_batch(predictions=FRONT, references=OTHER)
    assert combined.compute(reference_point=0)["coverage_predictions"] == pytest.approx(2 / 3)


def test_a_forgotten_reference_point_loses_nothing():
    hypervolume = metrics.load("hypervolume")
    hypervolume.add_batch(predictions=FRONT)
    for bad in ({}, {"reference_point": float("nan")}):
        with pytest.raises(MetricError, match="reference_point"):
            hypervolume.compute(**bad)
    assert hypervolume.compute(reference_point=0)["points"] == 2


@pytest.mark.parametrize(
    ("points", "match"),
    [
        ([], "points is empty"),
        ([[]], "points is empty"),
        ([[1.0, float("nan")], [1.0, None]], r"NaN \(no reward\) in 2 of 2 rows"),
        ([[1.0, float("inf")]], "infinity"),
        ([[1.0, 2.0], [1.0]], "its rows have 1, 2 numbers"),
        ([[1.0, 2.0, 3.0]], "reference_point has 2 numbers, but there are 3 objectives"),
    ],
)
def test_bad_points(points, match):
    hypervolume = metrics.load("hypervolume", keep_in_memory=True)
    with pytest.raises(MetricError, match=match):
        hypervolume.compute(predictions=points, reference_point=[0, 0])


def test_a_module_works_after_an_error():
    hypervolume = metrics.load("hypervolume")
    with pytest.raises(MetricError, match="infinity"):
        hypervolume.compute(predictions=[[1.0, float("inf")]], reference_point=0)
    assert hypervolume.compute(predictions=FRONT, reference_point=0)["points"] == 2


def test_what_evaluate_itself_refuses():
    with pytest.raises(ValueError, match="expected format"):
        metrics.load("hypervolume", keep_in_memory=True).compute(predictions=[0.2, 0.9], reference_point=0)
    with pytest.raises(ValueError, match="Mismatch in the number of predictions"):
        metrics.load("steerability", keep_in_memory=True).compute(predictions=REWARDS, references=PREFERENCES[:2])


def test_a_missing_front_and_an_unknown_module():
    with pytest.raises(MetricError, match=r"front B \(references\) is empty"):
        metrics.load("pareto_dominance", keep_in_memory=True).compute(predictions=FRONT)
    with pytest.raises(MetricError, match="'hv'; use one of hypervolume, pareto_dominance, steerability"):
        metrics.path("hv")


@pytest.mark.parametrize("name", NAMES)
def test_the_folder_is_complete(name):
    folder = Path(metrics.path(name))
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert re.match(r"---\ntitle: .+\ntags:\n- evaluate\n- metric\n", card)
    example = (folder / "example.py").read_text(encoding="utf-8").split("\n\n", 1)[1]
    shown = re.search(r"```python\n(.*?)```", card, re.DOTALL).group(1)
    assert re.sub(r"print\((.*)\)\n", r"\1\n", example) == re.sub(r"# .*\n", "", shown)


# -- Processes: sockets that leave the machine are refused, and the cache starts empty. ---------------------------------------

OFFLINE = """
import json, socket, sys
def refuse(*args): raise AssertionError("the network was asked")
socket.getaddrinfo = socket.socket.connect = refuse
import peft_hoe.metrics
"""

WORKER = """
rank = int(sys.argv[1])
hypervolume = peft_hoe.metrics.load("hypervolume", num_process=2, process_id=rank, experiment_id="pair")
hypervolume.add_batch(predictions=[[0.2, 0.9]] if rank == 0 else [[0.7, 0.5], [0.1, 0.1]])
print(json.dumps(hypervolume.compute(reference_point=0)))
dominance = peft_hoe.metrics.load("pareto_dominance", num_process=2, process_id=rank, experiment_id="pair")
dominance.add_batch(**({"predictions": [[0.2, 0.9], [0.7, 0.5]]} if rank == 0 else {"references": [[0.1, 0.8]]}))
print(json.dumps(dominance.compute()))
"""

ALONE = """
hypervolume = peft_hoe.metrics.load("hypervolume")
for k in range(20):
    hypervolume.add(prediction=[0.2 + int(sys.argv[1]), 0.9])
print(json.dumps(hypervolume.compute(reference_point=0)))
"""


@pytest.fixture(scope="module")
def printed(tmp_path_factory):
    """Two processes that share a new, empty cache; what each printed, line by line."""
    folder = tmp_path_factory.mktemp("cache")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    environment |= {"HF_HOME": str(folder), "HF_HUB_OFFLINE": "1"}
    started = [
        subprocess.Popen(
            [sys.executable, "-c", OFFLINE + ALONE + WORKER, str(rank)],
            env=environment,
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    outputs = [worker.communicate()[0] for worker in started]
    assert [worker.returncode for worker in started] == [0, 0]
    return [[json.loads(line) for line in output.splitlines()] for output in outputs]


@pytest.mark.slow
def test_two_processes_of_one_evaluation(printed):
    (_, volume, dominance), (_, *other) = printed
    assert other == [None, None]
    assert volume["hypervolume"] == pytest.approx(0.43)
    assert (volume["points"], volume["non_dominated"]) == (3, 2)
    assert dominance["dominates"]
    assert (dominance["points_predictions"], dominance["points_references"]) == (2, 1)


@pytest.mark.slow
def test_two_evaluations_at_the_same_time(printed):
    (first, *_), (second, *_) = printed
    assert first["hypervolume"] == pytest.approx(0.2 * 0.9)
    assert second["hypervolume"] == pytest.approx(1.2 * 0.9)
    assert first["points"] == second["points"] == 20
