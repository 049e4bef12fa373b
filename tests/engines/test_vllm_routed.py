"""Trained routers vote inside vLLM: the same tokens as ours, whatever else is in the batch."""

from __future__ import annotations

import pytest
import torch

from peft_hoe.serving.lora import export_lora
from peft_hoe.serving.vllm_names import Names
from peft_hoe.serving.vllm_plugin import lora_id, register
from peft_hoe.serving.vllm_settings import Settings

pytestmark = [pytest.mark.shared, pytest.mark.timeout(900), pytest.mark.filterwarnings("ignore")]


@pytest.fixture
def routed(vllm_engines, trained, tmp_path, monkeypatch):
    """Requests of `mine@...` for an engine in this process, whose plugin gets its environment here."""
    monkeypatch.setenv("PEFT_HOE_VLLM_ADAPTERS", f"mine={trained}")
    monkeypatch.setenv("PEFT_HOE_VLLM_CACHE", str(tmp_path / "cache"))
    names = Names(Settings.from_environment())
    assert names.layout is not None
    register()  # as vLLM does, but for the first engine of a process alone
    return names


def requests(names):
    from vllm.lora.request import LoRARequest

    served = names.adapters["mine"]
    spelled = [f"mine@{served.spellings(point)[0]}" for point in served.grid.points]
    return [LoRARequest(name, lora_id(name), str(names.path(name))) for name in spelled]


def test_eleven_preferences_in_one_batch_beside_other_loras(
    vllm_engines, models, trained, trained_model, prompts, differs, routed, tmp_path, monkeypatch
):
    from vllm import SamplingParams
    from vllm.lora.request import LoRARequest

    engine = vllm_engines.start_engine(
        monkeypatch, models / "base", max_lora_rank=routed.max_rank, max_loras=12, max_cpu_loras=12
    )
    export_lora(trained, [0.3, 0.7], tmp_path / "plain", routers="drop")
    plain = LoRARequest("plain", 7, str(tmp_path / "plain"))
    points = [point.tolist() for point in routed.adapters["mine"].grid.points]
    greedy = SamplingParams(temperature=0, max_tokens=vllm_engines.LENGTH)
    gaps, static, dropped = [], 0, []
    for prompt in prompts:
        *texts, beside, base = engine.generate([prompt] * 13, greedy, lora_request=[*requests(routed), plain, None])
        for point, output in zip(points, texts, strict=True):
            found = list(output.outputs[0].token_ids)
            gaps.append(differs(trained_model, output.prompt_token_ids, found, point))
            static += differs(trained_model, output.prompt_token_ids, found, point, routers="static") is not None
        dropped.append(
            differs(trained_model, beside.prompt_token_ids, beside.outputs[0].token_ids, [0.3, 0.7], routers="drop")
        )
        with trained_model.disable_adapter():
            dropped.append(differs(trained_model, base.prompt_token_ids, base.outputs[0].token_ids, None))
    told, others = ([gap for gap in each if gap is not None] for each in (gaps, dropped))
    print(
        f"{gaps.count(None)} of {len(gaps)} texts have our tokens; gaps where they differ: {told}; {static} need the training"
    )
    assert all(gap < vllm_engines.CLOSE for gap in told)
    assert all(gap < vllm_engines.CLOSE for gap in others), dropped
    assert static > 3  # the routers' training changes texts, or the test would show nothing


def test_sampled_texts_have_our_probabilities_with_chunks_a_prefix_cache_and_evictions(
    vllm_engines, models, trained_model, prompts, routed, monkeypatch
):
    """Two LoRAs in memory at a time, prompts in chunks of eight tokens, each asked for twice."""
    from vllm import SamplingParams

    engine = vllm_engines.start_engine(
        monkeypatch, models / "base", max_lora_rank=routed.max_rank, max_loras=2, max_cpu_loras=2, max_num_seqs=4,
        enable_prefix_caching=True, enable_chunked_prefill=True, max_num_batched_tokens=8,
    )  # fmt: skip
    points = [point.tolist() for point in routed.adapters["mine"].grid.points]
    sampled = SamplingParams(temperature=1.0, max_tokens=16, logprobs=0)  # a seed a request is not for CPUs
    text = " ".join(prompts)  # long enough for blocks that the prefix cache keeps
    first, second = (engine.generate([text] * 11, sampled, lora_request=requests(routed)) for _ in range(2))
    furthest = 0.0
    for point, *outputs in zip(points, first, second, strict=True):
        for output in outputs:
            answer = output.outputs[0]
            prompt, written = list(output.prompt_token_ids), list(answer.token_ids)
            with torch.inference_mode():
                logits = trained_model(input_ids=torch.tensor([[*prompt, *written]]), preference=point).logits[0]
            ours = logits[len(prompt) - 1 : -1].log_softmax(-1)
            for place, (token, told) in enumerate(zip(written, answer.logprobs, strict=True)):
                furthest = max(furthest, abs(float(ours[place, token]) - told[token].logprob))
    print(f"log-probabilities of sampled tokens differ by at most {furthest:.1e}")
    assert furthest < 1e-4


