"""`peft-hoe build`: every option reaches the builder, errors are one line."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from peft_hoe import HoEWarning
from peft_hoe.cli import main


@pytest.fixture
def models(tmp_path):
    """A base and two policies."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, vocab_size=32,
        bos_token_id=1, eos_token_id=2, initializer_range=0.2,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(tmp_path / "base")
    for name in ("kind", "brief"):
        (tmp_path / name).mkdir()
        tensors = load_file(tmp_path / "base" / "model.safetensors")
        save_file(
            {key: t + 0.1 * torch.randn(t.shape) for key, t in tensors.items()}, tmp_path / name / "model.safetensors"
        )
    return tmp_path


def arguments(models, *more):
    policies = [part for name in ("kind", "brief") for part in ("--policy", f"{name}={models / name}")]
    return ["build", str(models / "base"), *policies, "--output", str(models / "out"), *more]


def test_options_reach_the_builder(models, capsys):
    options = (
        "--expert 0.5,0.5 --expert kind=0.2,brief=0.8 --router 0.25,0.75 --rank 3 --prune none --prune-scope module "
        "--merge ties --merge-option density=0.5 --rescale 1.5 --interpolation linear --capture norms --svd exact "
        "--expert-merge e3=dare,density=0.3 --svd-tolerance 1e-3 --seed 7 --dtype bfloat16 "
        "--target-modules q_proj,v_proj --default-preference 0.9,0.1"
    )
    assert main(arguments(models, *options.split())) == 0
    report = json.loads((models / "out" / "build_report.json").read_text())
    assert report["options"] == {
        "r": {"rank": 3, "energy": None, "maximum": 128, "modules": {}},
        "pruning": {"share": 0.0, "scope": "module"},
        "merging": {
            "method": "ties", "options": {"density": 0.5},
            "experts": {"e3": {"method": "dare", "options": {"density": 0.3}, "experts": {}}},
        },
        "svd": {"solver": "exact", "tolerance": 0.001}, "rescale": 1.5, "interpolation": "linear", "capture": ["norms"],
        "seed": 7,
        "dtype": "bfloat16", "device": "cpu",
    }  # fmt: skip
    assert [expert["preference"] for expert in report["experts"]] == [[1, 0], [0, 1], [0.5, 0.5], [0.2, 0.8]]
    assert [router["preference"] for router in report["routers"]] == [[0.25, 0.75]]
    assert {module.split(".")[-1] for module in report["modules"]} == {"q_proj", "v_proj"}
    config = json.loads((models / "out" / "adapter_config.json").read_text())
    assert config["default_preference"] == [0.9, 0.1]
    assert config["interpolation"] == "linear"
    assert "2 modules, 4 experts, 1 routers" in capsys.readouterr().out


def test_objectives_with_commas_and_blanks_are_named_on_the_command_line(models):
    names = ("kind, but brief", "to the point")
    paths = zip(names, ("kind", "brief"), strict=True)
    policies = [part for name, path in paths for part in ("--policy", f" {name} ={models / path}")]
    preference = "kind, but brief=0.2, to the point=0.8"
    more = ["--expert", preference, "--router", preference, "--default-preference", preference, "--quiet"]
    assert main(["build", str(models / "base"), *policies, "--output", str(models / "out"), *more]) == 0
    config = json.loads((models / "out" / "adapter_config.json").read_text())
    assert config["objectives"] == list(names)
    assert [expert["preference"] for expert in config["experts"]] == [[1, 0], [0, 1], [0.2, 0.8]]
    assert config["routers"][0]["preference"] == config["default_preference"] == [0.2, 0.8]


def test_an_expert_of_a_policy_of_its_own(models):
    """`--expert PREFERENCE=PATH`: no merge, but that policy, here the one that stands at [0, 1] too."""
    own = ["--expert", f"0.5,0.5={models / 'brief'}", "--rank", "2", "--prune", "none"]
    with pytest.warns(HoEWarning, match="'brief' and 'centroid' changed the base in exactly the same way"):
        assert main(arguments(models, "--quiet", *own)) == 0
    tensors = load_file(models / "out" / "adapter_model.safetensors")
    for name, a in tensors.items():
        if "hoe_A" in name:
            b = tensors[name.replace("hoe_A", "hoe_B")]
            kind, brief, expert = (b[:, rows] @ a[rows] for rows in (slice(0, 2), slice(2, 4), slice(4, 6)))
            torch.testing.assert_close(expert, brief)
            assert not torch.allclose(expert, kind)


def test_defaults_print_a_table_and_how_to_add_a_router(models, capsys):
    assert main(arguments(models)) == 0
    shown = capsys.readouterr().out
    assert "kind x brief: cosine" in shown
    assert "no routers; add one with routers=[[0.75, 0.25]] (--router 0.75,0.25) and train it" in shown


@pytest.mark.parametrize(
    ("given", "names"),
    [("q_proj", {"q_proj"}), ("q_proj,v_proj", {"q_proj", "v_proj"}), (r".*\.[kv]_proj", {"k_proj", "v_proj"})],
)
def test_modules_by_one_name_by_several_or_by_an_expression(models, given, names):
    # One name alone was taken for an expression that the whole name of a module must match, and matched none.
    assert main(arguments(models, "--quiet", "--rank", "2", "--target-modules", given)) == 0
    config = json.loads((models / "out" / "adapter_config.json").read_text())
    assert {module.split(".")[-1] for module in config["target_modules"]} == names


def test_quiet_prints_nothing(models, capsys):
    assert main(arguments(models, "--quiet")) == 0
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "building" not in captured.err


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--merge", "slerp"], "merge method is 'slerp'; use one of"),
        (["--prune", "most"], "the share to prune is 'most'; allowed are"),
        (["--rank", "many"], "r is 'many'; allowed are"),
        (["--expert", "0.9,0.9"], "sums to 1.8"),
        (["--policy", "rich"], "--policy is 'rich'; write OBJECTIVE=PATH"),
        (["--policy", "kind=x"], "--policy names 'kind' twice"),
        (["--policy", "rich=/nowhere"], "'/nowhere' is not a directory"),
    ],
)
def test_errors_are_one_line(models, capsys, more, message):
    assert main(arguments(models, "--quiet", *more)) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert lines[-1].startswith("peft-hoe build: ")
    assert message in lines[-1]
    assert not (models / "out").exists()


def test_an_existing_adapter_needs_overwrite(models, capsys):
    assert main(arguments(models, "--quiet")) == 0
    assert main(arguments(models, "--quiet")) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert main(arguments(models, "--quiet", "--overwrite", "--rank", "2")) == 0
