"""A random Llama without and with adapters, and how a step of each is timed: for inference.py and gpu.py.

All variants share the base's weights. HoE has 4 experts, three objectives' and the centroid. Where votes are static, two
objectives' and the centroid are active, which are no neighbours; the trained router votes for the three objectives'
experts. So 3 experts are active in each variant that steers, and each has the total rank of a LoRA of rank 3 r.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from peft import LoraConfig, PeftModel, XLoraConfig, get_peft_model
from torch import nn
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

import peft_hoe
from peft_hoe.tuner.cache_owner import cache_name
from peft_hoe.tuner.layer import HoELayer

CACHE = cache_name(inspect.signature(LlamaForCausalLM.forward).parameters)  # the argument's name in this transformers
OBJECTIVES = ["a", "b", "c"]
ROUTED, STATIC = [0.3, 0.3, 0.4], [0.5, 0.3, 0.2]
ACTIVE = 3
Job = Callable[[], object]


@dataclass(frozen=True)
class Shape:
    """Of the model and its adapters."""

    hidden: int = 1024
    intermediate: int = 2816
    layers: int = 8
    heads: int = 16
    vocabulary: int = 8192
    rank: int = 32
    device: str = "cpu"
    dtype: torch.dtype = torch.float32


def base_model(shape: Shape) -> LlamaForCausalLM:
    """A random Llama."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=shape.vocabulary, hidden_size=shape.hidden, intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers, num_attention_heads=shape.heads, num_key_value_heads=shape.heads,
        max_position_embeddings=2048, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    with torch.device(shape.device):
        return LlamaForCausalLM(config).to(shape.dtype).eval().requires_grad_(False)


def another(base: LlamaForCausalLM) -> LlamaForCausalLM:
    """The same model, configuration and modules its own, weights shared."""
    return copy.deepcopy(base, {id(parameter): parameter for parameter in base.parameters()})


@contextlib.contextmanager
def drawn_where_it_lies(base: LlamaForCausalLM) -> Iterator[LlamaForCausalLM]:
    """A model with the base's weights to adapt. What is added to it is drawn at the end, on the base's device.

    PEFT makes adapters on the CPU, where the random numbers of a large model take a minute.
    """
    model = another(base)
    with mock.patch.object(nn.Linear, "reset_parameters", return_value=None):
        yield model
    for name, module in model.named_modules():
        if type(module) is nn.Linear and ("lora_" in name or "hoe_" in name):
            module.reset_parameters()


