from __future__ import annotations

import json
from dataclasses import fields

import numpy as np
import pytest
from peft import LoraConfig

from peft_hoe import ExpertError, ExpertSpec, HoEConfig, HoEWarning, PreferenceError, RouterSpec


def test_defaults_are_the_corners_and_the_centroid():
    config = HoEConfig(objectives=["a", "b", "c"])
    assert config.expert_names == ["a", "b", "c", "centroid"]
    np.testing.assert_allclose(config.expert_preferences, np.vstack([np.eye(3), [[1 / 3] * 3]]))
    assert config.router_names == []
    assert config.ranks("anything") == [16] * 4


def test_names_and_voting_sets_are_resolved():
    config = HoEConfig(
        objectives=["a", "b"],
        experts=[[1, 0], ExpertSpec({"b": 1}, name="beta", r=3), {"preference": [0.6, 0.4]}],
        routers=[[0.25, 0.75], RouterSpec([0.8, 0.2], name="mine", votes_for="all")],
    )
    assert config.expert_names == ["a", "beta", "e2"]
    assert config.router_names == ["r0", "mine"]
    assert [router.votes_for for router in config.routers] == [["beta", "e2"], ["a", "beta", "e2"]]
    assert config.votes() == [[1, 2], [0, 1, 2]]
    # [.25, .75] = 5/12 [.6, .4] + 7/12 [0, 1]; [.8, .2] = 1/2 [1, 0] + 1/2 [.6, .4]
    np.testing.assert_allclose(config.static_votes(), [[0, 7 / 12, 5 / 12], [0.5, 0, 0.5]], atol=1e-12)
    np.testing.assert_allclose(config.initial_router_bias(), np.log([7 / 12, 5 / 12, 0.5, 1e-3, 0.5]), atol=1e-12)


def test_the_written_config_is_plain_json_with_everything_resolved(tmp_path):
    config = HoEConfig(
        objectives=["a", "b"],
        routers=[[0.25, 0.75]],
        r=4,
        rank_pattern={"q_proj": 2, "v_proj": [1, 0, 3]},
        target_modules=["q_proj", "v_proj"],
        default_preference={"a": 1},
    )
    config.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    assert written["peft_type"] == "HOE"
    assert written["experts"][2] == {"preference": [0.5, 0.5], "name": "centroid", "r": 4}
    assert written["routers"][0]["votes_for"] == ["b", "centroid"]
    assert written["rank_pattern"] == {"q_proj": [2, 2, 2], "v_proj": [1, 0, 3]}
    assert written["target_modules"] == ["q_proj", "v_proj"]
    assert written["default_preference"] == [1.0, 0.0]
    again = HoEConfig.from_pretrained(tmp_path)
    assert again.to_dict() == config.to_dict() | {"inference_mode": again.inference_mode}


def test_precedence_of_ranks():
    config = HoEConfig(
        objectives=["a", "b"], experts=[[1, 0], ExpertSpec([0, 1], r=7)], r=4, rank_pattern={"down_proj": 2}
    )
    assert config.ranks("model.layers.0.q_proj") == [4, 7]
    assert config.ranks("model.layers.0.down_proj") == [2, 2]


def test_numpy_values_become_plain_ones(tmp_path):
    config = HoEConfig(
        objectives=["a", "b"], experts=np.eye(2), routers=np.array([[0.25, 0.75]]), r=np.int64(4),
        rank_pattern={"q": np.int64(2), "k": np.array([1, 2])},
    )  # fmt: skip
    config.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    assert written["r"] == 4
    assert written["rank_pattern"] == {"q": [2, 2], "k": [1, 2]}


