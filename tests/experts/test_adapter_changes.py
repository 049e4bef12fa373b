"""Saved adapters gain and lose experts, routers and objectives; what stays is the same bit by bit, also after an error."""

from __future__ import annotations

import json
import re
import warnings

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from peft_hoe import CheckpointError, ExpertError, ExpertSpec, HoEConfig, HoEWarning, RouterSpec
from peft_hoe.cli import main
from peft_hoe.experts import add_expert, add_objective, add_router, build_adapter, remove, weight_writer
from peft_hoe.experts.journal import Journal
from peft_hoe.experts.module_work import ModuleWork
from peft_hoe.experts.new_expert import WeightsOnDisk

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")
UP = "model.layers.0.mlp.up_proj"
TOKENS = torch.arange(3, 23).reshape(2, 10)
SETTINGS = {"r": 4, "seed": 3, "progress": False}


@pytest.fixture
def third(llama, tmp_path, tiny):
    return tiny.rewrite(llama, tmp_path / "third", tiny.noisy(3))


@pytest.fixture
def adapter(llama, policies, tmp_path):
    build_adapter(llama, policies, tmp_path / "adapter", routers=[[0.25, 0.75]], capture=["norms"], **SETTINGS)
    return tmp_path / "adapter"


def bytes_of(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def logits(base, adapter, preference):
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter).eval()
    with torch.no_grad():
        return model(TOKENS, preference=preference).logits


def same_experts(tiny, before, after, names):
    """Whether experts are the same bit by bit in two adapters."""
    configs = [tiny.config(folder) for folder in (before, after)]
    for module in {
        key.split(".hoe_")[0].removeprefix("base_model.model.") for key in tiny.tensors(before) if "hoe_A" in key
    }:
        for name in names:
            places = [[spec["name"] for spec in config["experts"]].index(name) for config in configs]
            first, second = (
                tiny.delta(folder, module, place) for folder, place in zip((before, after), places, strict=True)
            )
            assert torch.equal(first, second)


def test_an_objective_with_its_policy(llama, policies, third, adapter, tmp_path, tiny):
    config = add_objective(adapter, "third", third, tmp_path / "grown")
    assert config.objectives == ["kind", "brief", "third"]
    same_experts(tiny, adapter, tmp_path / "grown", ["kind", "brief", "centroid"])
    build_adapter(llama, {"third": third}, tmp_path / "alone", capture=["norms"], **SETTINGS)
    assert torch.equal(tiny.delta(tmp_path / "grown", UP, 3), tiny.delta(tmp_path / "alone", UP, 0))
    norms = [
        tiny.tensors(tmp_path / name)["base_model.model.model.norm.hoe_norm.weight"] for name in ("grown", "alone")
    ]
    assert torch.equal(norms[0][3], norms[1][0])
    for point in ([1, 0], [0.25, 0.75], [0.4, 0.6]):
        torch.testing.assert_close(
            logits(llama, tmp_path / "grown", [*point, 0]), logits(llama, adapter, point), atol=1e-6, rtol=0
        )
    torch.testing.assert_close(
        logits(llama, tmp_path / "grown", [0, 0, 1]), logits(llama, tmp_path / "alone", [1]), atol=1e-5, rtol=0
    )
    report = json.loads((tmp_path / "grown" / "build_report.json").read_text())
    assert report["policies"]["third"]["source"] == str(third)
    assert [expert["name"] for expert in report["experts"]] == ["kind", "brief", "centroid", "third"]
    assert report["modules"][UP]["third"]["rank"] == 4
    assert "kind, brief, third" in (tmp_path / "grown" / "README.md").read_text().replace("**", "").replace("`", "")


def test_a_merged_expert_is_the_one_that_a_build_would_make(llama, policies, adapter, tmp_path, tiny):
    add_expert(adapter, [0.75, 0.25], tmp_path / "grown")
    build_adapter(
        llama, policies, tmp_path / "built", experts=[[0.5, 0.5], [0.75, 0.25]], capture=["norms"], **SETTINGS
    )
    assert torch.equal(tiny.delta(tmp_path / "grown", UP, 3), tiny.delta(tmp_path / "built", UP, 3))
    same_experts(tiny, adapter, tmp_path / "grown", ["kind", "brief", "centroid"])
    assert HoEConfig.from_pretrained(tmp_path / "grown").routers[0].votes_for == ["brief", "centroid"]


def test_the_weights_that_are_added_are_read_as_they_are_written(adapter, tmp_path, monkeypatch):
    # All of them were in memory: of a 70B some gigabytes.
    seen, read, write = [], WeightsOnDisk.__getitem__, weight_writer.WeightWriter.add
    monkeypatch.setattr(WeightsOnDisk, "__getitem__", lambda own, module: seen.append(module) or read(own, module))
    monkeypatch.setattr(
        weight_writer.WeightWriter, "add", lambda own, name, tensor: seen.append(name) or write(own, name, tensor)
    )
    add_expert(adapter, [0.75, 0.25], tmp_path / "out")
    current, written = None, set()
    for event in seen:  # a module that is read, or a tensor that is written
        if not event.startswith("base_model.model."):
            current = event
        elif current is not None:  # the expert alone is complete
            assert event.startswith(f"base_model.model.{current}.")
            written.add(current)
    assert len(written) == 7 + 3


