from __future__ import annotations

import pytest
import torch
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    MixtralConfig,
    MixtralForCausalLM,
    T5Config,
)

from peft_hoe import CheckpointError
from peft_hoe.experts.architecture import read_architecture

SMALL = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16, "vocab_size": 32}


def test_all_linear_is_every_linear_layer_but_the_output_embedding(llama):
    architecture = read_architecture(llama)
    names = {target.name.removeprefix("model.layers.0.") for target in architecture.targets}
    attention = {f"self_attn.{part}_proj" for part in "qkvo"}
    assert names == attention | {"mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"}
    assert architecture.task_type == "CAUSAL_LM"
    down = next(target for target in architecture.targets if target.name.endswith("down_proj"))
    assert (down.d_in, down.d_out, down.transposed, down.shape) == (24, 16, False, (16, 24))


def test_conv1d_is_stored_transposed(gpt2):
    targets = {target.name: target for target in read_architecture(gpt2).targets}
    assert set(targets) == {
        f"transformer.h.0.{part}" for part in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    }
    attention = targets["transformer.h.0.attn.c_attn"]
    assert (attention.d_in, attention.d_out, attention.transposed, attention.shape) == (16, 48, True, (16, 48))


@pytest.mark.parametrize(
    ("wanted", "excluded", "expected"),
    [
        (["q_proj", "v_proj"], None, ["q_proj", "v_proj"]),
        (r".*\.(gate|up)_proj", None, ["gate_proj", "up_proj"]),
        ("all-linear", r".*self_attn.*", ["gate_proj", "up_proj", "down_proj"]),
        (["lm_head"], None, ["lm_head"]),
    ],
)
def test_targets_as_in_peft(llama, wanted, excluded, expected):
    targets = read_architecture(llama, target_modules=wanted, exclude_modules=excluded).targets
    assert [target.name.split(".")[-1] for target in targets] == expected


def test_targets_that_are_missing_or_not_linear_are_named(llama):
    with pytest.raises(
        CheckpointError, match=r"target_modules=\['query'\] .* selects no linear layer of LlamaForCausalLM"
    ):
        read_architecture(llama, target_modules=["query"])
    with pytest.raises(
        CheckpointError, match=r"'model.embed_tokens' is a Embedding; experts live in nn.Linear and Conv1D"
    ):
        read_architecture(llama, target_modules=["embed_tokens"])
    with pytest.raises(CheckpointError, match="task_type is 'CHAT'; allowed are"):
        read_architecture(llama, task_type="CHAT")


def test_tied_weights_are_found_where_the_file_has_one_of_them(llama):
    names = read_architecture(llama).names
    assert names.locate(["model.embed_tokens.weight"])["lm_head.weight"] == "model.embed_tokens.weight"
    assert names.locate(["lm_head.weight"])["model.embed_tokens.weight"] == "lm_head.weight"


def test_names_with_and_without_the_prefix(gpt2):
    names = read_architecture(gpt2).names
    weight = "transformer.h.0.attn.c_attn.weight"
    assert names.locate([weight])[weight] == weight
    assert names.locate(["h.0.attn.c_attn.weight"])[weight] == "h.0.attn.c_attn.weight"
    assert names.locate(["h.0.attn.masked_bias"]) == {"h.0.attn.masked_bias": "h.0.attn.masked_bias"}


def test_encoder_decoders_and_classifiers(tmp_path):
    config = T5Config(d_model=8, num_layers=1, num_heads=2, d_kv=4, d_ff=16, vocab_size=32)
    config.architectures = ["T5ForConditionalGeneration"]
    config.save_pretrained(tmp_path / "t5")
    assert read_architecture(tmp_path / "t5").task_type == "SEQ_2_SEQ_LM"
    model = BertForSequenceClassification(BertConfig(**SMALL, num_labels=3))
    model.save_pretrained(tmp_path / "bert")
    architecture = read_architecture(tmp_path / "bert")
    assert architecture.task_type == "SEQ_CLS"
    assert "classifier" not in {target.name for target in architecture.targets}


def test_fused_experts_are_recognised_and_out_of_scope(tmp_path):
    torch.manual_seed(0)
    config = MixtralConfig(**SMALL, num_key_value_heads=2, num_local_experts=2)
    MixtralForCausalLM(config).save_pretrained(tmp_path)
    architecture = read_architecture(tmp_path)
    scope = {target.name.split(".")[-1] for target in architecture.targets}
    if "w1" in scope:
        pytest.skip("transformers 4 keeps one linear layer for each expert")
    assert scope == {"q_proj", "k_proj", "v_proj", "o_proj"}
    assert architecture.kind("model.layers.0.mlp.experts.down_proj") == "fused experts"
    assert architecture.kind("model.layers.0.block_sparse_moe.experts.1.w2.weight") == "fused experts"