def test_an_objective_without_its_own_expert_is_allowed_and_said():
    with pytest.warns(HoEWarning, match=r"no expert serves \['b'\]"):
        HoEConfig(objectives=["a", "b"], experts=[[1, 0], [0.5, 0.5]])


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"experts": [[1, 0], [0, 1], [0.5, 0.3, 0.2]]}, PreferenceError, "expert 2.*3 numbers"),
        ({"experts": [[1, 0], [0, 1], [1, 0]]}, ExpertError, "used twice|apart"),
        ({"experts": [[1, 0], [0, 1], [0.995, 0.005]]}, ExpertError, "apart"),
        ({"routers": [[0.5, 0.5], [0.504, 0.496]]}, ExpertError, "router.*apart"),
        ({"routers": [[0.5, 0.6]]}, PreferenceError, "router 0.*sums to 1.1"),
        ({"routers": [RouterSpec([0.5, 0.5], votes_for=["nobody"])]}, ExpertError, "nobody"),
        ({"routers": [RouterSpec([0.25, 0.75], votes_for=["a", "centroid"])]}, ExpertError, "do not enclose"),
        ({"routers": [RouterSpec([0.5, 0.5], name="a")]}, ExpertError, "used twice"),
        ({"experts": []}, ExpertError, "empty"),
        ({"objectives": []}, ExpertError, "empty"),
        ({"objectives": ["a", "a"]}, ExpertError, "used twice"),
        ({"objectives": "ab"}, ExpertError, "list"),
        ({"experts": [{"preference": [1, 0], "rank": 3}]}, ExpertError, "no field"),
        ({"r": 0}, ExpertError, "r is 0"),
        ({"r": 2.5}, ExpertError, r"r is 2\.5"),
        ({"experts": [ExpertSpec([1, 0], r=0), [0, 1]]}, ExpertError, "rank of expert 'a' is 0"),
        ({"rank_pattern": {"q": 0}}, ExpertError, "rank_pattern"),
        ({"rank_pattern": {"q": [1, 2]}}, ExpertError, "2 ranks for 3 experts"),
        ({"rank_pattern": {"q": [0, 0, 0]}}, ExpertError, "rank_pattern"),
        ({"router_temperature": 0}, ExpertError, "from 1e-6"),
        ({"router_temperature": "1"}, ExpertError, "router_temperature is '1'"),
        ({"router_temperature": float("inf")}, ExpertError, "from 1e-6"),
        ({"rank_pattern": {"q": 2.5}}, ExpertError, r"rank_pattern\['q'\] is 2.5"),
        ({"default_preference": [0.5, 0.4]}, PreferenceError, "sums to 0.9"),
        ({"target_modules": "a.*", "layers_to_transform": [0]}, ValueError, "layers_to_transform"),
        ({"layers_to_transform": [0], "layers_pattern": "(a+)+"}, ExpertError, "layers_pattern is"),
        ({"routers": [{"preference": [0.5, 0.5], "trained": "false"}]}, ExpertError, "use True or False"),
        ({"train_experts": "false"}, ExpertError, "train_experts is 'false'; use True or False"),
        ({"routers": [RouterSpec([0.5, 0.5], votes_for=3)]}, ExpertError, "votes for 3; use 'all' or a list"),
        ({"routers": [RouterSpec([0.5, 0.5], votes_for=[["a"]])]}, ExpertError, "votes for .*; use 'all' or a list"),
        ({"routers": [RouterSpec([0.5, 0.5], votes_for=[])]}, ExpertError, "use 'all' or a list"),
        ({"routers": [RouterSpec([0.5, 0.5], votes_for="a")]}, ExpertError, "use 'all' or a list"),
        ({"routers": 3}, ExpertError, "routers is 3; give a list"),
        ({"routers": "r0"}, ExpertError, "give a list"),
        ({"experts": 3}, ExpertError, "experts is 3; give a list"),
        ({"objectives": 3}, ExpertError, "objective names are 3"),
        ({"rank_pattern": ["q"]}, ExpertError, r"rank_pattern is \['q'\]"),
        ({"rank_pattern": {"q": None}}, ExpertError, r"rank_pattern\['q'\] is None"),
        ({"rank_pattern": {"q": {"a": 1, "b": 2, "centroid": 3}}}, ExpertError, "a list with one per expert"),
        ({"rank_pattern": {"q": [1, None, 2]}}, ExpertError, "is None"),
        ({"rank_pattern": {"q": [1, True, 2]}}, ExpertError, "is True"),
        ({"router_temperature": 1e-300}, ExpertError, "router_temperature is 1e-300"),
        ({"objectives": [f"o{i}" for i in range(1025)]}, ExpertError, "there are 1025 objectives; at most 1024"),
        ({"routers": [[0.5, 0.5]] * 1025}, ExpertError, "there are 1025 routers"),
    ],
)
def test_bad_configurations_are_refused_by_name(settings, error, message):
    with pytest.raises(error, match=message):
        HoEConfig(**{"objectives": ["a", "b"], **settings})


@pytest.mark.parametrize("kind", [HoEConfig, ExpertSpec, RouterSpec])
def test_every_field_has_help_and_the_docstring_says_the_same(kind):
    for item in fields(kind):
        assert item.metadata["help"], item.name
        if item.name in kind.__annotations__:
            said = " ".join(kind.__doc__.split())
            assert f"{item.name}: {item.metadata['help']}" in said


def test_hundreds_of_objectives_are_resolved_at_once():
    # 600 took a minute: every corner was compared with experts that were put together anew each time.
    config = HoEConfig(objectives=[f"o{i}" for i in range(300)], r=1)
    assert len(config.expert_names) == 301
    assert config.preference_router().route(np.full(300, 1 / 300)).experts == pytest.approx({"centroid": 1.0})


def test_more_votes_than_fit_are_refused():
    n = 400
    routers = [RouterSpec(preference, votes_for="all") for preference in np.eye(n)[:60] * 0.5 + 0.5 / n]
    with pytest.raises(ExpertError, match="60 routers have 24060 votes for 401 experts, more than fit"):
        HoEConfig(objectives=[f"o{i}" for i in range(n)], routers=routers)


def test_a_pattern_of_ranks_that_backtracks_is_named():
    config = HoEConfig(objectives=["a", "b"], rank_pattern={r"(a|aa)+b": 3})
    with pytest.raises(ExpertError, match=r"rank_pattern\['\(a\|aa\)\+b'\].*backtracks"):
        config.ranks("a" * 60)
    assert config.ranks("model.layers.0.q_proj") == [16, 16, 16]


def test_the_configuration_of_another_method_is_read_as_that(tmp_path):
    # PEFT's classes do so for each other; AutoPeftModel and tests of PEFT rely on it.
    LoraConfig(r=3, target_modules=["q_proj"]).save_pretrained(tmp_path)
    found = HoEConfig.from_pretrained(tmp_path)
    assert isinstance(found, LoraConfig)
    assert found.r == 3
