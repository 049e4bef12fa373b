"""Ids, commits, licences and hashes of what an adapter was built from, and the base that it is loaded on."""

from __future__ import annotations

import json
import warnings

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from peft_hoe import CheckpointError, HoEConfig, HoEWarning, build_adapter
from peft_hoe.base_sample import differing, positions
from peft_hoe.experts import Loading
from peft_hoe.tuner.layer import HoELayer

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")
QUIET = {"progress": False, "r": 2}


def test_report_and_card_name_the_sources(llama, policies, tmp_path, tiny):
    snapshot = tmp_path / "snapshots" / ("0" * 39 + "1")
    snapshot.parent.mkdir()
    policies["kind"].rename(snapshot)
    (snapshot / "README.md").write_text("---\nlicense: apache-2.0\n---\nA policy.\n")
    (llama / "README.md").write_text("---\nlicense: other\nlicense_name: llama|2\n---\n")
    report = build_adapter(llama, {"kind": snapshot, "brief": policies["brief"]}, tmp_path / "out", **QUIET)
    base, kind, brief = report.sources["base"], *report.sources["policies"].values()
    assert (base["id"], base["commit"], base["license"]) == (str(llama), None, "llama|2")
    assert (kind["commit"], kind["license"]) == (snapshot.name, "apache-2.0")
    assert (brief["commit"], brief["license"]) == (None, None)
    assert len({base["hash"], kind["hash"], brief["hash"]}) == 3
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"| policy kind | {snapshot} | {snapshot.name} | apache-2.0 | {kind['hash']} |" in card
    assert "llama\\|2" in card
    build_adapter(llama, {"brief": policies["brief"]}, tmp_path / "out", overwrite=True, **QUIET)
    card = (tmp_path / "out" / "README.md").read_text()
    assert card.count("## Built from") == 1
    assert "policy kind" not in card


@pytest.fixture
def adapter(llama, policies, tmp_path):
    build_adapter(llama, policies, tmp_path / "out", **QUIET)
    return tmp_path / "out"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.filterwarnings("error::peft_hoe.HoEWarning")
def test_the_base_is_known_in_any_precision(llama, adapter, dtype):
    """Exactly: the next number of that precision is another base's."""
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(llama, dtype=dtype), adapter)
    layers = [module for module in model.modules() if isinstance(module, HoELayer)]
    weights = {layer.module_name: layer.get_base_layer().weight.detach() for layer in layers}
    sample = model.peft_config["default"].base_sample
    assert len(sample["values"]) == len(weights) == 7
    assert differing(sample, weights) == []
    for name, weight in weights.items():
        row, column = positions(weight.shape)[-1]
        other = weight.clone()
        other[row, column] = weight[row, column] * (1 + torch.finfo(dtype).eps)
        assert differing(sample, weights | {name: other}) == [name]


def test_another_base_is_told_with_both_names(policies, llama, adapter):
    with pytest.warns(
        HoEWarning, match="was built on .*but .* has other weights: 7 of 7 sampled modules differ"
    ) as told:
        PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(policies["kind"]), adapter)
    assert str(llama) in str(told[0].message)
    assert str(policies["kind"]) in str(told[0].message)


def test_the_revision_of_the_base_is_recorded_and_told(llama, policies, tmp_path):
    build_adapter(llama, policies, tmp_path / "out", loading=Loading(revision="v2"), **QUIET)
    config = HoEConfig.from_pretrained(tmp_path / "out")
    assert (config.base_model_name_or_path, config.revision) == (str(llama), "v2")
    with pytest.warns(HoEWarning, match=r"was built on '.*base \(revision v2\)', but '.*kind' has other weights"):
        PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(policies["kind"]), tmp_path / "out")


def test_a_second_adapter_on_the_same_base_is_no_other_base(llama, adapter):
    with warnings.catch_warnings():
        warnings.simplefilter("error", HoEWarning)
        model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(llama), adapter)
        model.load_adapter(adapter, "second")
        model.save_pretrained(adapter.parent / "again")
    saved = json.loads((adapter.parent / "again" / "adapter_config.json").read_text())
    assert saved["base_sample"] == json.loads((adapter / "adapter_config.json").read_text())["base_sample"]


@pytest.mark.parametrize(
    "sample", [3, {"values": {}}, {"shapes": "x", "values": {"a": [1]}}, {"shapes": "x", "values": [1]}]
)
def test_a_strangers_record_is_refused(sample):
    with pytest.raises(CheckpointError, match=r"base_sample is .*must be what build_adapter wrote"):
        HoEConfig(objectives=["a", "b"], base_sample=sample)
