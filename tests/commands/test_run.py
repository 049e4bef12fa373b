"""`peft-hoe run` registers HoE in programs that know nothing of it."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from peft import get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from peft_hoe import HoEConfig
from peft_hoe.cli import main

LOADER = """
import subprocess, sys
from peft import PeftModel
from transformers import AutoModelForCausalLM
model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(sys.argv[1]), sys.argv[2])
print("default", dict(model.preference))
"""


@pytest.fixture
def run(monkeypatch):
    """Runs the program that `peft-hoe run` would become; a process of its own for the command would only cost time."""
    done = []

    def become(program, arguments, environment):
        done.append(subprocess.run(arguments, env=environment, capture_output=True, text=True, check=False))

    def command(*arguments):
        main(["run", *map(str, arguments)])
        return done.pop()

    monkeypatch.setattr(os, "execvpe", become)
    return command


@pytest.fixture
def adapter(tmp_path):
    torch.manual_seed(0)
    base = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=16, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,
            num_key_value_heads=2, max_position_embeddings=16,
        )
    )  # fmt: skip
    base.save_pretrained(tmp_path / "base")
    model = get_peft_model(
        base, HoEConfig(objectives=["a", "b"], r=1, target_modules=["q_proj"], task_type="CAUSAL_LM")
    )
    model.save_pretrained(tmp_path / "adapter")
    script = tmp_path / "load.py"
    script.write_text(LOADER)
    return script, tmp_path / "base", tmp_path / "adapter"


@pytest.mark.slow
def test_without_us_peft_does_not_know_hoe(adapter):
    plain = subprocess.run([sys.executable, *map(str, adapter)], capture_output=True, text=True, check=False)
    assert plain.returncode != 0
    assert "KeyError: 'HOE'" in plain.stderr


@pytest.mark.slow
def test_a_program_loads_hoe_adapters(run, adapter):
    done = run("--", "python", *adapter)
    assert done.returncode == 0, done.stderr
    assert "default {'a': 0.5, 'b': 0.5}" in done.stdout


@pytest.mark.slow
def test_a_preference_for_the_whole_program(run, adapter):
    done = run("--preference", "a=0.7,b=0.3", "--", *adapter)
    assert "default {'a': 0.7, 'b': 0.3}" in done.stdout, done.stderr


@pytest.mark.slow
def test_processes_that_the_program_starts_have_it_too(run, adapter, tmp_path):
    parent = tmp_path / "parent.py"
    parent.write_text("import subprocess, sys\nsys.exit(subprocess.call([sys.executable, *sys.argv[1:]]))\n")
    done = run("--preference", "0.2,0.8", "--", "python", parent, *adapter)
    assert "default {'a': 0.2, 'b': 0.8}" in done.stdout, done.stderr


@pytest.mark.slow
def test_a_hidden_sitecustomize_still_runs_and_the_programs_status_is_ours(tmp_path):
    (tmp_path / "sitecustomize.py").write_text("print('mine')")
    command = [
        sys.executable,
        "-m",
        "peft_hoe.cli",
        "run",
        "--",
        "python",
        "-c",
        "print('program'); raise SystemExit(7)",
    ]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["mine", "mine", "program"]  # once for peft-hoe itself, once for the program
    assert done.returncode == 7


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "--"], "no command"),
        (["run", "--", "no-such-program-anywhere"], "cannot find"),
        (["run", "--preference", "", "--", "python"], "cannot read the preference ''"),
        (["run", "--preference", "much", "--", "python"], "cannot read the preference"),
    ],
)
def test_mistakes_are_one_line(arguments, message, capsys):
    assert main(arguments) == 2
    assert message in capsys.readouterr().err


@pytest.mark.slow
def test_looking_for_peft_without_importing_it_does_not_end_the_watch(run):
    """transformers' command line asks whether peft is there long before it is imported."""
    program = (
        "import importlib.util, sys; importlib.util.find_spec('peft'); importlib.util.find_spec('peft'); import peft; "
        "print('peft_hoe' in sys.modules)"
    )
    assert run("--", "python", "-c", program).stdout.strip() == "True"