def test_an_expert_of_a_policy(llama, third, adapter, tmp_path, tiny):
    spec = ExpertSpec([0.75, 0.25], name="mixed", r=2, policy=third)
    assert add_expert(adapter, spec, tmp_path / "grown").experts[3].r == 2
    assert tiny.config(tmp_path / "grown")["experts"][3]["name"] == "mixed"
    report = json.loads((tmp_path / "grown" / "build_report.json").read_text())
    assert report["experts"][3]["policy"] == str(third)


def test_a_policy_that_the_adapter_has_already_is_told(policies, third, adapter, tmp_path, tiny):
    """As a build tells it: two objectives with one expert cannot be steered between."""
    copy = tiny.rewrite(policies["kind"], tmp_path / "copy", lambda _, tensor: tensor)
    text = "expert 'again' has exactly the weights of expert 'kind'; is one model given under two names?"
    with pytest.warns(HoEWarning, match=re.escape(text)):
        add_objective(adapter, "again", copy, tmp_path / "grown")
    assert text in json.loads((tmp_path / "grown" / "build_report.json").read_text())["notes"]
    with pytest.warns(HoEWarning, match="expert 'mixed' has exactly the weights of expert 'kind'"):
        add_expert(adapter, ExpertSpec([0.75, 0.25], name="mixed", policy=copy), tmp_path / "mixed")
    with warnings.catch_warnings():
        warnings.simplefilter("error", HoEWarning)
        add_objective(adapter, "third", third, tmp_path / "other")


def test_routers_come_and_go(llama, adapter, tmp_path, tiny):
    add_router(adapter, RouterSpec([0.75, 0.25], name="new", votes_for="all"), tmp_path / "more")
    same_experts(tiny, adapter, tmp_path / "more", ["kind", "brief", "centroid"])
    config = remove(tmp_path / "more", tmp_path / "less", routers=["new"])
    assert config.router_names == ["r0"]
    before, after = (load_file(folder / "adapter_model.safetensors") for folder in (adapter, tmp_path / "less"))
    assert before.keys() == after.keys()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())


def test_experts_go_with_the_routers_that_vote_for_them(adapter, tmp_path, tiny):
    config = remove(adapter, tmp_path / "less", experts=["centroid"], routers=["r0"])
    assert (config.expert_names, config.router_names) == (["kind", "brief"], [])
    same_experts(tiny, tmp_path / "less", adapter, ["kind", "brief"])


def test_in_its_own_place(llama, adapter, tmp_path, tiny):
    (adapter / "notes.txt").write_text("mine")
    before = logits(llama, adapter, [0.3, 0.7])
    with pytest.raises(CheckpointError, match="is not empty; give another path, or pass overwrite=True"):
        add_router(adapter, [0.75, 0.25], adapter)
    add_router(adapter, [0.75, 0.25], adapter, overwrite=True)
    assert HoEConfig.from_pretrained(adapter).router_names == ["r0", "r1"]
    assert (adapter / "notes.txt").read_text() == "mine"
    torch.testing.assert_close(logits(llama, adapter, [0.3, 0.7]), before, atol=1e-6, rtol=0)


def refusals(adapter, third, out):
    return [
        (lambda: add_objective(adapter, "kind", third, out), r"\['kind'\] are used twice"),
        (lambda: add_objective(adapter, "third", "./nowhere", out), "nowhere' is not a directory"),
        (lambda: add_objective(adapter, "third", third, out, expert=[0, 1]), "preference"),
        (
            lambda: add_objective(adapter, "third", third, out, expert=ExpertSpec([0, 0, 1], policy=third)),
            "give one of them",
        ),
        (lambda: add_expert(adapter, ExpertSpec([0.7, 0.3], policy=""), out), "the place of a model is ''"),
        (
            lambda: add_expert(adapter, ExpertSpec([0.7, 0.3], name="kind", policy=third), out),
            r"\['kind'\] are used twice",
        ),
        (lambda: add_expert(adapter, [0.7, 0.7], out), "sums to 1.4"),
        (lambda: add_expert(adapter, [0.501, 0.499], out), "apart; keep one"),
        (lambda: add_expert(adapter, ExpertSpec([0.7, 0.3], policy=third), out, base="./nowhere"), "nowhere"),
        (lambda: add_router(adapter, [0.25, 0.75], out), "apart; keep one"),
        (lambda: remove(adapter, out), "nothing is to be removed; name experts or routers"),
        (lambda: remove(adapter, out, experts=["centroid"]), r"the routers \['r0'\] vote for it"),
        (lambda: remove(adapter, out, routers=["r7"]), r"no router 'r7'; the routers are \['r0'\]"),
        (lambda: add_router(third, [0.7, 0.3], out), "adapter_config.json"),
    ]


