"""Base and policies by Hub id, from a stand-in server on the loopback interface."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

COMMIT = "0" * 39 + "1"
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
def hub(llama, policies, tmp_path):
    """Address of a server with the repositories us/base, us/kind and us/brief, and us/adapter once it is built."""
    folders = {
        "us/base": llama,
        **{f"us/{name}": path for name, path in policies.items()},
        "us/adapter": tmp_path / "out",
    }

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_):
            pass

        def answer(self, content: bytes, headers: dict[str, str] | None = None):
            self.send_response(200)
            for name, value in {"Content-Length": str(len(content)), **(headers or {})}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(content)

        def do_GET(self):
            parts = self.path.split("?")[0].strip("/").split("/")
            listing = parts[:2] == ["api", "models"]
            folder = folders.get("/".join(parts[2:4] if listing else parts[:2]))
            if folder is None:
                self.send_error(404)
            elif listing:
                names = sorted(path.name for path in folder.iterdir())
                files = [{"rfilename": name} for name in names]
                tree = [
                    {"type": "file", "path": name, "size": (folder / name).stat().st_size, "oid": "1"} for name in names
                ]
                content = tree if "tree" in parts else {"id": "x", "sha": COMMIT, "siblings": files}
                self.answer(json.dumps(content).encode(), {"Content-Type": "application/json"})
            elif not (folder / parts[-1]).is_file():
                self.send_response(404)
                self.send_header("X-Error-Code", "EntryNotFound")
                self.send_header("Content-Length", "0")
                self.end_headers()
            else:
                content = (folder / parts[-1]).read_bytes()
                self.answer(content, {"ETag": f'"{hashlib.sha256(content).hexdigest()}"', "X-Repo-Commit": COMMIT})

        do_HEAD = do_GET

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()


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
