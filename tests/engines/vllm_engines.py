"""vLLM in this process, and as a server, on the CPU in float32."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import openai
import pytest

from server_process import started

CLOSE = 1e-4  # two likeliest tokens this near may change places by rounding
LENGTH = 24
ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_LOGGING_LEVEL": "INFO",
    "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1",
}  # fmt: skip


def start_engine(monkeypatch: pytest.MonkeyPatch, base: Path, **options: Any) -> Any:
    """An engine in this process."""
    here = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "WARNING"}
    for name, value in {**ENVIRONMENT, **here}.items():
        monkeypatch.setenv(name, value)
    from vllm import LLM

    return LLM(str(base), dtype="float32", enforce_eager=True, max_model_len=128, enable_lora=True, **options)


@contextmanager
def serving(base: Path, adapter: Path, cache: Path, log: Path, *options: str, **environment: str) -> Iterator[Any]:
    """vLLM's API server as another process, whose engine is a third, while the block lasts; gives a client."""
    # `vllm serve` asks for the metadata of a package called vllm, which builds for the CPU do not have.
    command = [
        sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(base), "--host", "127.0.0.1",
        "--dtype", "float32", "--enforce-eager", "--max-model-len", "128", "--enable-lora", *options,
    ]  # fmt: skip
    told = {"PEFT_HOE_VLLM_ADAPTERS": f"mine={adapter}", "PEFT_HOE_VLLM_CACHE": str(cache), **environment}
    with started(command, log, seconds=400, environment={**ENVIRONMENT, **told}) as address:
        yield openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0, timeout=300)


def complete(client: Any, name: str, prompt: str) -> tuple[list[int], list[int]]:
    """Tokens of prompt and greedy text."""
    answer = client.completions.create(
        model=name, prompt=prompt, max_tokens=LENGTH, temperature=0, extra_body={"return_token_ids": True}
    )
    return answer.choices[0].prompt_token_ids, answer.choices[0].token_ids
