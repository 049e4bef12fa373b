"""vLLM itself, on the CPU: names with a preference are exact LoRAs, offline and behind its OpenAI server."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest

pytest.importorskip("vllm")
openai = pytest.importorskip("openai")
from peft_hoe.serving.vllm_names import Names, Settings  # noqa: E402
from peft_hoe.serving.vllm_static import lora_id  # noqa: E402

CLOSE = 1e-4  # two likeliest tokens this near may change places by rounding
pytestmark = [pytest.mark.shared, pytest.mark.timeout(900), pytest.mark.filterwarnings("ignore")]
ENGINE = {
    "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_LOGGING_LEVEL": "INFO",
    "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1",
}  # fmt: skip
LENGTH = 24


@contextmanager
def serving(base, adapter, cache, log, *options, **environment) -> Iterator[openai.OpenAI]:
    """vLLM's API server as another process, whose engine is a third, while the block lasts."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # `vllm serve` asks for the metadata of a package called vllm, which builds for the CPU do not have.
    command = [
        sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(base), "--host", "127.0.0.1",
        "--port", str(port), "--dtype", "float32", "--enforce-eager", "--max-model-len", "128", "--enable-lora",
        "--max-lora-rank", "32", *options,
    ]  # fmt: skip
    told = {"PEFT_HOE_VLLM_ADAPTERS": f"mine={adapter}", "PEFT_HOE_VLLM_CACHE": str(cache), **environment}
    with log.open("w") as output:
        server = subprocess.Popen(
            command, env={**os.environ, **ENGINE, **told}, stdout=output, stderr=output, start_new_session=True
        )
    try:
        deadline = time.monotonic() + 400
        while True:
            assert server.poll() is None, log.read_text()[-3000:]
            assert time.monotonic() < deadline, log.read_text()[-3000:]
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).close()
                break
            except OSError:
                time.sleep(0.5)
        yield openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0, timeout=300)
    finally:
        if server.poll() is None:
            os.killpg(server.pid, signal.SIGTERM)  # the session that was started above
        server.wait(60)


def complete(client, name, prompt):
    answer = client.completions.create(
        model=name, prompt=prompt, max_tokens=LENGTH, temperature=0, extra_body={"return_token_ids": True}
    )
    return answer.choices[0].prompt_token_ids, answer.choices[0].token_ids


def test_eleven_preferences_in_one_batch_write_our_tokens(models, adapter, prompts, differs, tmp_path, monkeypatch):
    for name, value in {**ENGINE, "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "WARNING"}.items():
        monkeypatch.setenv(name, value)
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    names = Names(Settings({"mine": str(adapter)}, folder=tmp_path / "cache"))
    served = names.adapters["mine"]
    engine = LLM(
        str(models / "base"), dtype="float32", enforce_eager=True, max_model_len=128, enable_lora=True,
        max_lora_rank=names.max_rank, max_loras=11, max_cpu_loras=11,
    )  # fmt: skip
    points = served.grid.points
    spelled = [f"mine@{served.spellings(point)[0]}" for point in points]
    requests = [LoRARequest(name, lora_id(name), str(names.path(name))) for name in spelled]
    decoding = SamplingParams(temperature=0, max_tokens=LENGTH)
    gaps, texts = [], set()
    for prompt in prompts:
        for point, output in zip(points, engine.generate([prompt] * 11, decoding, lora_request=requests), strict=True):
            found = list(output.outputs[0].token_ids)
            texts.add(tuple(found))
            gaps.append(differs(output.prompt_token_ids, found, point.tolist()))
    print(
        f"{gaps.count(None)} of {len(gaps)} texts have our tokens; gaps where they differ: {[g for g in gaps if g is not None]}"
    )
    assert all(gap is None or gap < CLOSE for gap in gaps)
    assert len(texts) > len(prompts)  # preferences matter


def test_the_openai_server_resolves_names_evicts_and_reloads(models, adapter, prompts, differs, tmp_path):
    """Two preferences fit into memory at once, eleven are asked for; the API server and the engine are two processes."""
    log = tmp_path / "log"
    options = ("--max-loras", "2", "--max-cpu-loras", "2", "--enable-prefix-caching")
    with serving(models / "base", adapter, tmp_path / "cache", log, *options) as client:
        points = [[round(1 - i / 10, 1), round(i / 10, 1)] for i in range(11)]
        names = [f"mine@{a:g},{b:g}" for a, b in points]
        for turn in range(2):  # the second time every one of them has been dropped meanwhile
            with ThreadPoolExecutor(4) as pool:
                answers = list(pool.map(lambda name: complete(client, name, prompts[0]), names))
            for point, (prompt, found) in zip(points, answers, strict=True):
                gap = differs(prompt, found, point)
                assert gap is None or gap < CLOSE, (turn, point, gap)
        # The prefix cache: the same prompt at two preferences in turn never shares states.
        for point in ([1, 0], [0, 1], [1, 0], [0, 1]):
            prompt, found = complete(client, f"mine@positive={point[0]},rich={point[1]}", prompts[1])
            gap = differs(prompt, found, point)
            assert gap is None or gap < CLOSE
        for wrong in ("mine@0.75,0.25", "mine@2,0", "mine@0.70,0.3", "mine", "yours@1,0"):
            with pytest.raises(openai.NotFoundError):
                complete(client, wrong, prompts[0])
        listed = {model.id for model in client.models.list().data}
        assert set(names) <= listed
        assert "mine@0.75,0.25" not in listed
        # A second server on the same folder uses what is there, and takes nothing away.
        written = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").glob("*/*/adapter_model.safetensors")}
        assert len(written) == 11
        with serving(
            models / "base", adapter, tmp_path / "cache", tmp_path / "log2", PEFT_HOE_VLLM_CACHE_BYTES="1K"
        ) as second:
            prompt, found = complete(second, names[3], prompts[0])
            gap = differs(prompt, found, points[3])
            assert gap is None or gap < CLOSE
        assert {path: path.stat().st_mtime_ns for path in written} == written
        prompt, found = complete(client, names[5], prompts[2])
        gap = differs(prompt, found, points[5])
        assert gap is None or gap < CLOSE


def test_a_rank_that_does_not_suffice_is_told_at_the_start(models, adapter, tmp_path):
    server = serving(models / "base", adapter, tmp_path / "cache", tmp_path / "log", "--max-lora-rank", "8")
    with pytest.raises(AssertionError, match=r"--max-lora-rank is 8; start vLLM with --max-lora-rank 32"), server:
        pass
