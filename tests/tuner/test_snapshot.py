"""An adapter is put back as it was: the same tensors, bit by bit, the same texts, marks and calibration."""

from __future__ import annotations

import warnings
from copy import deepcopy

import pytest
import torch

from peft_hoe import ExpertSpec, demo, mark_trained
from peft_hoe.tuner.functional import adapter_of
from peft_hoe.tuner.growing import layers_of
from peft_hoe.tuner.snapshot import AdapterSnapshot

TOKENS = torch.tensor([[5, 6, 7, 8, 9]])


def factors(model, size=0.2):
    generator = torch.Generator().manual_seed(3)
    found = {}
    for layer in layers_of(model, "default"):
        shapes = [(2, layer.in_features), (layer.out_features, 2)]
        if not layer.low_rank:
            shapes = [tuple(tensor.shape[1:]) for tensor in layer.adapter_tensors("default").values()]
        found[layer.module_name] = tuple(size * torch.randn(shape, generator=generator) for shape in shapes)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("capture", [(), ("embeddings", "norms")])
@pytest.mark.parametrize("routers", [[], [[0.75, 0.25]]])
def test_what_was_added_is_gone(capture, routers):
    """Also the scale of inner products, which a large expert changes and its removal would not put back."""
    model = demo.load_demo_adapter(routers=routers, capture=capture, r=4)
    model.set_preference([0.6, 0.4])
    if routers:
        mark_trained(model, "r0")
    config = model.peft_config["default"]
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    parameters, said = dict(model.named_parameters()), deepcopy(config.to_dict())
    with torch.no_grad():
        logits = model(TOKENS).logits

    snapshot = AdapterSnapshot(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.add_expert(ExpertSpec([0.3, 0.7], name="large"), factors(model, size=2.0))
        model.add_router([0.4, 0.6])
    added = adapter_of(model).router_names[-1]
    mark_trained(model, added)
    with torch.no_grad():
        assert not torch.equal(model(TOKENS, preference=[0.4, 0.6]).logits, logits)
    snapshot.restore()

    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert all(parameter is parameters[name] for name, parameter in model.named_parameters())
    assert model.peft_config["default"] is config
    assert config.to_dict() == said
    assert adapter_of(model).expert_names == ["cheerful", "vivid", "centroid"]
    with torch.no_grad():
        assert torch.equal(model(TOKENS).logits, logits)
    model.add_router([0.4, 0.6])  # and it can be changed again
    assert adapter_of(model).router_names == [*(["r0"] if routers else []), added]


def test_a_calibration_comes_back():
    """Adding drops it, as it was made for other experts."""
    model = demo.load_demo_adapter()
    config = model.peft_config["default"]
    ends = [[0.0, 1.0], [1.0, 0.0]]
    made = {"positions": ends, "preferences": ends, "simplices": [[0, 1]], "made_for": config.calibrates()}
    config.calibration = made
    snapshot = AdapterSnapshot(model)
    with pytest.warns(match="the adapter's calibration was made for other experts"):
        model.add_router([0.75, 0.25])
    assert config.calibration is None
    snapshot.restore()
    assert config.calibration == made
