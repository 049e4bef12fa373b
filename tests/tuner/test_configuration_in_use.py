"""A model reads its configuration: an assignment to it works or is refused, and no two models share one."""

from __future__ import annotations

import copy
import gc
import pickle

import pytest
import torch
from peft import PeftModel, get_peft_model, inject_adapter_in_model
from torch import nn

import peft_hoe
from peft_hoe import ExpertError, ExpertSpec, HoEConfig, PreferenceError, RouterSpec


def logits(model, tokens, **kwargs):
    with torch.no_grad():
        return model(tokens, **kwargs).logits


def test_an_assigned_default_preference_takes_effect_and_is_saved(hoe_llama, tokens, tmp_path):
    # It was ignored, but saved: the adapter on disk and the model in memory were two.
    model = hoe_llama().double()
    corner = logits(model, tokens, preference=[1, 0])
    config = model.peft_config["default"]
    config.default_preference = {"a": 1}
    assert model.preference == {"a": 1, "b": 0}
    torch.testing.assert_close(logits(model, tokens), corner, rtol=0, atol=0)
    model.save_pretrained(tmp_path)
    assert HoEConfig.from_pretrained(tmp_path).default_preference == [1, 0]
    config.default_preference = None
    assert model.preference == {"a": 0.5, "b": 0.5}


def test_an_assigned_mark_takes_effect(hoe_llama, tokens):
    model, trained = hoe_llama().double(), hoe_llama(trained=True).double()
    wanted = logits(trained, tokens, preference=[0.25, 0.75])
    assert not torch.allclose(logits(model, tokens, preference=[0.25, 0.75]), wanted)
    model.peft_config["default"].routers[0].trained = True
    torch.testing.assert_close(logits(model, tokens, preference=[0.25, 0.75]), wanted, rtol=0, atol=0)


def test_what_is_no_preference_or_mark_is_refused_and_changes_nothing(hoe_llama, tokens):
    model = hoe_llama()
    model.set_preference([0.3, 0.7])
    before = logits(model, tokens)
    config = model.peft_config["default"]
    with pytest.raises(PreferenceError, match="sums to 2"):
        config.default_preference = [1, 1]
    with pytest.raises(ExpertError, match="trained of router 'r0' is 'false'; use True or False"):
        config.routers[0].trained = "false"
    assert config.default_preference == [0.3, 0.7]
    assert config.routers[0].trained is False
    torch.testing.assert_close(logits(model, tokens), before, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("objectives", ["x", "y"]),
        ("experts", [[1, 0], [0, 1]]),
        ("routers", []),
        ("r", 3),
        ("target_modules", ["q_proj"]),
        ("exclude_modules", ["q_proj"]),
        ("layers_to_transform", [0]),
        ("rank_pattern", {"q_proj": 1}),
        ("train_experts", True),
        ("router_temperature", 2.0),
        ("interpolation", "norm"),
        ("init_weights", False),
    ],
)
def test_what_the_adapter_was_made_with_is_fixed(hoe_llama, name, value):
    model = hoe_llama()
    config = model.peft_config["default"]
    before = getattr(config, name)
    with pytest.raises(ExpertError, match=f"{name} cannot become") as refused:
        setattr(config, name, value)
    assert (refused.value.argument, refused.value.value) == (name, value)
    assert getattr(config, name) == before


@pytest.mark.slow
def test_experts_and_routers_are_fixed_too(hoe_llama):
    model = hoe_llama(rank_pattern={"q_proj": 2})
    config = model.peft_config["default"]
    for spec, name in ((config.experts[0], "r"), (config.experts[0], "name"), (config.routers[0], "votes_for")):
        with pytest.raises(ExpertError, match=f"{type(spec).__name__}.{name} cannot become"):
            setattr(spec, name, 1)
    changes = (
        lambda: config.routers.append([0.5, 0.5]),
        lambda: config.objectives.reverse(),
        lambda: config.experts[0].preference.__setitem__(0, 0.5),
        lambda: config.rank_pattern.update({"v_proj": 3}),
    )
    for change in changes:
        with pytest.raises(ExpertError, match="cannot be changed in place"):
            change()
    config.default_preference = [0.3, 0.7]
    with pytest.raises(ExpertError, match="cannot be changed in place") as refused:
        config.default_preference[0] = 1.0
    assert refused.value.value == [0.3, 0.7]


