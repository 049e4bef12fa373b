"""Stored parameters from shapes alone, and CPU time for each token.

    python benchmarks/fronts_costs.py

prints the storage table for Llama-2-7B, in the form of the paper's Table 3: pure arithmetic, no model is read.

Shapes: N objectives, M preferences, E experts.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from peft import LoraConfig, get_peft_model

from peft_hoe import Decoding
from peft_hoe.evaluation.baselines.adapters import load_base
from peft_hoe.generation.completer import Completer

REPEATS = 5


@dataclass(frozen=True)
class Shapes:
    """A model's parameters, and the `(d_out, d_in)` of the linear layers that adapters change."""

    parameters: int
    linear: tuple[tuple[int, int], ...]

    def expert(self, r: int) -> int:
        """Parameters of one expert: r (d_in + d_out) for each layer, r at most the smaller side."""
        return sum(min(r, *shape) * sum(shape) for shape in self.linear)

    def router(self, votes: int) -> int:
        """Parameters of one router with so many votes: weights and biases for each layer."""
        return sum(votes * (d_in + 1) for _, d_in in self.linear)


def llama_shapes(hidden: int, intermediate: int, layers: int, vocabulary: int, key_value: int, *, tied: bool) -> Shapes:
    """Shapes of a Llama; `key_value` is the width of its keys."""
    layer = [(hidden, hidden), (key_value, hidden), (key_value, hidden), (hidden, hidden)]
    layer += [(intermediate, hidden), (intermediate, hidden), (hidden, intermediate)]
    norms = (2 * layers + 1) * hidden
    total = layers * sum(d_out * d_in for d_out, d_in in layer) + norms + vocabulary * hidden * (1 if tied else 2)
    return Shapes(total, tuple(layer * layers))


LLAMA_2_7B = llama_shapes(4096, 11008, 32, 32000, 4096, tied=False)


def stored(shapes: Shapes, n: int, r: int, preferences: int, routers: int = 0, votes: int = 2) -> dict[str, int]:
    """Parameters in memory and on disk that serve N objectives at M preferences, base included, by method.

    Args:
        shapes: of the base.
        n: N.
        r: rank of every expert and merge.
        preferences: M, for methods that have a model or merge for each.
        routers: of HoE with trained ones, besides the one at the centroid.
        votes: of each of these.
    """
    base, expert = shapes.parameters, shapes.expert(r)
    soup = base + n * expert
    return {
        **dict.fromkeys(("hoe", "hoe_linear", "hoe_same"), soup + expert),
        "hoe_pairs": soup + math.comb(n, 2) * expert,
        "hoe_trained": soup + (routers + 1) * shapes.router(votes),
        **dict.fromkeys(
            ("hoe_merged_trained", "hoe_same_merged_trained"), soup + expert + routers * shapes.router(votes)
        ),
        "rs": soup, "rs_dense": n * base, "rs_norm": soup, **dict.fromkeys(("ta", "ties", "pcb"), base + preferences * expert),
        "mod": soup, "prompting": base, "morlhf": preferences * base, "lora_moe": soup + shapes.router(n),
    }  # fmt: skip


def seconds_per_token(
    base: str, tokenizer: Any, prompts: Sequence[str], methods: Mapping[str, Any], preference: Sequence[float], new: int
) -> dict[str, float]:
    """CPU seconds for each new token of a greedy batch at one preference: the best of several, methods taking turns.

    "one LoRA" is PEFT's, rank 16 on the same layers, unmerged.
    """
    lora = get_peft_model(load_base(base), LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM")).eval()
    completer = Completer(lora, tokenizer, Decoding(new))
    rows = np.tile(preference, (len(prompts), 1))
    calls = {"one LoRA": lambda: completer.complete(lora, prompts)}
    calls |= {name: (lambda method=method: method(prompts, rows)) for name, method in methods.items()}
    found: dict[str, float] = dict.fromkeys(calls, float("inf"))
    for repeat in range(REPEATS + 1):
        for name, call in calls.items():
            started = time.process_time()
            call()
            if repeat:  # the first builds adapters and loads states
                found[name] = min(found[name], time.process_time() - started)
    return {name: seconds / (len(prompts) * new) for name, seconds in found.items()}


def storage_table(shapes: Shapes = LLAMA_2_7B) -> str:
    """Billions of parameters of HoE by number of experts and rank, and of all methods for three objectives."""
    lines = ["| experts | rank 16 | rank 128 | rank 256 |", "|---|---|---|---|"]
    for experts in (2, 3, 4):
        cells = [f"{(shapes.parameters + experts * shapes.expert(r)) / 1e9:.2f}" for r in (16, 128, 256)]
        lines.append(f"| {experts} | {' | '.join(cells)} |")
    lines += [
        "",
        "| method, three objectives, rank 128 | stored, billions | trained, millions | forwards for a token |",
    ]
    lines.append("|---|---|---|---|")
    counts = stored(shapes, 3, 128, 13, routers=3, votes=3)
    trained = {
        "hoe_trained": 4 * shapes.router(3), "hoe_merged_trained": 3 * shapes.router(3), "lora_moe": shapes.router(3),
        "morlhf": 13 * shapes.parameters,
    }  # fmt: skip
    for name in [
        name for name in counts if name not in ("hoe_linear", "hoe_same", "hoe_same_merged_trained")
    ]:  # as their likes
        rows = 3 if name == "mod" else 1
        lines.append(f"| {name} | {counts[name] / 1e9:.2f} | {trained.get(name, 0) / 1e6:.1f} | {rows} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(storage_table())