def test_what_is_refused_leaves_nothing_and_changes_nothing(adapter, third, tmp_path):
    before = bytes_of(adapter)
    for refused, message in refusals(adapter, third, tmp_path / "out"):
        with pytest.raises((CheckpointError, ExpertError, ValueError), match=message):
            refused()
        assert not (tmp_path / "out").exists()
    assert bytes_of(adapter) == before
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_a_full_disk_leaves_the_adapter_as_it_was(adapter, tmp_path, monkeypatch):
    before = bytes_of(adapter)

    def full(self):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(weight_writer.WeightWriter, "finish", full)
    with pytest.raises(CheckpointError, match="No space left"):
        add_router(adapter, [0.75, 0.25], adapter, overwrite=True)
    assert bytes_of(adapter) == before


@pytest.mark.parametrize(
    ("owner", "method", "calls", "left"),
    [(Journal, "save_measurement", 0, 7), (Journal, "add", 3, 4), (HoEConfig, "save_pretrained", 1, 7)],
    ids=["measuring", "making", "putting together"],
)
@pytest.mark.parametrize("place", ["new", "its own"])
def test_an_addition_that_was_interrupted_goes_on(adapter, tmp_path, monkeypatch, owner, method, calls, left, place):
    add_expert(adapter, [0.75, 0.25], tmp_path / "whole")
    before = bytes_of(adapter)
    output = adapter if place == "its own" else tmp_path / "out"
    real, called, make, made = getattr(owner, method), [], ModuleWork.make, []

    def interrupt(*arguments, **options):
        called.append(1)
        if len(called) > calls:
            raise KeyboardInterrupt
        return real(*arguments, **options)

    def add(preference=(0.75, 0.25)):
        add_expert(adapter, preference, output, overwrite=True)

    with monkeypatch.context() as patch:
        patch.setattr(owner, method, interrupt)
        with pytest.raises(KeyboardInterrupt):
            add()
    assert bytes_of_files(adapter) == before
    assert len(hidden(tmp_path) + hidden(adapter)) == 1
    monkeypatch.setattr(ModuleWork, "make", lambda work, index, *rest: made.append(index) or make(work, index, *rest))
    add()
    assert len(made) == left
    for name, content in bytes_of_files(tmp_path / "whole").items():
        assert (output / name).read_bytes() == content or name == "build_report.json", name
    assert hidden(tmp_path) + hidden(adapter) == []


def test_what_an_interrupted_addition_left_is_removed_by_another(adapter, tmp_path, monkeypatch):
    # It lay in the system's folder for temporary files, and stayed there.
    def interrupt(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Journal, "add", interrupt)
        with pytest.raises(KeyboardInterrupt):
            add_expert(adapter, [0.75, 0.25], tmp_path / "out")
    (left,) = hidden(tmp_path)
    assert list((tmp_path / left / "state").glob(".peft_hoe-*/state/measurement.pt"))
    add_router(adapter, [0.75, 0.25], tmp_path / "out")
    assert hidden(tmp_path) == []
    assert HoEConfig.from_pretrained(tmp_path / "out").router_names == ["r0", "r1"]


def bytes_of_files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def hidden(folder):
    return [path.name for path in folder.iterdir() if path.name.startswith(".peft_hoe-")]


def test_without_a_report_only_policies_of_their_own(adapter, third, tmp_path):
    (adapter / "build_report.json").unlink()
    with pytest.raises(CheckpointError, match=r"no build report that names the policies of \['kind', 'brief'\].*=PATH"):
        add_expert(adapter, [0.75, 0.25], tmp_path / "out")
    add_expert(adapter, ExpertSpec([0.75, 0.25], policy=third), tmp_path / "out")
    assert not (tmp_path / "out" / "build_report.json").exists()


def test_on_the_command_line(llama, third, adapter, tmp_path, capsys):
    out = [str(tmp_path / name) for name in "abcde"]
    assert main(["add-objective", str(adapter), "--policy", f"third={third}", "--output", out[0]]) == 0
    assert (
        main(["add-expert", out[0], "--expert", "0.25,0.25,0.5", "--name", "e", "--rank", "2", "--output", out[1]]) == 0
    )
    assert main(["add-expert", out[1], "--expert", f"0.2,0,0.8={third}", "--rank", "2", "--output", out[2]]) == 0
    assert main(["add-router", out[2], "--router", "0.3,0.3,0.4", "--votes-for", "all", "--output", out[3]]) == 0
    capsys.readouterr()
    assert main(["remove", out[3], "--expert", "e", "--router", "r1", "--output", out[4]]) == 0
    assert capsys.readouterr().out.splitlines()[0] == f"{out[4]}: objectives kind, brief, third"
    config = HoEConfig.from_pretrained(out[4])
    assert (config.expert_names, config.router_names) == (["kind", "brief", "centroid", "third", "e5"], ["r0"])
    assert main(["remove", out[4], "--router", "r0", "--output", out[4]]) == 2
    assert "is not empty" in capsys.readouterr().err
