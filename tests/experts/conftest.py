"""Tiny checkpoints, made when a test needs them, and a stand-in for the Hub on the loopback interface."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Callable, Iterator, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from peft_hoe import ExpertSpec
from peft_hoe.experts import Merging
from peft_hoe.experts.architecture import read_architecture
from peft_hoe.experts.merging import METHODS
from peft_hoe.experts.model_weights import ModelWeights

Change = Callable[[str, torch.Tensor], torch.Tensor]


def tiny_llama(**settings: Any) -> LlamaForCausalLM:
    """One layer, width 16, 2 heads."""
    shape: dict[str, Any] = {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "vocab_size": 32,
        "initializer_range": 0.2,
        "tie_word_embeddings": True,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    return LlamaForCausalLM(LlamaConfig(**{**shape, **settings})).eval()


def tiny_gpt2() -> GPT2LMHeadModel:
    """One layer, width 16; its linear layers are Conv1D."""
    config = GPT2Config(
        n_embd=16,
        n_layer=1,
        n_head=2,
        vocab_size=32,
        n_positions=32,
        initializer_range=0.2,
        bos_token_id=1,
        eos_token_id=2,
    )
    return GPT2LMHeadModel(config).eval()


def rewrite(source: Path, target: Path, change: Change) -> Path:
    """A copy of a checkpoint with every tensor changed."""
    target.mkdir(parents=True)
    (target / "config.json").write_text((source / "config.json").read_text())
    tensors = {name: change(name, tensor) for name, tensor in load_file(source / "model.safetensors").items()}
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return target


def noisy(seed: int, scale: float = 0.1) -> Change:
    """A change that a fine-tune could have made: noise on every tensor."""
    generator = torch.Generator().manual_seed(seed)
    return lambda _, tensor: tensor + scale * torch.randn(tensor.shape, generator=generator)


def adapter_tensors(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def adapter_config(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "adapter_config.json").read_text())


def expert_delta(folder: Path, module: str, index: int) -> torch.Tensor:
    """B_j A_j of one expert, `(d_out, d_in)`."""
    config, tensors = adapter_config(folder), adapter_tensors(folder)
    ranks = config["rank_pattern"].get(module, [expert["r"] for expert in config["experts"]])
    start = sum(ranks[:index])
    stem = f"base_model.model.{module}"
    columns = slice(start, start + ranks[index])
    return tensors[f"{stem}.hoe_B.weight"][:, columns] @ tensors[f"{stem}.hoe_A.weight"][columns]


@pytest.fixture
def tiny() -> SimpleNamespace:
    """The functions of this module; test modules cannot import it."""
    return SimpleNamespace(
        llama=tiny_llama,
        gpt2=tiny_gpt2,
        rewrite=rewrite,
        noisy=noisy,
        tensors=adapter_tensors,
        tensors_of=lambda folder: load_file(folder / "model.safetensors"),
        config=adapter_config,
        delta=expert_delta,
    )


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    """A base."""
    torch.manual_seed(0)
    tiny_llama().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture
def policies(llama: Path, tmp_path: Path) -> dict[str, Path]:
    """Two fine-tunes of it."""
    return {
        "kind": rewrite(llama, tmp_path / "kind", noisy(1)),
        "brief": rewrite(llama, tmp_path / "brief", noisy(2)),
    }


@pytest.fixture
def everything(tmp_path: Path) -> SimpleNamespace:
    """All that a build takes at once: merges by every method, policies of single experts of both kinds, whatever is captured.

    `base` (with a head of its own), `policies`, and the `settings` of a build.
    """
    torch.manual_seed(0)
    base = tmp_path / "all-base"
    tiny_llama(tie_word_embeddings=False).save_pretrained(base)
    common = rewrite(
        base, tmp_path / "all-common", noisy(4)
    )  # what the policies share, without which model_stock makes nothing
    model = get_peft_model(
        LlamaForCausalLM.from_pretrained(base), LoraConfig(r=3, target_modules="all-linear", init_lora_weights=False)
    )
    model.save_pretrained(tmp_path / "all-lora")
    own = {"full": rewrite(base, tmp_path / "all-full", noisy(3)), "lora": tmp_path / "all-lora"}
    names = [*METHODS, *own]
    points = [(i / (len(names) + 1), 1 - i / (len(names) + 1)) for i in range(1, len(names) + 1)]
    experts = [ExpertSpec(point, name=name, policy=own.get(name)) for name, point in zip(names, points, strict=True)]
    return SimpleNamespace(
        base=base,
        policies={name: rewrite(common, tmp_path / f"all-{name}", noisy(seed)) for seed, name in enumerate("ab", 1)},
        settings={
            "experts": experts, "merging": Merging(experts={name: Merging(name) for name in METHODS}),
            "capture": ["embeddings", "norms"], "progress": False,
        },
    )  # fmt: skip


@pytest.fixture
def gpt2(tmp_path: Path) -> Path:
    """A base with Conv1D layers."""
    torch.manual_seed(0)
    tiny_gpt2().save_pretrained(tmp_path / "gpt2")
    return tmp_path / "gpt2"


@pytest.fixture
def opened(llama: Path, tmp_path: Path, tiny: SimpleNamespace) -> tuple[Any, Any, Any]:
    """Base, architecture and a function that opens a changed copy as a policy."""
    architecture = read_architecture(llama)

    def change(change: Change, name: str = "changed") -> ModelWeights:
        return ModelWeights(tiny.rewrite(llama, tmp_path / name, change), f"policy {name!r}", architecture)

    return ModelWeights(llama, "the base", architecture), architecture, change


COMMIT = "0" * 39 + "1"


class HubServer:
    """Serves folders as repositories until `close`.

    Args:
        folders: `{id: folder}`.

    Attributes:
        address: of the server.
        sent: `(id, file)` of every file that was sent whole.
        before: called with id and file before a file is sent.
        parts: whether parts of files are sent to who asks for them.
    """

    def __init__(self, folders: Mapping[str, Path]) -> None:
        self.sent: list[tuple[str, str]] = []
        self.parts = True
        self.before: Callable[[str, str], None] = lambda *_: None
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *_):
                pass

            def answer(self, content: bytes, headers: dict[str, str] | None = None):
                part = (
                    re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
                    if headers and outer.parts
                    else None
                )
                self.send_response(206 if part else 200)
                if part:
                    content = content[int(part[1]) : int(part[2] or len(content)) + 1]
                for name, value in {"Content-Length": str(len(content)), **(headers or {})}.items():
                    self.send_header(name, value)
                self.end_headers()
                if self.command == "GET":
                    self.wfile.write(content)

            def do_GET(self):
                parts = self.path.split("?")[0].strip("/").split("/")
                listing = parts[:2] == ["api", "models"]
                repository = "/".join(parts[2:4] if listing else parts[:2])
                folder = folders.get(repository)
                if folder is None:
                    self.send_error(404)
                elif listing:
                    names = sorted(path.name for path in folder.iterdir())
                    files = [{"rfilename": name} for name in names]
                    tree = [
                        {"type": "file", "path": name, "size": (folder / name).stat().st_size, "oid": "1"}
                        for name in names
                    ]
                    content = tree if "tree" in parts else {"id": "x", "sha": COMMIT, "siblings": files}
                    self.answer(json.dumps(content).encode(), {"Content-Type": "application/json"})
                elif not (folder / parts[-1]).is_file():
                    self.send_response(404)
                    self.send_header("X-Error-Code", "EntryNotFound")
                    self.send_header("Content-Length", "0")
                    self.end_headers()
                else:
                    if self.command == "GET":
                        outer.before(repository, parts[-1])
                    content = (folder / parts[-1]).read_bytes()
                    etag = f'"{hashlib.sha256(content).hexdigest()}"'
                    self.answer(content, {"ETag": etag, "X-Repo-Commit": COMMIT})
                    if self.command == "GET" and "Range" not in self.headers:
                        outer.sent.append((repository, parts[-1]))

            do_HEAD = do_GET

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        self.address = f"http://127.0.0.1:{self._server.server_address[1]}"

    def close(self) -> None:
        """Stop."""
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def stand_in_hub() -> Iterator[Callable[[Mapping[str, Path]], HubServer]]:
    """A function that serves folders as repositories."""
    servers: list[HubServer] = []

    def serve(folders: Mapping[str, Path]) -> HubServer:
        servers.append(HubServer(folders))
        return servers[-1]

    yield serve
    for server in servers:
        server.close()
