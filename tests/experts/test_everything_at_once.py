"""Every merge, policies of single experts, and captured embeddings, heads and norms: all of it in one build."""

from __future__ import annotations

import json
import signal
import subprocess
import sys

import pytest
import torch

from peft_hoe import ExpertSpec, HoEConfig
from peft_hoe.experts import Merging, add_expert, build_adapter, inspect_adapter, plan_build
from peft_hoe.experts.journal import Journal
from peft_hoe.experts.merging import METHODS, check_merge, merge
from peft_hoe.experts.module_builder import ModuleBuilder, _seed
from peft_hoe.experts.weight_writer import WeightWriter

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")
MODULES = ("model.layers.0.mlp.up_proj", "model.embed_tokens", "lm_head")
KILLED = """
import json, os, pickle, signal, sys
from peft_hoe.experts import build_adapter
from peft_hoe.experts.journal import Journal
given, output, calls = pickle.loads(bytes.fromhex(sys.argv[1])), sys.argv[2], int(sys.argv[3])
real, made = Journal.add, []
def add(journal, record):
    made.append(1)
    if len(made) > calls:
        os.kill(os.getpid(), signal.SIGKILL)
    return real(journal, record)
Journal.add = add
build_adapter(given["base"], given["policies"], output, **given["settings"], r=3)
"""


def contents(folder):
    """The files, the report without the place where it lies."""
    found = {path.name: path.read_bytes() for path in folder.iterdir()}
    report = json.loads(found["build_report.json"])
    report.pop("output_dir")
    return {**found, "build_report.json": json.dumps(report).encode()}


def built(everything, output, **settings):
    return build_adapter(everything.base, everything.policies, output, **{**everything.settings, "r": 3, **settings})


def test_each_expert_is_what_its_method_makes_of_the_task_vectors(everything, tmp_path, tiny):
    built(everything, tmp_path / "out", r="full", pruning=None, svd="exact", rescale=None)
    base, a, b, own = (tiny.tensors_of(path) for path in (
        everything.base, *everything.policies.values(), tmp_path / "all-full",
    ))  # fmt: skip
    names = HoEConfig.from_pretrained(tmp_path / "out").expert_names
    for module in MODULES:
        turn = (lambda tensor: tensor.T) if "embed" in module else (lambda tensor: tensor)
        taus = [turn(policy[f"{module}.weight"] - base[f"{module}.weight"]) for policy in (a, b)]
        wanted = {"a": taus[0], "b": taus[1], "full": turn(own[f"{module}.weight"] - base[f"{module}.weight"])}
        for spec in everything.settings["experts"][: len(METHODS)]:
            seeds = [_seed(0, module, name) for name in everything.policies]
            wanted[spec.name] = merge(taus, spec.preference, spec.name, check_merge(spec.name, None), seeds)
        for name, delta in wanted.items():
            found = tiny.delta(tmp_path / "out", module, names.index(name))
            torch.testing.assert_close(
                found, delta, atol=2e-5, rtol=1e-4, msg=lambda text, at=(module, name): f"{at}: {text}"
            )
    norms = tiny.tensors(tmp_path / "out")["base_model.model.model.norm.hoe_norm.weight"]
    taus = [policy["model.norm.weight"] - base["model.norm.weight"] for policy in (a, b, own)]
    for spec in everything.settings["experts"][: len(METHODS)]:
        first, second = spec.preference
        torch.testing.assert_close(norms[names.index(spec.name)], first * taus[0] + second * taus[1])
    torch.testing.assert_close(norms[names.index("full")], taus[2])
    assert not norms[names.index("lora")].any()


