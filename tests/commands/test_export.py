from __future__ import annotations

import json

import pytest
import torch
from peft import PeftModel

from peft_hoe.cli import main


@pytest.fixture
def adapter(toys, tmp_path):
    """Directories of a base and of an adapter with a trained router."""
    model = toys.make_policy()
    model.mark_trained("r0")
    toys.save_with_base(model, tmp_path)
    return tmp_path


def test_one_preference(adapter, toys, capsys):
    where = adapter / "lora"
    assert main(["export", str(adapter / "hoe"), "--preference", "low=0.6,high=0.4", "--output", str(where)]) == 0
    said = capsys.readouterr().out
    assert "low 0.6, high 0.4" in said
    assert "exact" in said
    ids = torch.tensor([[1, 5, 9, 20]])
    model = PeftModel.from_pretrained(toys.make_base(), adapter / "hoe")
    with torch.no_grad():
        expected = model(input_ids=ids, preference=[0.6, 0.4]).logits
        got = PeftModel.from_pretrained(toys.make_base(), where)(input_ids=ids).logits
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=0)


def test_a_trained_router_asks_for_prompts_and_takes_them(adapter, capsys):
    command = ["export", str(adapter / "hoe"), "--preference", "0.25,0.75", "--output", str(adapter / "lora")]
    assert main(command) == 2
    assert "--prompts FILE" in capsys.readouterr().err
    (adapter / "prompts.txt").write_text("w1 w2\nw3 w4 w5\n")
    assert main([*command, "--prompts", str(adapter / "prompts.txt")]) == 0
    said = capsys.readouterr().out
    assert "r0: mean votes of each module over 2 prompts" in said
    assert "KL to the routed model" in said
    assert main([*command, "--routers", "drop", "--overwrite"]) == 0
    assert "left out" in capsys.readouterr().out


def test_a_grid_and_a_dense_checkpoint(adapter, capsys):
    command = ["export", str(adapter / "hoe"), "--output", str(adapter / "out"), "--routers", "drop"]
    assert main([*command, "--grid", "0.5", "--dry-run"]) == 0
    assert "3 LoRAs" in capsys.readouterr().out
    assert main([*command, "--grid", "0.5"]) == 0
    assert sorted(json.loads((adapter / "out" / "atlas.json").read_text())["adapters"]) == ["0,1", "0.5,0.5", "1,0"]
    command[3] = str(adapter / "dense")
    assert main([*command, "--preference", "1,0", "--merged", str(adapter / "base")]) == 0
    assert (adapter / "dense" / "model.safetensors").is_file()


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--preference", "1,0", "--dry-run"], "--dry-run cannot be used here"),
        (["--grid", "0.5", "--merged", "base"], "--merged cannot be used here"),
        (["--preference", "1,0", "--merged", "base", "--even"], "--even cannot be used here"),
        (["--preference", "1,0", "--base", "base"], "nothing of it would be read"),
        (["--preference", "1,0", "--merged", "base", "--base", "base"], "--base cannot be used here"),
        (["--grid", "0.5", "--format", "gguf"], "--grid cannot be used here"),
        (["--experts"], "--experts cannot be used here"),
        (["--experts", "--format", "gguf", "--rank", "2"], "--rank cannot be used here"),
        (["--experts", "--format", "gguf", "--routers", "drop"], "--routers cannot be used here"),
        (["--grid", "0.0000001", "--dry-run"], "at most 20000 are possible"),
        (["--preference", "1,0", "--merged", "./nothere"], "there is no folder './nothere' for the base"),
        (["--preference", "1,0", "--format", "gguf", "--base", "./nothere"], "there is no folder './nothere'"),
        (["--preference", ""], "cannot read the preference ''"),
        (["--grid", "0.5", "--overwrite"], "--overwrite cannot be used here"),
        (["--preference", "one"], "cannot read the preference 'one'"),
    ],
)
def test_options_without_use_are_refused(adapter, capsys, options, reason):
    assert main(["export", str(adapter / "hoe"), "--output", str(adapter / "out"), *options]) == 2
    assert reason in capsys.readouterr().err


def test_a_full_folder_is_no_reason_to_name_an_option_that_is_refused(adapter, capsys):
    """Only a single LoRA replaces another, so that --overwrite would be the next refusal."""
    options = ["export", str(adapter / "hoe"), "--routers", "drop", "--output", str(adapter / "base")]
    for what in (
        ["--grid", "0.5"],
        ["--preference", "1,0", "--merged", str(adapter / "base")],
        ["--preference", "1,0", "--format", "gguf"],
        ["--experts", "--format", "gguf"],
    ):
        given = options if "--experts" not in what else [*options[:2], *options[4:]]
        assert main([*given, *what]) == 2
        said = capsys.readouterr().err
        assert "is not empty; give a new or an empty one" in said
        assert "--overwrite" not in said


def test_files_for_llama_cpp(adapter, capsys):
    pytest.importorskip("gguf")
    command = ["export", str(adapter / "hoe"), "--format", "gguf", "--output"]
    assert main([*command, str(adapter / "files"), "--experts"]) == 0  # the adapter names its base
    said = capsys.readouterr().out
    assert said.startswith("llama-server --model BASE.gguf --cache-ram 0")
    assert said.count("--lora ") == 3
    assert (
        main([*command, str(adapter / "one"), "--preference", "1,0", "--base", str(adapter / "base"), "--rank", "2"])
        == 0
    )
    assert "rank 2" in capsys.readouterr().out
    assert (adapter / "one" / "lora.gguf").is_file()


def test_experts_of_embeddings_and_norms_need_the_base(toys, tmp_path, capsys):
    toys.make_base().save_pretrained(tmp_path / "base")
    model = toys.make_policy(target_embeddings=["embed_tokens"], target_norms=["norm"])
    model.save_pretrained(tmp_path / "hoe")
    command = ["export", str(tmp_path / "hoe"), "--preference", "0.6,0.4", "--output", str(tmp_path / "lora")]
    assert main(command) == 2
    assert "names no base model; give it as base= (--base)" in capsys.readouterr().err
    assert main([*command, "--base", str(tmp_path / "base")]) == 0
    assert "15 modules and 1 norm," in capsys.readouterr().out
    assert (
        main([*command[:2], "--grid", "0.5", *command[4:5], str(tmp_path / "atlas"), "--base", str(tmp_path / "base")])
        == 0
    )
    ids = torch.tensor([[1, 5, 9, 20]])
    with torch.no_grad():
        expected = model(input_ids=ids, preference=[0.5, 0.5]).logits
        lora = PeftModel.from_pretrained(toys.make_base(), tmp_path / "atlas" / "0.5,0.5")
        torch.testing.assert_close(lora(input_ids=ids).logits, expected, atol=1e-4, rtol=0)
