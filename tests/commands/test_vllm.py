from __future__ import annotations

import sys

import pytest

from peft_hoe.cli import main

pytest.importorskip("fcntl")


def test_the_line_has_all_that_the_server_needs(toys, tmp_path, capsys):
    toys.make_policy().save_pretrained(tmp_path / "hoe")
    command = ["vllm", f"mine={tmp_path / 'hoe'}", "--base", "a base", "--grid", "0.25", "--cache", str(tmp_path / "c")]
    assert main(command) == 0
    said = capsys.readouterr().out
    assert "VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 \\\n" in said
    assert f"PEFT_HOE_VLLM_ADAPTERS=mine={tmp_path / 'hoe'} \\\n" in said
    assert "vllm serve 'a base' --enable-lora --max-lora-rank 8 --max-loras 8 --max-cpu-loras 8\n" in said
    assert "mine@0.5,0.5 or mine@low=0.5,high=0.5" in said
    assert "ROUTERS" not in said
    assert main([*command, "--rank", "1"]) == 0
    assert "--max-lora-rank 1 " in capsys.readouterr().out


def test_trained_routers_vote_inside_vllm_unless_they_are_taken_out(toys, tmp_path, capsys):
    model = toys.make_policy()
    model.mark_trained("r0")
    model.save_pretrained(tmp_path / "hoe")
    command = ["vllm", f"mine={tmp_path / 'hoe'}", "--base", "base", "--cache", str(tmp_path / "cache")]
    assert main(command) == 0
    assert "trained routers vote inside vLLM" in capsys.readouterr().out
    assert main([*command, "--routers", "drop"]) == 0
    said = capsys.readouterr().out
    assert "PEFT_HOE_VLLM_ROUTERS=drop" in said
    assert "vote inside" not in said


def test_what_cannot_be_served_is_one_line(toys, tmp_path, capsys):
    toys.make_policy().save_pretrained(tmp_path / "hoe")
    assert main(["vllm", f"mine={tmp_path / 'hoe'}"]) == 2
    assert "does not name its base" in capsys.readouterr().err
    assert main(["vllm", "mine"]) == 2
    assert "name=directory" in capsys.readouterr().err
    assert main(["vllm", f"mine={tmp_path / 'hoe'}", "--routers", "none"]) == 2
    assert "ROUTERS" in capsys.readouterr().err
    assert main(["vllm", f"mine={tmp_path / 'hoe'}", "--base", "base", "--max-loras", "0"]) == 2
    assert "--max-loras is 0" in capsys.readouterr().err
    assert main(["vllm", f"mine={tmp_path}", "--base", "base"]) == 2
    assert "there is no adapter_config.json; give the directory or Hub id of a HoE adapter" in capsys.readouterr().err


def test_the_check_says_what_is_missing_where_there_is_no_vllm(monkeypatch, capsys):
    for name in [name for name in sys.modules if name.partition(".")[0] == "vllm"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "vllm", None)
    assert main(["vllm-check"]) == 1
    said = capsys.readouterr().out
    assert "does not fit: vLLM is not there" in said
    assert "get the interpolation of the LoRA experts" in said
