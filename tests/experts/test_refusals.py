"""What build_adapter refuses: settings, and policies that are damaged or of another architecture."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file

from peft_hoe import CheckpointError, ExpertError, PreferenceError
from peft_hoe.experts import build_adapter

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")
QUIET = {"progress": False}
UP = "model.layers.0.mlp.up_proj"


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"merging": "slerp"}, ExpertError, "merge method is 'slerp'"),
        ({"pruning": 1.0}, ExpertError, "the share to prune is 1.0; allowed are a number"),
        ({"pruning": "most"}, ExpertError, "the share to prune is 'most'"),
        ({"rescale": "length"}, ExpertError, "rescale is 'length'"),
        ({"svd": "fast"}, ExpertError, "svd is 'fast'"),
        ({"r": 0}, ExpertError, "r is 0; allowed are"),
        ({"dtype": "int8"}, ExpertError, "dtype is 'int8'; allowed are"),
        ({"policies": {}}, ExpertError, "policies is empty"),
        ({"experts": [[0.5, 0.2, 0.3]]}, PreferenceError, "has 3 numbers, but there are 2 objectives"),
        ({"experts": [[0.5, 0.5], [0.501, 0.499]]}, ExpertError, "apart"),
        ({"routers": [[0.9, 0.9]]}, PreferenceError, "router 0: .* sums to 1.8"),
    ],
)
def test_bad_settings_are_named_and_leave_nothing(llama, policies, tmp_path, settings, error, message):
    arguments = {"policies": policies, **settings}
    before = sorted(tmp_path.iterdir())
    with pytest.raises(error, match=message):
        build_adapter(llama, output_dir=tmp_path / "out", **arguments, **QUIET)
    assert sorted(tmp_path.iterdir()) == before


def drop_tensor(folder):
    tensors = load_file(folder / "model.safetensors")
    del tensors[f"{UP}.weight"]
    save_file(tensors, folder / "model.safetensors")


def truncate(folder):
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[: len(content) // 2])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (drop_tensor, r"policy 'kind' has no tensor for 'model.layers.0.mlp.up_proj.weight' of shape \(24, 16\)"),
        (truncate, "policy 'kind': .*model.safetensors is not a readable"),
        (lambda folder: (folder / "config.json").write_text("{"), "config.json cannot be read as JSON"),
        (
            lambda folder: (folder / "config.json").write_text('{"model_type": "opt"}'),
            "is a 'opt', but the base is a 'llama'",
        ),
    ],
)
def test_damaged_policies_are_named(llama, policies, tmp_path, damage, message):
    damage(policies["kind"])
    with pytest.raises(CheckpointError, match=message):
        build_adapter(llama, policies, tmp_path / "out", **QUIET)
    assert not (tmp_path / "out").exists()


def test_a_policy_of_another_architecture_names_tensor_and_shapes(llama, gpt2, tmp_path, tiny):
    with pytest.raises(CheckpointError, match=r"no tensor for .*q_proj.weight' of shape \(16, 16\) .* says 'gpt2'.*\("):
        build_adapter(llama, {"kind": gpt2}, tmp_path / "out", **QUIET)
    torch.manual_seed(0)
    tiny.llama(hidden_size=32).save_pretrained(tmp_path / "wide")
    with pytest.raises(CheckpointError, match=r"shape \(32, 32\), but .* of shape \(16, 16\)"):
        build_adapter(llama, {"kind": tmp_path / "wide"}, tmp_path / "out", **QUIET)