def lora(base: LlamaForCausalLM, rank: int, count: int = 1) -> PeftModel:
    """LoRAs in the base's dtype that are active together."""
    config = LoraConfig(r=rank, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
    with drawn_where_it_lies(base) as own:
        model = get_peft_model(own, config, autocast_adapter_dtype=False)
        for number in range(1, count):
            model.add_adapter(f"lora{number}", config, autocast_adapter_dtype=False)
    model.base_model.set_adapter(["default", *(f"lora{number}" for number in range(1, count))])
    return model.eval()


def xlora(base: LlamaForCausalLM, rank: int, hidden: int) -> PeftModel:
    """X-LoRA over three LoRAs. On a configuration of its own: it switches the cache off there."""
    with tempfile.TemporaryDirectory() as folder:
        for number in range(ACTIVE):
            lora(base, rank).save_pretrained(f"{folder}/{number}")
        adapters = {str(number): f"{folder}/{number}" for number in range(ACTIVE)}
        config = XLoraConfig(task_type="CAUSAL_LM", hidden_size=hidden, adapters=adapters, xlora_depth=1)
        model = another(base)
        model.config.use_cache = False  # asked for
        return get_peft_model(model, config).eval()


def hoe(base: LlamaForCausalLM, rank: int, *, trained: bool = False, interpolation: str = "norm") -> PeftModel:
    """Four experts at `STATIC`, or with a trained router at `ROUTED`; three are active."""
    config = peft_hoe.HoEConfig(
        objectives=OBJECTIVES, r=rank, target_modules="all-linear", task_type="CAUSAL_LM", init_weights=False,
        routers=[{"preference": ROUTED, "votes_for": OBJECTIVES}] if trained else None, interpolation=interpolation,
    )  # fmt: skip
    with drawn_where_it_lies(base) as own:
        model = get_peft_model(own, config)
    model = prepared(model, trained, ROUTED if trained else STATIC)
    plan = model.base_model.steering.default.adapters["default"]
    if len(plan.selected) != ACTIVE or plan.is_live != trained:
        raise SystemExit(f"{len(plan.selected)} experts are active in place of {ACTIVE}")
    return model


def prepared(model: PeftModel, trained: bool, preference: list[float]) -> PeftModel:
    """With lengths measured and a preference."""
    for layer in model.modules():
        if isinstance(layer, HoELayer):
            layer.measure_lengths("default")
    if trained:
        model.mark_trained()
    model.set_preference(preference)
    return model.eval()


def rows(batch: int) -> list[list[float]]:
    """Different static preferences, one for each row, that reach the same three experts."""
    return [[0.5 - 0.2 * i / batch, 0.3, 0.2 + 0.2 * i / batch] for i in range(batch)]


def bare_products(base: LlamaForCausalLM, rank: int, tokens: int) -> Job:
    """The products x A^T and h B^T alone, at every adapted module's shapes: what no layer of that rank can do without."""
    work = []
    for name, module in base.named_modules():
        if isinstance(module, nn.Linear) and name != "lm_head":
            like = {"device": module.weight.device, "dtype": module.weight.dtype}
            x, down = torch.randn(tokens, module.in_features, **like), torch.randn(rank, module.in_features, **like)
            work.append((x, down, torch.randn(module.out_features, rank, **like)))

    def run() -> None:
        for x, down, up in work:
            F.linear(F.linear(x, down), up)

    return run


# -- jobs ---


def prompt(shape: Shape, batch: int, length: int) -> torch.Tensor:
    """Token ids `(batch, length)`."""
    generator = torch.Generator().manual_seed(1)
    return torch.randint(3, shape.vocabulary, (batch, length), generator=generator).to(shape.device)


def prefill(model: Any, ids: torch.Tensor, **settings: Any) -> Job:
    """A forward over a prompt, logits of its last position."""
    return lambda: model(input_ids=ids, logits_to_keep=1, **settings)


def decode(model: Any, ids: torch.Tensor, steps: int = 4, **settings: Any) -> Job:
    """Steps of decoding after a prompt."""
    cache = DynamicCache()
    with torch.no_grad():
        model(input_ids=ids, logits_to_keep=1, **{CACHE: cache}, **settings)
    token = ids[:, :1]

    def run() -> None:
        for _ in range(steps):
            model(input_ids=token, **{CACHE: cache}, **settings)
        cache.crop(-steps)

    return run


def generate(model: Any, ids: torch.Tensor, new: int, **settings: Any) -> Job:
    """Greedy generation of `new` tokens."""
    common = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "do_sample": False, "pad_token_id": 0}
    return lambda: model.generate(**common, max_new_tokens=new, min_new_tokens=new, **settings)


def fused_prefill(models: list[Any], ids: torch.Tensor) -> Job:
    """MOD: the mean of several models' log-probabilities."""
    return lambda: _fused([model(input_ids=ids, logits_to_keep=1).logits for model in models])


def fused_generate(models: list[Any], ids: torch.Tensor, new: int) -> Job:
    """Greedy decoding of that mean, each model with its cache."""

    def run() -> None:
        caches, token = [DynamicCache() for _ in models], ids
        for _ in range(new):
            each = zip(models, caches, strict=True)
            logits = [m(input_ids=token, logits_to_keep=1, **{CACHE: cache}).logits for m, cache in each]
            token = _fused(logits)[:, -1:].argmax(-1)

    return run


def _fused(logits: list[torch.Tensor]) -> torch.Tensor:
    return sum(each.log_softmax(-1) for each in logits) / len(logits)  # type: ignore[return-value]


# -- timing ---


def interleaved(jobs: dict[str, Job], rounds: int, warm_up: int = 1) -> dict[str, float]:
    """Median milliseconds of each job, measured in turn, so that a busy machine disturbs all alike.

    On one CPU thread it is CPU time, which is wall time without the neighbours; else wall time, of a GPU that has finished.
    """
    gpu, alone = torch.cuda.is_available(), torch.get_num_threads() == 1
    clock = time.process_time if alone and not gpu else time.perf_counter
    times: dict[str, list[float]] = {name: [] for name in jobs}
    with torch.no_grad():
        for number in range(warm_up + rounds):
            for name, job in jobs.items():
                if gpu:
                    torch.cuda.synchronize()
                start = clock()
                job()
                if gpu:
                    torch.cuda.synchronize()
                if number >= warm_up:
                    times[name].append((clock() - start) * 1e3)
    return {name: statistics.median(values) for name, values in times.items()}


def load_average() -> str:
    """How busy the machine is, for the record."""
    return Path("/proc/loadavg").read_text().split()[0] if Path("/proc/loadavg").exists() else "unknown"
