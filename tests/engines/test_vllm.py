"""vLLM itself, on the CPU: names with a preference are exact LoRAs, offline and behind its OpenAI server."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest

from peft_hoe.serving.vllm_names import Names
from peft_hoe.serving.vllm_plugin import lora_id
from peft_hoe.serving.vllm_settings import Settings

pytestmark = [pytest.mark.shared, pytest.mark.timeout(900), pytest.mark.filterwarnings("ignore")]


@pytest.mark.parametrize(("model_name", "adapter_name"), [("model", "adapter"), ("embedded_model", "embedded")])
def test_eleven_preferences_in_one_batch_write_our_tokens(
    vllm_engines, models, model_name, adapter_name, prompts, differs, tmp_path, monkeypatch, request
):
    from vllm import SamplingParams
    from vllm.lora.request import LoRARequest

    model, adapter = request.getfixturevalue(model_name), request.getfixturevalue(adapter_name)
    names = Names(Settings({"mine": str(adapter)}, folder=tmp_path / "cache"))
    served = names.adapters["mine"]
    engine = vllm_engines.start_engine(
        monkeypatch, models / "base", max_lora_rank=names.max_rank, max_loras=11, max_cpu_loras=11
    )
    points = served.grid.points
    spelled = [f"mine@{served.spellings(point)[0]}" for point in points]
    requests = [LoRARequest(name, lora_id(name), str(names.path(name))) for name in spelled]
    decoding = SamplingParams(temperature=0, max_tokens=vllm_engines.LENGTH)
    gaps, texts = [], set()
    for prompt in prompts:
        for point, output in zip(points, engine.generate([prompt] * 11, decoding, lora_request=requests), strict=True):
            found = list(output.outputs[0].token_ids)
            texts.add(tuple(found))
            gaps.append(differs(model, output.prompt_token_ids, found, point.tolist()))
    print(
        f"{gaps.count(None)} of {len(gaps)} texts have our tokens; gaps where they differ: {[g for g in gaps if g is not None]}"
    )
    assert all(gap is None or gap < vllm_engines.CLOSE for gap in gaps)
    assert len(texts) > len(prompts)  # preferences matter


def test_the_openai_server_resolves_names_evicts_and_reloads(
    vllm_engines, models, model, adapter, prompts, differs, tmp_path
):
    """Two preferences fit into memory at once, eleven are asked for; the API server and the engine are two processes."""
    log = tmp_path / "log"
    options = ("--max-lora-rank", "32", "--max-loras", "2", "--max-cpu-loras", "2", "--enable-prefix-caching")
    with vllm_engines.serving(models / "base", adapter, tmp_path / "cache", log, *options) as client:
        points = [[round(1 - i / 10, 1), round(i / 10, 1)] for i in range(11)]
        names = [f"mine@{a:g},{b:g}" for a, b in points]
        for turn in range(2):  # the second time every one of them has been dropped meanwhile
            with ThreadPoolExecutor(4) as pool:
                answers = list(pool.map(lambda name: vllm_engines.complete(client, name, prompts[0]), names))
            for point, (prompt, found) in zip(points, answers, strict=True):
                gap = differs(model, prompt, found, point)
                assert gap is None or gap < vllm_engines.CLOSE, (turn, point, gap)
        # The prefix cache: the same prompt at two preferences in turn never shares states.
        for point in ([1, 0], [0, 1], [1, 0], [0, 1]):
            prompt, found = vllm_engines.complete(client, f"mine@positive={point[0]},rich={point[1]}", prompts[1])
            gap = differs(model, prompt, found, point)
            assert gap is None or gap < vllm_engines.CLOSE
        for wrong in ("mine@0.75,0.25", "mine@2,0", "mine@0.70,0.3", "mine", "yours@1,0"):
            with pytest.raises(vllm_engines.openai.NotFoundError):
                vllm_engines.complete(client, wrong, prompts[0])
        listed = {model.id for model in client.models.list().data}
        assert set(names) <= listed
        assert "mine@0.75,0.25" not in listed
        # A second server on the same folder uses what is there, and takes nothing away.
        written = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").glob("*/*/adapter_model.safetensors")}
        assert len(written) == 11
        with vllm_engines.serving(
            models / "base",
            adapter,
            tmp_path / "cache",
            tmp_path / "log2",
            "--max-lora-rank",
            "32",
            PEFT_HOE_VLLM_CACHE_BYTES="1K",
        ) as second:
            prompt, found = vllm_engines.complete(second, names[3], prompts[0])
            gap = differs(model, prompt, found, points[3])
            assert gap is None or gap < vllm_engines.CLOSE
        assert {path: path.stat().st_mtime_ns for path in written} == written
        prompt, found = vllm_engines.complete(client, names[5], prompts[2])
        gap = differs(model, prompt, found, points[5])
        assert gap is None or gap < vllm_engines.CLOSE


def test_a_rank_that_does_not_suffice_is_told_at_the_start(vllm_engines, models, adapter, tmp_path):
    server = vllm_engines.serving(
        models / "base", adapter, tmp_path / "cache", tmp_path / "log", "--max-lora-rank", "8"
    )
    with pytest.raises(AssertionError, match=r"--max-lora-rank is 8; start vLLM with --max-lora-rank 32"), server:
        pass
