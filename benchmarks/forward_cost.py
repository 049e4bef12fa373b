"""What steering costs in the forward pass, relative to the base and to an unmerged PEFT LoRA in the same run.

    OMP_NUM_THREADS=1 python benchmarks/forward_cost.py [--output FILE]

A random Llama; every variant is timed in turn, in many rounds, and the medians are compared. "2 LoRAs" is PEFT with two
adapters active at once, "2 models" two forwards as in logit fusion, "length kept" `interpolation="norm"`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

import peft_hoe


def llama(hidden: int, layers: int) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=2048,
            hidden_size=hidden,
            intermediate_size=hidden * 8 // 3,
            num_hidden_layers=layers,
            num_attention_heads=8,
            num_key_value_heads=8,
            max_position_embeddings=512,
        )
    ).eval()


def variants(hidden: int, layers: int, rank: int, batch: int) -> dict[str, tuple[torch.nn.Module, dict, int]]:
    """Name to (model, keyword arguments of a call, number of calls)."""
    lora = {"r": rank, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    two = get_peft_model(llama(hidden, layers), LoraConfig(**lora))
    two.add_adapter("other", LoraConfig(**lora))
    two.base_model.set_adapter(["default", "other"])
    rows = [[i / (batch - 1), 1 - i / (batch - 1)] for i in range(batch)]
    base = llama(hidden, layers)
    return {
        "base": (base, {}, 1),
        "LoRA": (get_peft_model(llama(hidden, layers), LoraConfig(**lora)), {}, 1),
        "2 LoRAs": (two, {}, 1),
        "2 models": (base, {}, 2),
        **{
            f"HoE, {use}{kept}": (
                adapted(llama(hidden, layers), interpolation, trained, lora),
                {"preference": given},
                1,
            )
            for interpolation, kept in (("linear", ""), ("norm", ", length kept"))
            for use, trained, given in (
                ("1 expert", False, [1, 0]),
                ("2 experts", False, [0.7, 0.3]),
                ("trained router", True, [0.1, 0.9]),
                ("one preference per row", False, rows),
            )
        },
    }


def adapted(base: LlamaForCausalLM, interpolation: str, trained: bool, lora: dict[str, Any]) -> PeftModel:
    """The base with three experts and a router."""
    config = peft_hoe.HoEConfig(
        objectives=["a", "b"], routers=[[0.25, 0.75]], init_weights=False, interpolation=interpolation, **lora
    )
    model = get_peft_model(base, config)
    if trained:
        model.mark_trained()
    return model.eval()


def medians(jobs: dict[str, Callable[[], None]], rounds: int) -> dict[str, float]:
    """Median seconds of each job, measured in turn so that a busy machine disturbs all alike."""
    times: dict[str, list[float]] = {name: [] for name in jobs}
    for round_number in range(rounds + 1):
        for name, job in jobs.items():
            start = time.process_time()  # one thread: CPU time is wall time without the neighbours
            job()
            if round_number:  # the first round warms up
                times[name].append(time.process_time() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    models = variants(arguments.hidden, arguments.layers, arguments.rank, arguments.batch)
    prompt = torch.randint(3, 2048, (arguments.batch, 64))

    def prefill(name: str) -> None:
        model, settings, calls = models[name]
        for _ in range(calls):
            model(prompt, **settings)

    def decode(name: str) -> None:
        model, settings, calls = models[name]
        for _ in range(calls):
            model.generate(
                input_ids=prompt[:, :8],
                attention_mask=torch.ones_like(prompt[:, :8]),
                max_new_tokens=16,
                min_new_tokens=16,
                do_sample=False,
                pad_token_id=0,
                **settings,
            )

    with torch.no_grad():
        prefills = medians({name: lambda name=name: prefill(name) for name in models}, arguments.rounds)
        decodes = medians({name: lambda name=name: decode(name) for name in models}, arguments.rounds)
    stored = {name: sum(p.numel() for p in model.parameters()) * calls for name, (model, _, calls) in models.items()}
    base = stored["base"]
    rows = {}
    print(
        f"{'variant':<41} {'prefill':>8} {'decode':>8} {'decode / LoRA':>14} {'parameters':>11}   (relative to the base)"
    )
    for name in models:
        rows[name] = {
            "prefill": prefills[name] / prefills["base"],
            "decode": decodes[name] / decodes["base"],
            "decode_per_lora": decodes[name] / decodes["LoRA"],
            "parameters": stored[name] / base,
        }
        print("{:<41} {:>8.2f} {:>8.2f} {:>14.2f} {:>11.2f}".format(name, *rows[name].values()))
    if arguments.output:
        arguments.output.write_text(
            json.dumps({"settings": vars(arguments) | {"output": None}, "rows": rows}, indent=2)
        )


if __name__ == "__main__":
    main()