def test_behind_the_server_too(vllm_engines, models, trained, trained_model, prompts, differs, tmp_path):
    """The plugin is loaded in the API server and in the engine, two processes."""
    rank = Names(Settings({"mine": str(trained)}, folder=tmp_path / "other")).max_rank
    with vllm_engines.serving(
        models / "base", trained, tmp_path / "cache", tmp_path / "log", "--max-lora-rank", str(rank), "--max-loras", "3"
    ) as client:
        for point in ([0.2, 0.8], [0.7, 0.3], [0.2, 0.8], [1, 0]):
            prompt, found = vllm_engines.complete(client, f"mine@{point[0]:g},{point[1]:g}", prompts[1])
            gap = differs(trained_model, prompt, found, point)
            assert gap is None or gap < vllm_engines.CLOSE
    assert "RoutedPunicaCPU" in (tmp_path / "log").read_text()


def test_a_model_in_parts_is_refused(vllm_engines, models, trained, tmp_path):
    server = vllm_engines.serving(
        models / "base", trained, tmp_path / "cache", tmp_path / "log", "--tensor-parallel-size", "2"
    )
    with pytest.raises(AssertionError, match=r"tensor_parallel_size is 2"), server:
        pass


def test_this_vllm_has_the_places_for_routers(vllm_engines):
    from peft_hoe.serving.vllm_seams import problems

    assert problems() == []


def test_a_method_with_other_arguments_is_told(vllm_engines, monkeypatch):
    from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU

    from peft_hoe.serving.vllm_seams import problems

    monkeypatch.setattr(PunicaWrapperCPU, "add_expand", lambda self, x, y: None)
    (problem,) = problems()
    assert "PunicaWrapperCPU.add_expand takes ('self', 'x', 'y')" in problem


def test_experts_of_embeddings_stand_beside_voting_routers(
    vllm_engines, models, build, load, prompts, differs, tmp_path, monkeypatch
):
    """The embeddings and the head that is tied to them go by fixed votes, in LoRAs that carry routers elsewhere."""
    from vllm import SamplingParams

    folder = build(tmp_path / "adapter", routers=[[0.25, 0.75], [0.75, 0.25]], capture=["embeddings"])
    model = load(folder)
    generator = torch.Generator().manual_seed(2)
    for name, parameter in model.named_parameters():
        if "hoe_router" in name:
            parameter.data = 0.5 * torch.randn(parameter.shape, generator=generator)
    model.mark_trained()
    model.save_pretrained(folder)
    monkeypatch.setenv("PEFT_HOE_VLLM_ADAPTERS", f"mine={folder}")
    monkeypatch.setenv("PEFT_HOE_VLLM_CACHE", str(tmp_path / "cache"))
    names = Names(Settings.from_environment())
    register()
    engine = vllm_engines.start_engine(
        monkeypatch, models / "base", max_lora_rank=names.max_rank, max_loras=11, max_cpu_loras=11
    )
    greedy = SamplingParams(temperature=0, max_tokens=vllm_engines.LENGTH)
    outputs = engine.generate([prompts[0]] * 11, greedy, lora_request=requests(names))
    gaps = [
        differs(model, output.prompt_token_ids, list(output.outputs[0].token_ids), point.tolist())
        for point, output in zip(names.adapters["mine"].grid.points, outputs, strict=True)
    ]
    print(f"{gaps.count(None)} of {len(gaps)} texts have our tokens; gaps where they differ: {gaps}")
    assert all(gap is None or gap < vllm_engines.CLOSE for gap in gaps)
