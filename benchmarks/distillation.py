"""Distillation: does a router learn to be the logit fusion of the experts, and what does it gain?

    python benchmarks/distillation.py --shared DIR --output distillation.json --seeds 5

The adapter, prompts, rewards and worst gap of `router_training.py`. For each seed one router is distilled on its own
completions of the training prompts. Then, on the prompts of `--split`: the divergence KL(fusion ‖ model) per token, in nats, of
the static interpolation and of the trained router, on texts that the fusion sampled (temperature 1, five for each prompt, the
same for both); rewards and worst gap of static interpolation, fusion (MOD) and trained router; and the CPU time of a greedy
generation of the fusion relative to the trained router's. Intervals: Student's t over seeds, 95 %.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PrinterCallback
from transformers.utils.logging import disable_progress_bar, set_verbosity_error

import peft_hoe
from peft_hoe import Decoding
from peft_hoe.generation.completer import Completer
from peft_hoe.generation.fused_generation import generate_fused
from peft_hoe.generation.fusion import divergence, fusion_logprobs
from peft_hoe.generation.responses import response_mask
from peft_hoe.training.distillation.config import HoEDistillationConfig
from peft_hoe.training.distillation.trainer import HoEDistillationTrainer
from router_training import NEW_TOKENS, TEXTS, Bench, interval

# Chosen on the validation prompts.
SETTINGS: dict[str, Any] = {"learning_rate": 0.05, "lr_scheduler_type": "linear", "per_device_train_batch_size": 64}
STEPS = 60


def fused(bench: Bench, model: Any, sampled: bool, seed: int, texts: int = 1) -> torch.Tensor:
    """The fusion's prompts and completions `(B, P + T)` on the split's prompts."""
    completer = Completer(model, bench.tokenizer, Decoding(NEW_TOKENS, do_sample=sampled))
    batch = completer.batch(model, bench.test * texts)
    preferences = np.tile(np.asarray(bench.preference), (len(batch.ids), 1))
    torch.manual_seed(10_000 + seed)
    found = generate_fused(model, "default", preferences, batch, bench.tokenizer, completer.decoding)
    return torch.cat([batch.ids, found.ids], dim=1)


@torch.no_grad()
def kl(bench: Bench, model: Any, ids: torch.Tensor) -> float:
    """Mean KL(fusion ‖ model) per token of the completions in `ids`."""
    width = bench.tokenizer(bench.test, return_tensors="pt", padding=True)["input_ids"].shape[1]
    length, total, count = ids.shape[1] - width, 0.0, 0
    counted, _ = response_mask(ids[:, width:], bench.tokenizer.eos_token_id)
    mask = torch.cat([ids[:, :width] != bench.tokenizer.pad_token_id, counted], dim=1).long()
    for start in range(0, len(ids), 60):
        rows = slice(start, start + 60)
        teacher = fusion_logprobs(model, "default", np.asarray(bench.preference), ids[rows], mask[rows], length)
        positions = (mask[rows].cumsum(1) - 1).clamp(min=0)
        logits = model(
            ids[rows], attention_mask=mask[rows], position_ids=positions, preference=bench.preference
        ).logits[:, -length - 1 : -1]
        each = divergence(logits.log_softmax(-1), teacher, 0.0)[counted[rows]]
        total, count = total + float(each.sum()), count + len(each)
    return total / count


def measure_fusion(bench: Bench, model: Any, seed: int) -> dict[str, Any]:
    """What `Bench.measure` measures, of the fusion."""
    found = {}
    for name, sampled in (("sampled", True), ("greedy", False)):
        ids = fused(bench, model, sampled, seed, TEXTS if sampled else 1)
        width = bench.tokenizer(bench.test, return_tensors="pt", padding=True)["input_ids"].shape[1]
        texts = bench.tokenizer.batch_decode(ids[:, width:], skip_special_tokens=True)
        found[name] = bench.score(texts, sampled)
    return found


def seconds(call: Callable[[], Any]) -> float:
    """CPU seconds, the best of three."""
    best = math.inf
    for _ in range(3):
        started = time.process_time()
        call()
        best = min(best, time.process_time() - started)
    return best


def run(bench: Bench, seed: int, steps: int, changes: Mapping[str, Any], votes_for: Any) -> dict[str, Any]:
    """Distil one router and measure."""
    model = bench.model(votes_for)
    ids = fused(bench, model, True, 1000 + seed, TEXTS)
    found: dict[str, Any] = {
        "seed": seed,
        "static": bench.measure(model, seed),
        "fusion": measure_fusion(bench, model, seed),
    }
    found["static"]["kl"] = kl(bench, model, ids)
    args = HoEDistillationConfig(
        output_dir=str(bench.folder / "run"), router="router", max_steps=steps, seed=seed, max_new_tokens=NEW_TOKENS,
        use_cpu=True, report_to=[], save_strategy="no", disable_tqdm=True, **{**SETTINGS, **changes},
    )  # fmt: skip
    trainer = HoEDistillationTrainer(
        model=model, args=args, train_dataset=[{"prompt": prompt} for prompt in bench.train],
        processing_class=bench.tokenizer,
    )  # fmt: skip
    trainer.remove_callback(PrinterCallback)
    started = time.monotonic()
    trainer.train()
    found["seconds"] = round(time.monotonic() - started)
    found["router"] = bench.measure(model, seed) | {"kl": kl(bench, model, ids)}
    slow, fast = (
        seconds(call) for call in (lambda: fused(bench, model, False, 0), lambda: bench.texts(model, False, 0))
    )
    found["time of fusion / router"] = slow / fast
    return found


def table(runs: Sequence[Mapping[str, Any]]) -> str:
    """One row for each arm."""
    lines = [
        "| arm | KL to the fusion, nats per token | sampled worst gap | greedy worst gap | sampled rewards | greedy rewards |"
    ]
    lines.append("|" + "---|" * 6)
    for arm in ("static", "fusion", "router"):
        mine = [run[arm] for run in runs]
        cells = [
            "0 (by definition)" if arm == "fusion" else "{:.5f} ± {:.5f}".format(*interval([m["kl"] for m in mine]))
        ]
        cells += ["{:.4f} ± {:.4f}".format(*interval([m[d]["worst gap"] for m in mine])) for d in ("sampled", "greedy")]
        cells += [
            " / ".join(f"{x:.3f}" for x in np.mean([m[d]["rewards"] for m in mine], 0)) for d in ("sampled", "greedy")
        ]
        lines.append(f"| {arm} | " + " | ".join(cells) + " |")
    gaps = {
        d: [run["router"][d]["worst gap"] - run["static"][d]["worst gap"] for run in runs]
        for d in ("sampled", "greedy")
    }
    for decoding, differences in gaps.items():
        lines.append("\nrouter - static, {}, paired: {:+.4f} ± {:.4f}".format(decoding, *interval(differences)))
    ratio = np.mean([run["time of fusion / router"] for run in runs])
    lines.append(
        f"\ntime of fusion / router: {ratio:.2f}; {np.mean([run['seconds'] for run in runs]):.0f} s of training a seed"
    )
    return "\n".join(lines)


def main() -> None:
    """Distil, measure, write JSON after every run, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shared", type=Path, required=True, help="folder with models/ and data/")
    parser.add_argument("--output", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--seeds", type=int, default=5, help="number of seeds (default 5)")
    parser.add_argument(
        "--preference", type=float, nargs=2, default=[0.25, 0.75], help="the router's (default .25 .75)"
    )
    parser.add_argument("--votes-for", default=None, choices=["all"], help="default the router's default voting set")
    parser.add_argument("--steps", type=int, default=STEPS, help=f"default {STEPS}")
    parser.add_argument("--split", default="test", choices=["validation", "test"], help="prompts to report on")
    parser.add_argument("--set", type=json.loads, default={}, metavar="JSON", help="other settings, for the search")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    disable_progress_bar()
    set_verbosity_error()  # max_new_tokens beats the model's max_length, it would say at every call
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(arguments.shared, Path(folder), arguments.split, arguments.preference)
        result: dict[str, Any] = {
            "peft_hoe": peft_hoe.__version__, "torch": torch.__version__, "split": arguments.split,
            "preference": arguments.preference, "steps": arguments.steps, "settings": {**SETTINGS, **arguments.set},
            "runs": [],
        }  # fmt: skip
        for seed in range(arguments.seeds):
            result["runs"].append(run(bench, seed, arguments.steps, arguments.set, arguments.votes_for))
            arguments.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
            print(f"seed {seed}: {result['runs'][-1]['seconds']} s", file=sys.stderr, flush=True)
    print(table(result["runs"]))


if __name__ == "__main__":
    main()
