from __future__ import annotations

import asyncio
import logging
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

from peft_hoe import CheckpointError, HoEError, HoEWarning

pytest.importorskip("fcntl")
from peft_hoe.serving.atlas import export_atlas
from peft_hoe.serving.vllm_names import Names
from peft_hoe.serving.vllm_plugin import check_command_line, check_devices, make_resolver, register
from peft_hoe.serving.vllm_settings import Settings


@dataclass
class LoRARequest:
    """As vllm.lora.request has it, as far as a resolver sees it."""

    lora_name: str
    lora_int_id: int
    lora_path: str


class Registry:
    """As vllm.lora.resolver has it."""

    def __init__(self):
        self.resolvers = {}

    def get_supported_resolvers(self):
        return self.resolvers.keys()

    def register_resolver(self, name, resolver):
        assert name not in self.resolvers
        self.resolvers[name] = resolver


@pytest.fixture
def vllm(monkeypatch):
    """A stand-in for the two modules of vLLM that a resolver needs; gives its registry."""
    registry = Registry()
    request, resolver = ModuleType("vllm.lora.request"), ModuleType("vllm.lora.resolver")
    request.LoRARequest = LoRARequest
    resolver.LoRAResolver, resolver.LoRAResolverRegistry = type("LoRAResolver", (), {}), registry
    for module in (ModuleType("vllm"), ModuleType("vllm.lora"), request, resolver):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    return registry


@pytest.fixture
def adapter(toys, tmp_path):
    model = toys.make_policy()
    toys.make_base().config.save_pretrained(tmp_path / "toy")
    model.peft_config["default"].base_model_name_or_path = str(tmp_path / "toy")
    model.save_pretrained(tmp_path / "hoe")
    return tmp_path / "hoe"


@pytest.fixture
def environment(adapter, tmp_path, monkeypatch):
    def set_(**values):
        for name, value in {"ADAPTERS": f"mine={adapter}", "CACHE": tmp_path / "cache", "GRID": 0.25, **values}.items():
            monkeypatch.setenv(f"PEFT_HOE_VLLM_{name}", str(value))

    set_()
    return set_


def resolve(resolver, name, base="/models/toy"):
    return asyncio.run(resolver.resolve_lora(base, name))


def test_a_name_becomes_an_exact_lora(environment, vllm, as_lora, toys, ids):
    register()
    register()  # vLLM calls it several times in a process
    (resolver,) = vllm.resolvers.values()
    numbers, named = resolve(resolver, "mine@0.75,0.25"), resolve(resolver, "mine@low=0.75,high=0.25")
    assert numbers.lora_name != named.lora_name
    assert numbers.lora_path == named.lora_path
    assert numbers.lora_int_id != named.lora_int_id
    assert min(numbers.lora_int_id, named.lora_int_id) >= 1
    assert resolve(resolver, "mine@0.75,0.25") == numbers
    with torch.no_grad():
        expected = toys.make_policy()(input_ids=ids, preference=[0.75, 0.25]).logits
    torch.testing.assert_close(as_lora(numbers.lora_path, ids).float(), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    "name",
    [
        "mine",
        "mine@",
        "yours@1,0",
        "models/toy",
        "mine@0.8,0.2",  # beside the grid
        "mine@0.750,0.25",  # another spelling would be another name to remember
        "mine@high=0.25,low=0.75",
        "mine@low=1",
        "mine@1.0,0.0",
        "mine@[1,0]",
        "mine@0.75,0.5",
        "mine@nan,0",
        "mine@../../etc",
    ],
)
def test_other_names_are_none_of_ours(environment, vllm, tmp_path, name):
    resolver = make_resolver(Names(Settings.from_environment()))
    assert resolve(resolver, name) is None
    assert not (tmp_path / "cache").exists()


def test_a_near_miss_is_told_in_the_log(environment, vllm, caplog):
    resolver = make_resolver(Names(Settings.from_environment()))
    with caplog.at_level(logging.INFO, logger="peft_hoe"):
        assert resolve(resolver, "mine@0.8,0.2") is None
        assert "0.75,0.25 or low=0.75,high=0.25" in caplog.text
        resolve(resolver, "mine@1,0", base="other/base")
    assert "toy, but other/base is served" in caplog.text


def test_without_adapters_in_the_environment_nothing_happens(vllm, monkeypatch):
    monkeypatch.delenv("PEFT_HOE_VLLM_ADAPTERS", raising=False)
    register()
    assert vllm.resolvers == {}


def test_settings_are_read_and_refused_by_name(environment, adapter, tmp_path):
    environment(CACHE_BYTES="1.5G", RANK=4, ROUTERS="drop")
    assert Settings.from_environment() == Settings(
        {"mine": str(adapter)}, 0.25, tmp_path / "cache", 1_500_000_000, 4, "drop"
    )
    for name, value in {"ADAPTERS": "mine", "GRID": "fine", "CACHE_BYTES": "many", "RANK": "full"}.items():
        environment(**{name: value})
        with pytest.raises(HoEError, match=f"PEFT_HOE_VLLM_{name} is"):
            Settings.from_environment()
        environment(CACHE_BYTES="1G", RANK=4)
    environment(GRID=0.3)
    with pytest.raises(HoEError, match="1 divided by a whole number"):
        Names(Settings.from_environment())


