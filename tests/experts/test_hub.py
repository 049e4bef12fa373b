"""Base and policies by Hub id, from a stand-in server on the loopback interface."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

BUILD = """
from peft_hoe.experts import build_adapter
report = build_adapter("us/base", {"kind": "us/kind", "brief": "us/brief@main"}, "out", r=2, progress=False)
print(report.base, len(report.modules))
"""
LOAD = """
import peft_hoe, torch
from peft import AutoPeftModelForCausalLM, PeftModel
from transformers import AutoModelForCausalLM
tokens = torch.tensor([[1, 2, 3]])
by_id = AutoPeftModelForCausalLM.from_pretrained("us/adapter")
again = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("us/base"), "us/adapter", revision="main")
local = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("us/base"), "out")
tensors = [model.state_dict() for model in (by_id, again, local)]
same = all(torch.equal(found[name], tensor) for found in tensors for name, tensor in tensors[2].items())
print(dict(by_id.preference), same and torch.isfinite(again(tokens, preference=[0.3, 0.7]).logits).all().item())
"""


@pytest.fixture
def hub(llama, policies, tmp_path, stand_in_hub):
    """Address of a server with the repositories us/base, us/kind and us/brief, and us/adapter once it is built."""
    folders = {
        "us/base": llama,
        **{f"us/{name}": path for name, path in policies.items()},
        "us/adapter": tmp_path / "out",
    }
    return stand_in_hub(folders).address


@pytest.fixture
def run(hub, tmp_path):
    environment = {
        **os.environ, "HF_ENDPOINT": hub, "HF_HOME": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_XET": "1", "NO_PROXY": "127.0.0.1",
    }  # fmt: skip

    def program(code: str) -> str:
        done = subprocess.run(
            [sys.executable, "-c", code],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    return program


LIE = """
import json, time
from peft import PeftModel
from transformers import AutoModelForCausalLM
import peft_hoe
config = json.load(open("out/adapter_config.json"))
for expert in config["experts"]:
    expert["r"] = 400
json.dump(config | {"fingerprint": None}, open("out/adapter_config.json", "w"))
base = AutoModelForCausalLM.from_pretrained("us/base")
names = [name for name, _ in base.named_modules()]
try:
    PeftModel.from_pretrained(base, "us/adapter")
except peft_hoe.CheckpointError as error:
    print(error.path, error.tensor.rpartition(".")[0].rpartition(".")[2], "along axis 0" in str(error))
print(names == [name for name, _ in base.named_modules()])
"""


@pytest.mark.slow
def test_a_configuration_that_contradicts_the_header_is_refused_before_the_file_is_here(run, tmp_path):
    """Nothing of it is made or downloaded, but for the first bytes."""
    assert run(BUILD + LIE).splitlines()[1:] == ["us/adapter/adapter_model.safetensors hoe_A True", "True"]
    kept = [path.name for path in (tmp_path / "cache").rglob("*us--adapter*/**/*") if path.is_file()]
    assert "adapter_config.json" in kept
    assert "adapter_model.safetensors" not in kept


@pytest.mark.slow
def test_policies_and_adapters_by_id(run, tmp_path):
    assert run(BUILD + LOAD).splitlines() == ["us/base 7", "{'kind': 0.5, 'brief': 0.5} True"]
    written = json.loads((Path(tmp_path) / "out" / "adapter_config.json").read_text())
    assert written["base_model_name_or_path"] == "us/base"