def test_the_bookkeeping_of_peft_stays_free(hoe_llama):
    config = hoe_llama().peft_config["default"]
    written = {"base_model_name_or_path": "somewhere", "inference_mode": True, "modules_to_save": ["lm_head"]}
    for name, value in written.items():
        setattr(config, name, value)
    assert {name: getattr(config, name) for name in written} == written


def test_everything_is_free_again_when_the_model_is_gone(llama, config):
    # The parts of a model refer to each other, so that it may live on until the collector comes.
    given = config()
    model = inject_adapter_in_model(given, llama())
    with pytest.raises(ExpertError, match="a model has been made with"):
        given.exclude_modules = ["k_proj"]
    del model
    given.exclude_modules = ["k_proj"]
    again = inject_adapter_in_model(given, llama())
    assert not any("k_proj.hoe_A" in name for name, _ in again.named_parameters())


def test_the_model_uses_the_callers_own_object(llama, config):
    # PEFT assigns to it after the adapter is there (token classification), and so may its user.
    given = config()
    model = get_peft_model(llama(), given)
    assert model.peft_config["default"] is given
    given.default_preference = [1, 0]
    assert model.preference == {"a": 1, "b": 0}


def test_two_models_of_one_configuration_share_nothing(llama, config, tmp_path):
    given = config(default_preference=[0.3, 0.7])
    first = get_peft_model(llama(), given)
    second = get_peft_model(llama(), given)
    third = PeftModel(llama(), given)
    assert given is third.peft_config["default"]
    first.set_preference([1, 0])
    first.mark_trained()
    second.peft_config["default"].default_preference = [0, 1]
    assert dict(first.preference) == {"a": 1, "b": 0}
    assert dict(second.preference) == {"a": 0, "b": 1}
    assert dict(third.preference) == {"a": 0.3, "b": 0.7}
    for model, default, trained in ((first, [1, 0], True), (second, [0, 1], False), (third, [0.3, 0.7], False)):
        model.save_pretrained(tmp_path)
        saved = HoEConfig.from_pretrained(tmp_path)
        assert (saved.default_preference, saved.routers[0].trained) == (default, trained)


def test_two_adapters_of_one_configuration_share_nothing(hoe_llama):
    model = hoe_llama()
    model.set_preference([1, 0])
    model.add_adapter("second", model.peft_config["default"])
    model.set_preference({"second": [0, 1]})
    assert model.peft_config["default"].default_preference == [1, 0]
    assert model.peft_config["second"].default_preference == [0, 1]
    model.delete_adapter("second")
    model.add_adapter("third", model.peft_config["default"])
    model.set_preference({"default": [0.3, 0.7]})
    assert model.peft_config["third"].default_preference == [1, 0]


def test_an_adapter_can_be_made_again_of_a_configuration_that_was_in_use(hoe_llama):
    model = hoe_llama()
    model.add_adapter("second", HoEConfig(objectives=["x", "y"], target_modules=["q_proj"], task_type="CAUSAL_LM"))
    given = model.peft_config["second"]
    model.delete_adapter("second")
    given.experts = None  # in nobody's use any more
    given.objectives = ["x", "y", "z"]
    given.routers = [[0.2, 0.3, 0.5]]
    model.add_adapter("second", given)
    assert peft_hoe.route(model, [0.2, 0.3, 0.5], "second").experts == {"r0": 1.0}