def test_ranks_are_checked_against_the_command_line(environment, vllm, monkeypatch):
    # Two experts of rank 4 carry most points.
    assert Names(Settings.from_environment()).max_rank == 8
    eight, sixteen, most = (SimpleNamespace(max_rank=rank) for rank in (8, 16, 512))
    check_command_line(eight, ["vllm", "serve", "base", "--enable-lora", "--max-lora-rank", "8"])
    check_command_line(sixteen, ["vllm", "serve", "base", "--enable-lora"])  # vLLM's default
    check_command_line(most, ["python", "script.py"])
    monkeypatch.setattr(sys, "argv", ["vllm", "serve", "base", "--enable-lora", "--max-lora-rank=1"])
    with pytest.raises(HoEError, match=r"--max-lora-rank is 1.*--max-lora-rank 8; or set PEFT_HOE_VLLM_RANK=1"):
        register()
    environment(RANK=1)
    register()
    assert len(vllm.resolvers) == 1


def test_above_512_it_says_which_rank_fits(toys, tmp_path):
    toys.make_policy(rank_pattern={"q_proj": 300}).save_pretrained(tmp_path / "wide")
    names = Names(Settings({"wide": str(tmp_path / "wide")}, 0.25))
    with pytest.raises(HoEError, match="PEFT_HOE_VLLM_RANK=512"):
        _ = names.max_rank


def test_voting_routers_above_512_are_not_told_to_reduce_ranks_which_is_refused_for_them(toys, tmp_path):
    model = toys.make_policy(rank_pattern={"q_proj": 300})
    model.mark_trained("r0")
    model.save_pretrained(tmp_path / "wide")
    voting = Names(Settings({"wide": str(tmp_path / "wide")}, 0.25))
    with pytest.raises(HoEError, match="PEFT_HOE_VLLM_ROUTERS=drop") as refused:
        _ = voting.max_rank
    assert "RANK=512" not in str(refused.value)
    with pytest.raises(HoEError, match="leave it out, or set PEFT_HOE_VLLM_ROUTERS=drop"):
        Names(Settings({"wide": str(tmp_path / "wide")}, 0.25, rank=512))


@pytest.mark.parametrize(
    ("listed", "said"),
    [("{", "cannot be read as JSON"), ("{}", "is not the list of an atlas"), (None, "lacks .*1,0")],
)
def test_a_damaged_atlas_is_told_at_the_start(toys, tmp_path, listed, said):
    export_atlas(toys.make_policy(), 1.0, tmp_path / "atlas")
    if listed is None:
        shutil.rmtree(tmp_path / "atlas" / "1,0")
    else:
        (tmp_path / "atlas" / "atlas.json").write_text(listed)
    with pytest.raises(CheckpointError, match=said):
        Names(Settings({"mine": str(tmp_path / "atlas")}))


def test_trained_routers_can_be_dropped_or_frozen_in_an_atlas(toys, tokenizer, tmp_path, vllm):
    model = toys.make_policy()
    model.mark_trained("r0")
    model.save_pretrained(tmp_path / "hoe")
    dropped = Names(Settings({"mine": str(tmp_path / "hoe")}, 0.25, tmp_path / "cache", routers="drop"))
    assert dropped.path("mine@0.25,0.75").is_dir()
    export_atlas(model, 0.5, tmp_path / "atlas", prompts=["w1 w2"], tokenizer=tokenizer)
    resolver = make_resolver(Names(Settings({"mine": str(tmp_path / "atlas")}, 0.25, tmp_path / "unused")))
    found = resolve(resolver, "mine@low=0.5,high=0.5")
    assert Path(found.lora_path) == tmp_path / "atlas" / "0.5,0.5"
    assert resolve(resolver, "mine@0.25,0.75") is None  # the atlas has a grid of its own
    assert not (tmp_path / "unused").exists()


def test_a_module_saved_whole_that_vllm_refuses_is_told_at_the_start(toys, tmp_path):
    toys.make_policy(modules_to_save=["lm_head"]).save_pretrained(tmp_path / "hoe")
    with pytest.raises(HoEError, match=r"\['lm_head'\] whole.*\['classifier', 'score'\] alone"):
        Names(Settings({"mine": str(tmp_path / "hoe")}, 0.25))


def test_a_vllm_without_the_places_for_routers_serves_the_interpolation_with_a_warning(
    toys, tmp_path, monkeypatch, vllm
):
    model = toys.make_policy()
    model.mark_trained("r0")
    model.save_pretrained(tmp_path / "hoe")
    monkeypatch.setenv("PEFT_HOE_VLLM_ADAPTERS", f"mine={tmp_path / 'hoe'}")
    monkeypatch.setenv("PEFT_HOE_VLLM_CACHE", str(tmp_path / "cache"))
    with pytest.warns(HoEWarning, match="cannot vote inside this vLLM"):  # the stand-in has two modules
        register()
    (resolver,) = vllm.resolvers.values()
    found = resolve(resolver, "mine@0.2,0.8")
    expected = Names(Settings({"mine": str(tmp_path / "hoe")}, 0.1, tmp_path / "other", routers="drop")).path(
        "mine@0.2,0.8"
    )
    assert (Path(found.lora_path) / "adapter_model.safetensors").read_bytes() == (
        expected / "adapter_model.safetensors"
    ).read_bytes()


@pytest.mark.parametrize("line", ["--tensor-parallel-size 2", "--tensor_parallel_size=2", "-tp 2"])
def test_a_model_in_parts_is_refused_before_it_is_loaded(line):
    with pytest.raises(HoEError, match=r"tensor_parallel_size is 2.*ROUTERS=drop"):
        check_devices(["vllm", "serve", "base", *line.split()])
    check_devices(["vllm", "serve", "base", "--tensor-parallel-size", "1"])


def test_ranks_of_voting_experts_are_not_reduced(toys, tmp_path):
    model = toys.make_policy()
    model.mark_trained("r0")
    model.save_pretrained(tmp_path / "hoe")
    with pytest.raises(HoEError, match=r"RANK is 4.*ROUTERS=drop"):
        Names(Settings({"mine": str(tmp_path / "hoe")}, 0.25, tmp_path / "cache", rank=4))
