from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from peft_hoe import CheckpointError, HoEError, StaticMergeError
from peft_hoe.serving.dense import export_merged


def test_a_dense_checkpoint_computes_what_the_adapter_does(steerable, toys, tokenizer, ids, tmp_path):
    model = steerable(interpolation="norm")
    toys.make_base().double().save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    report = export_merged(model, [0.6, 0.4], tmp_path / "base", tmp_path / "dense")
    assert report.output == str(tmp_path / "dense")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(
            loaded(input_ids=ids).logits, model(input_ids=ids, preference=[0.6, 0.4]).logits, atol=1e-11, rtol=0
        )
    assert AutoTokenizer.from_pretrained(tmp_path / "dense").get_vocab() == tokenizer.get_vocab()
    assert not list((tmp_path / "dense").glob("adapter*"))


def test_a_missing_base_and_a_full_folder_are_named(steerable, toys, tmp_path):
    model = steerable()
    with pytest.raises(HoEError, match="there is no folder"):
        export_merged(model, [0.6, 0.4], tmp_path / "nowhere", tmp_path / "dense")
    assert not (tmp_path / "dense").exists()
    toys.make_base().save_pretrained(tmp_path / "base")
    with pytest.raises(CheckpointError, match="not empty"):
        export_merged(model, [0.6, 0.4], tmp_path / "base", tmp_path / "base")


def test_a_base_without_tokenizer_is_merged_and_said(steerable, toys, tmp_path):
    toys.make_base().save_pretrained(tmp_path / "base")
    report = export_merged(steerable(), [1, 0], tmp_path / "base", tmp_path / "dense")
    assert any("tokenizer was not copied" in note for note in report.notes)


def test_a_quantised_base_is_refused_whether_or_not_what_quantised_it_is_installed(steerable, toys, tmp_path):
    """Without the package transformers raises an ImportError that asks for it, though the base would be refused with it."""
    base = toys.make_base()
    base.config.quantization_config = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    base.save_pretrained(tmp_path / "base")
    (tmp_path / "base" / "model.safetensors").write_bytes(b"")  # it is not read, or cannot be
    with pytest.raises(StaticMergeError, match="is quantised"):
        export_merged(steerable(), [0.6, 0.4], tmp_path / "base", tmp_path / "dense")
    assert not (tmp_path / "dense").exists()


def test_damaged_weights_of_a_base_are_one_error(steerable, toys, tmp_path):
    toys.make_base().save_pretrained(tmp_path / "base")
    (tmp_path / "base" / "model.safetensors").write_bytes(b"short")
    with pytest.raises(HoEError, match="cannot load the base"):
        export_merged(steerable(), [0.6, 0.4], tmp_path / "base", tmp_path / "dense")