def test_a_configuration_is_free_again_when_its_model_is_gone(llama, config):
    given = config()
    model = get_peft_model(llama(), given)
    del model
    gc.collect()
    given.exclude_modules = ["q_proj"]
    given.interpolation = "norm"
    assert get_peft_model(llama(), given).peft_config["default"].interpolation == "norm"


def test_assignments_before_a_model_is_made_work_or_are_refused(llama, config):
    given = config()
    given.routers = [[0.75, 0.25]]
    given.experts[0].r = 2
    given.default_preference = (1, 0)
    model = get_peft_model(llama(), given)
    assert model.peft_config["default"].routers[0].votes_for == ["a", "centroid"]
    assert model.base_model.model.model.layers[0].mlp.up_proj.hoe_A["default"].weight.shape[0] == 2 + 4 + 4
    assert dict(model.preference) == {"a": 1, "b": 0}
    with pytest.raises(ExpertError, match="r cannot become 8: the experts took 4"):
        config().r = 8
    for name, value, message in (
        ("interpolation", "cubic", "interpolation is 'cubic'"),
        ("routers", [RouterSpec([0.5, 0.5], votes_for="nobody")], "votes for 'nobody'"),
        ("experts", [ExpertSpec([1, 0], r=0)], "is 0"),
        ("train_experts", "yes", "train_experts is 'yes'"),
    ):
        given = config()
        setattr(given, name, value)
        with pytest.raises(ExpertError, match=message):
            get_peft_model(llama(), given)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copied_model_hears_of_its_own_configuration(hoe_llama, copied):
    model = hoe_llama()
    model.set_preference([1, 0])
    other = copied(model)
    other.peft_config["default"].default_preference = [0, 1]
    assert (dict(model.preference), dict(other.preference)) == ({"a": 1, "b": 0}, {"a": 0, "b": 1})
    model.set_preference([0.3, 0.7])
    assert dict(other.preference) == {"a": 0, "b": 1}


def test_a_copied_configuration_is_in_nobodys_use(hoe_llama):
    taken = copy.deepcopy(hoe_llama().peft_config["default"])
    taken.interpolation = "norm"
    taken.objectives.append("c")
    assert type(taken.objectives) is list


def test_models_without_a_tuner_object(llama, config):
    model = inject_adapter_in_model(config(), llama())
    model.peft_config["default"].default_preference = [1, 0]
    assert peft_hoe.get_preference(model) == {"a": 1, "b": 0}


@pytest.mark.slow
@pytest.mark.usefixtures("whole_graph")
def test_compiled_models_hear_of_it(hoe_llama, tokens):
    model = hoe_llama().double()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    for preference in ([0, 1], [1, 0]):
        expected = logits(model, tokens, preference=preference)
        model.peft_config["default"].default_preference = preference
        torch.testing.assert_close(logits(compiled, tokens), expected, rtol=1e-10, atol=1e-10)


def test_a_view_of_an_adapter(hoe_llama):
    model = hoe_llama(trained=True)
    adapter = peft_hoe.tuner.functional.adapter_of(model)
    assert (adapter.name, adapter.objectives, adapter.expert_names) == ("default", ["a", "b"], ["a", "b", "centroid"])
    assert (adapter.router_names, adapter.router_preferences.tolist()) == (["r0"], [[0.25, 0.75]])
    assert (adapter.trained.tolist(), adapter.default.tolist(), adapter.votes()) == ([True], [0.5, 0.5], [[1, 2]])
    assert adapter.describe()["routers"][0]["trained"]
    with pytest.raises(PreferenceError, match="no HoE adapter 'nobody'") as caught:
        peft_hoe.tuner.functional.adapter_of(model, "nobody")
    assert (caught.value.value, caught.value.allowed) == ("nobody", ["default"])
    with pytest.raises(PreferenceError, match="no HoE adapter"):
        peft_hoe.tuner.functional.adapter_of(nn.Linear(1, 1))