def test_the_time_is_that_of_what_is_merged_and_decomposed(everything, monkeypatch):
    merged, decomposed = [], []
    monkeypatch.setattr("peft_hoe.experts.plan_times._SIDE", 64)
    monkeypatch.setattr(
        "peft_hoe.experts.plan_times.merge",
        lambda deltas, weights, method, options: merged.append((method, len(deltas))),
    )
    monkeypatch.setattr("peft_hoe.experts.plan_times._svd_seconds", lambda *given: decomposed.extend(given[2]) or 1.0)
    given = {key: value for key, value in everything.settings.items() if key != "progress"}
    plan_build(everything.base, everything.policies, **given, r=3)
    sums = {name for name in METHODS if METHODS[name].sums}  # nearly nothing beside the reading
    assert set(merged) == {(name, 2) for name in METHODS.keys() - sums}
    assert decomposed == [3] * (2 + len(METHODS) + 1)  # ranks; a LoRA policy is taken as it is


def test_the_plan_and_what_is_shown_count_all_of_it(everything, tmp_path, tiny, monkeypatch):
    monkeypatch.setattr("peft_hoe.experts.plan_times._SIDE", 64)  # what is timed
    given = {key: value for key, value in everything.settings.items() if key != "progress"}
    plan = plan_build(everything.base, everything.policies, **given, r=3, interpolation="linear")
    report = built(everything, tmp_path / "out", interpolation="linear")
    assert plan.experts == [{key: expert[key] for key in ("name", "preference", "r")} for expert in report.experts]
    of_lora = 2 * 3 * (32 + 16)  # which the plan takes to hold embeddings and a head too
    numbers = sum(tensor.numel() for tensor in tiny.tensors(tmp_path / "out").values())
    assert plan.adapter_bytes == 4 * (numbers + of_lora)
    assert {"merging", "SVD"} <= plan.parts.keys()
    shown = inspect_adapter(tmp_path / "out").text()
    assert all(f" {spec.name} " in shown for spec in everything.settings["experts"])


@pytest.mark.parametrize("method", ["ties", "dare"])
def test_it_grows_by_what_a_build_would_have_made(everything, tmp_path, tiny, method):
    everything.settings["merging"] = Merging(method)
    built(everything, tmp_path / "out")
    own = tiny.rewrite(everything.base, tmp_path / "all-own", tiny.noisy(8))
    new = [ExpertSpec([0.25, 0.75], name="new"), ExpertSpec([0.75, 0.25], name="own", policy=own)]
    add_expert(tmp_path / "out", new[0], tmp_path / "one")
    add_expert(tmp_path / "one", new[1], tmp_path / "two")
    everything.settings["experts"] += new
    built(everything, tmp_path / "whole")
    grown, whole = (tiny.tensors(tmp_path / name) for name in ("two", "whole"))
    assert grown.keys() == whole.keys()
    assert all(torch.equal(tensor, whole[name]) for name, tensor in grown.items() if ".hoe_length." not in name)
    for name, tensor in grown.items():
        torch.testing.assert_close(tensor, whole[name])


@pytest.mark.parametrize(
    "stop",
    [(Journal, "save_measurement", 0), (ModuleBuilder, "build", 3), (WeightWriter, "add", 20), (WeightWriter, "finish", 0)],
    ids=["measuring", "making", "writing", "finishing"],
)  # fmt: skip
def test_a_build_that_was_stopped_goes_on_and_gives_the_same_bytes(everything, tmp_path, monkeypatch, stop):
    built(everything, tmp_path / "whole")
    owner, method, calls = stop
    real, made = getattr(owner, method), []

    def interrupt(*arguments, **options):
        made.append(1)
        if len(made) > calls:
            raise KeyboardInterrupt
        return real(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(owner, method, interrupt)
        with pytest.raises(KeyboardInterrupt):
            built(everything, tmp_path / "out")
    built(everything, tmp_path / "out")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="there is no SIGKILL")
def test_a_killed_build_goes_on_in_several_processes_and_gives_the_same_bytes(everything, tmp_path):
    import pickle

    built(everything, tmp_path / "whole")
    given = pickle.dumps(vars(everything)).hex()
    killed = subprocess.run(
        [sys.executable, "-c", KILLED, given, str(tmp_path / "out"), "4"], capture_output=True, check=False
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    built(everything, tmp_path / "out", num_processes=2)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]
