from __future__ import annotations

import json

import pytest
import torch

from peft_hoe import CheckpointError, HoEError, HoELayer
from peft_hoe.serving.gguf_lora import export_gguf, export_gguf_experts
from peft_hoe.serving.gguf_naming import GGUFNaming
from peft_hoe.serving.llama_cpp import expert_scales

gguf = pytest.importorskip("gguf")


@pytest.fixture
def base(toys, tmp_path):
    toys.make_base().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def read(path):
    """Tensors and settings of a GGUF file."""
    reader = gguf.GGUFReader(path)
    tensors = {tensor.name: torch.from_numpy(tensor.data.copy()) for tensor in reader.tensors}
    return tensors, {name: field.contents() for name, field in reader.fields.items()}


def rotary_pairs(rows, heads):
    """The definition: row 2 i + s of a head is row s * half + i of transformers' head."""
    half = rows.shape[0] // heads // 2
    order = [h * 2 * half + s * half + i for h in range(heads) for i in range(half) for s in range(2)]
    return rows[order]


def test_every_expert_has_a_file_whose_scale_is_one(steerable, base, tmp_path):
    model = steerable(interpolation="norm").float()
    files = export_gguf_experts(model, base, tmp_path / "out")
    assert [file.name for file in files] == ["00-low.gguf", "01-high.gguf", "02-centroid.gguf"]
    index = json.loads((tmp_path / "out" / "llama_cpp.json").read_text())
    assert index == {
        "objectives": ["low", "high"],
        "experts": ["low", "high", "centroid"],
        "files": [file.name for file in files],
    }
    layers = {m.module_name: m for m in model.modules() if isinstance(m, HoELayer)}
    for number, file in enumerate(files):
        tensors, settings = read(file)
        assert (settings["general.architecture"], settings["general.type"]) == ("llama", "adapter")
        assert (settings["adapter.type"], settings["adapter.lora.alpha"]) == ("lora", 4.0)
        assert len(tensors) == 2 * len(layers)
        expert = slice(4 * number, 4 * number + 4)
        for part, name, heads in (
            ("mlp.up_proj", "ffn_up", None),
            ("self_attn.q_proj", "attn_q", 4),
            ("self_attn.k_proj", "attn_k", 2),
        ):
            a, b = layers[f"model.layers.1.{part}"].factors("default")
            b = b[:, expert] if heads is None else rotary_pairs(b[:, expert], heads)
            assert torch.equal(tensors[f"blk.1.{name}.weight.lora_a"], a[expert])
            assert torch.equal(tensors[f"blk.1.{name}.weight.lora_b"], b)


def test_ranks_are_filled_up_to_one(toys, base, tmp_path):
    model = toys.make_policy(rank_pattern={"layers.0.mlp.up_proj": [1, 2, 0]})
    tensors, settings = read(export_gguf_experts(model, base, tmp_path / "out")[0])
    assert {tensor.shape[0] for name, tensor in tensors.items() if name.endswith("lora_a")} == {4}
    assert settings["adapter.lora.alpha"] == 4
    assert torch.count_nonzero(tensors["blk.0.ffn_up.weight.lora_a"].abs().sum(1)) == 1
    # The third expert has nothing here, which is a zero delta.
    tensors, _ = read(tmp_path / "out" / "02-centroid.gguf")
    assert not tensors["blk.0.ffn_up.weight.lora_b"].any()


def test_one_preference_is_exact_with_norm_too(steerable, base, tmp_path):
    model = steerable(interpolation="norm").float()
    report = export_gguf(model, [0.6, 0.4], base, tmp_path / "out")
    assert report.lost == 0
    tensors, _ = read(tmp_path / "out" / "lora.gguf")
    model.set_preference([0.6, 0.4])
    for layer in model.modules():
        if isinstance(layer, HoELayer) and layer.module_name == "model.layers.0.mlp.down_proj":
            got = tensors["blk.0.ffn_down.weight.lora_b"] @ tensors["blk.0.ffn_down.weight.lora_a"]
            torch.testing.assert_close(got, layer.get_delta_weight("default"), atol=1e-5, rtol=0)
    half = export_gguf(model, [0.6, 0.4], base, tmp_path / "half", dtype="float16")
    assert 2**-14 < half.lost < 2**-10
    assert read(tmp_path / "half" / "lora.gguf")[0]["blk.0.ffn_down.weight.lora_a"].dtype == torch.float16


def test_what_llama_cpp_cannot_take_is_named(steerable, toys, base, tmp_path):
    model = steerable()
    with pytest.raises(HoEError, match="there is no folder"):
        export_gguf_experts(model, tmp_path / "nowhere", tmp_path / "out")
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="cannot read the config"):
        export_gguf_experts(model, tmp_path / "empty", tmp_path / "out")
    (tmp_path / "gpt2").mkdir()
    (tmp_path / "gpt2" / "config.json").write_text('{"model_type": "gpt2"}')
    with pytest.raises(CheckpointError, match=r"'gpt2'.*convert_lora_to_gguf") as caught:
        export_gguf(model, [0.6, 0.4], tmp_path / "gpt2", tmp_path / "out")
    assert "llama" in caught.value.allowed
    with pytest.raises(HoEError, match="dtype is 'bfloat16'"):
        export_gguf(model, [0.6, 0.4], base, tmp_path / "out", dtype="bfloat16")
    with pytest.raises(CheckpointError, match=r"no tensor for the module 'model.vision.q_proj'"):
        GGUFNaming.of(base).tensor("model.vision.q_proj")
    assert not (tmp_path / "out").exists()


def test_embeddings_are_looked_up_and_heads_multiplied(steerable, base, tmp_path):
    model = steerable(target_embeddings=["embed_tokens", "lm_head"]).float()
    export_gguf(model, [1, 0], base, tmp_path / "one")
    model.save_pretrained(tmp_path / "hoe")
    layers = {m.module_name: m for m in model.modules() if isinstance(m, HoELayer)}
    files = export_gguf_experts(tmp_path / "hoe", base, tmp_path / "experts")
    for tensors in (read(tmp_path / "one" / "lora.gguf")[0], read(files[0])[0]):
        a, b = layers["model.embed_tokens"].factors("default")
        assert torch.equal(tensors["token_embd.weight.lora_a"], a[:4].T)  # (vocabulary, r)
        assert torch.equal(tensors["token_embd.weight.lora_b"], b[:, :4])
        a, b = layers["lm_head"].factors("default")
        assert torch.equal(tensors["output.weight.lora_a"], a[:4])
        assert torch.equal(tensors["output.weight.lora_b"], b[:, :4])
    assert expert_scales(model, [1, 0]).scales == [1, 0, 0]


def test_what_a_tied_base_has_no_place_for_is_refused(steerable, toys, tmp_path):
    """llama.cpp, tried, would multiply the output by the embeddings' LoRA as it lies, and abort."""
    toys.make_base(tied=True).save_pretrained(tmp_path / "base")
    model = steerable(tied=True, target_embeddings=["embed_tokens"])
    with pytest.raises(
        HoEError, match=r"experts of \['embed_tokens'\].*llama.cpp cannot add .* \['lm_head'\].*--merged BASE"
    ):
        export_gguf(model, [1, 0], tmp_path / "base", tmp_path / "out")
    alone = steerable(tied=True, target_embeddings=["lm_head"])
    with pytest.raises(CheckpointError, match=r"no tensor for the module 'lm_head', since its head is the embeddings"):
        export_gguf_experts(alone, tmp_path / "base", tmp_path / "out")
    assert not (tmp_path / "out").exists()
