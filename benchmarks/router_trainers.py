"""PPO, GRPO, distillation and DPO at equal wall time: which trainer of routers is worth its minutes?

    python benchmarks/router_trainers.py --shared DIR --output router_trainers.json --seeds 3

One adapter (policies positive and rich, build defaults but for linear interpolation) with two routers, at [.25, .75]
and [.75, .25]. Each arm trains both, each for `--seconds` of CPU time on one thread, which is its wall time on an idle
core: the number of updates follows from the time of a few updates that are thrown away. An arm and seed is a process of
its own. Measured on the prompts of `--split`: the worst λ-weighted gap of `router_training.py` at the routers'
preferences (mean of the two, sampled and greedy), the hypervolume of the greedy sweep over λ₁ = 0, 0.1 ... 1 (rewards
normalised by the greedy payoff table of the validation prompts, reference point −0.1), time, and the growth of the peak
resident memory during training. DPO's pairs: four samples of each training prompt at the router's preference, for each
objective the best against the worst by its reward; the time to make them is given beside. Intervals: Student's t over
seeds, 95 %.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, GenerationConfig, PrinterCallback
from transformers.utils.logging import disable_progress_bar, set_verbosity_error

import peft_hoe
from peft_hoe import metrics
from peft_hoe.training import (
    HoEDistillationConfig,
    HoEDistillationTrainer,
    HoEDPOConfig,
    HoEDPOTrainer,
    HoEGRPOConfig,
    HoEGRPOTrainer,
    HoERouterConfig,
    HoERouterTrainer,
)
from router_training import NEW_TOKENS, REWARDS, Bench, interval
from router_training import SETTINGS as PPO_SETTINGS

ROUTERS = {"toward_rich": [0.25, 0.75], "toward_positive": [0.75, 0.25]}
REFERENCE = -0.1
ARMS = ("static", "ppo", "grpo", "distill", "dpo", "dpo, no margin")
PROBE = 4  # updates that measure the time of one; the first is left out

# Chosen on the validation prompts.
COMMON: dict[str, Any] = {"lr_scheduler_type": "linear", "learning_rate": 0.05}
SETTINGS: dict[str, dict[str, Any]] = {
    "ppo": PPO_SETTINGS,
    "grpo": {"per_device_train_batch_size": 128, "num_generations": 8, "beta": 0.0, "loss_type": "dr_grpo"},
    "distill": {"per_device_train_batch_size": 64},
    "dpo": {"per_device_train_batch_size": 32, "beta": 0.1},
    "dpo, no margin": {"per_device_train_batch_size": 32, "beta": 0.1, "margin": "none"},
}


class TwoRouters(Bench):
    """`Bench` with an adapter that has both routers."""

    def model(self, votes_for: Any) -> Any:
        """The adapter with untrained routers."""
        path = self.folder / "adapter"
        if not path.exists():
            routers = [{"preference": preference, "name": name} for name, preference in ROUTERS.items()]
            peft_hoe.build_adapter(
                str(self.base), self.policies, path, routers=routers, interpolation="linear", progress=False
            )
        return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(self.base), path).eval()

    def at(self, preference: Sequence[float]) -> TwoRouters:
        """Measure at this preference from now on."""
        self.preference = list(preference)
        return self


# -- arms: (bench, model, router, seed, updates, changed settings) -> trainer ---


def common(bench: Bench, router: str, seed: int, updates: int) -> dict[str, Any]:
    return {
        "output_dir": str(bench.folder / "run"), "router": router, "max_steps": updates, "seed": seed, "use_cpu": True,
        "save_strategy": "no", "report_to": [], "disable_tqdm": True, **COMMON,
    }  # fmt: skip


def ppo(bench: Bench, model: Any, router: str, seed: int, updates: int, changes: dict[str, Any]) -> Any:
    args = HoERouterConfig(**{
        **common(bench, router, seed, updates), "stop_token": "eos", "response_length": NEW_TOKENS,
        "local_rollout_forward_batch_size": 128, "num_sample_generations": 0, **changes,
    })  # fmt: skip
    return HoERouterTrainer(
        args=args, processing_class=bench.tokenizer, model=model, reward_model=REWARDS,
        train_dataset=[{"prompt": prompt} for prompt in bench.train], normalizer=bench.scales[True],
    )  # fmt: skip


def grpo(bench: Bench, model: Any, router: str, seed: int, updates: int, changes: dict[str, Any]) -> Any:
    args = HoEGRPOConfig(**{**common(bench, router, seed, updates), "max_completion_length": NEW_TOKENS, **changes})
    return HoEGRPOTrainer(
        model=model, reward_funcs=REWARDS, args=args, train_dataset=[{"prompt": prompt} for prompt in bench.train],
        processing_class=bench.tokenizer, normalizer=bench.scales[True],
    )  # fmt: skip


def distill(bench: Bench, model: Any, router: str, seed: int, updates: int, changes: dict[str, Any]) -> Any:
    args = HoEDistillationConfig(**{**common(bench, router, seed, updates), "max_new_tokens": NEW_TOKENS, **changes})
    return HoEDistillationTrainer(
        model=model, args=args, train_dataset=[{"prompt": prompt} for prompt in bench.train],
        processing_class=bench.tokenizer,
    )  # fmt: skip


def dpo(bench: Bench, model: Any, router: str, seed: int, updates: int, changes: dict[str, Any]) -> Any:
    args = HoEDPOConfig(**{**common(bench, router, seed, updates), **changes})
    pairs = make_pairs(bench, model, ROUTERS[router], seed)
    return HoEDPOTrainer(model=model, args=args, train_dataset=pairs, processing_class=bench.tokenizer)


@torch.no_grad()
def make_pairs(bench: Bench, model: Any, preference: Sequence[float], seed: int) -> dict[str, list[dict[str, str]]]:
    """The best and the worst of four samples of each training prompt, for each objective."""
    batch = bench.tokenizer(list(bench.train), return_tensors="pt", padding=True)
    settings = GenerationConfig(
        max_new_tokens=NEW_TOKENS, do_sample=True, temperature=1.0, top_k=0, top_p=1.0,
        pad_token_id=bench.tokenizer.pad_token_id, eos_token_id=bench.tokenizer.eos_token_id,
    )  # fmt: skip
    torch.manual_seed(seed)
    samples = []
    for _ in range(4):
        ids = model.generate(**batch, generation_config=settings, preference=preference)
        texts = bench.tokenizer.batch_decode(ids, skip_special_tokens=True)
        # With the space that a completion begins with, which decoding it alone would lose.
        samples.append([text[len(prompt) :] for text, prompt in zip(texts, bench.train, strict=True)])
    pairs: dict[str, list[dict[str, str]]] = {}
    for name, reward in REWARDS.items():
        values = np.asarray([reward(texts, texts) for texts in samples])
        best, worst = values.argmax(0), values.argmin(0)
        pairs[name] = [
            {"prompt": prompt, "chosen": samples[best[i]][i], "rejected": samples[worst[i]][i]}
            for i, prompt in enumerate(bench.train)
            if values[best[i], i] > values[worst[i], i]
        ]
    return pairs


TRAINERS: dict[str, Callable[..., Any]] = {
    "ppo": ppo, "grpo": grpo, "distill": distill, "dpo": dpo, "dpo, no margin": dpo,
}  # fmt: skip


# -- one process ---


def train(bench: TwoRouters, model: Any, arm: str, router: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Train one router for the given time; what it took."""
    changes = {**SETTINGS[arm], **arguments.set.get(arm, {})}
    probe = TRAINERS[arm](bench, bench.model(None), router, 0, PROBE, changes)
    each = seconds_per_update(probe)
    updates = max(1, round(arguments.seconds / each))
    started = time.process_time()
    trainer = TRAINERS[arm](bench, model, router, arguments.one_seed, updates, changes)
    prepared = time.process_time()
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return {"updates": updates, "seconds": time.process_time() - prepared, "preparation": prepared - started}


def seconds_per_update(trainer: Any) -> float:
    """CPU time of an update, the first one left out."""
    from transformers import TrainerCallback

    ends: list[float] = []

    class Watch(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **others: Any) -> None:
            ends.append(time.process_time())

    trainer.add_callback(Watch())
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return (ends[-1] - ends[0]) / (len(ends) - 1)


def measure(bench: TwoRouters, model: Any, seed: int) -> dict[str, Any]:
    """Worst gaps at the routers, and the hypervolume of the sweep."""
    found: dict[str, Any] = {"routers": {}}
    for name, preference in ROUTERS.items():
        found["routers"][name] = bench.at(preference).measure(model, seed)
    for decoding in ("sampled", "greedy"):
        found[decoding] = float(np.mean([each[decoding]["worst gap"] for each in found["routers"].values()]))
    grid = [[i / 10, 1 - i / 10] for i in range(11)]
    rewards = np.asarray([bench.score(bench.at(point).texts(model, False, 0), False)["rewards"] for point in grid])
    points = bench.scales[False].normalize(rewards)
    found["sweep"], found["hypervolume"] = points.tolist(), metrics.hypervolume(points, reference_point=REFERENCE)
    return found


def one(arguments: argparse.Namespace) -> dict[str, Any]:
    """One arm and seed."""
    torch.set_num_threads(1)
    disable_progress_bar()
    set_verbosity_error()
    bench = TwoRouters(arguments.shared, arguments.folder, arguments.split, ROUTERS["toward_rich"])
    model = bench.model(None)
    arm = arguments.one
    before = peak_memory()
    runs = {} if arm == "static" else {router: train(bench, model, arm, router, arguments) for router in ROUTERS}
    found = {"arm": arm, "seed": arguments.one_seed, "training": runs, "MiB": peak_memory() - before}
    return found | measure(bench, model.eval(), arguments.one_seed)


def peak_memory() -> float:
    """Of this process so far, resident, MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


# -- all of them ---


def table(runs: Sequence[dict[str, Any]]) -> str:
    columns = [
        "seeds",
        "worst gap, sampled",
        "worst gap, greedy",
        "hypervolume of the sweep",
        "updates a router",
        "time, s",
    ]
    columns += ["preparation, s", "peak memory, MiB"]
    lines = ["| trainer | " + " | ".join(columns) + " |", "|" + "---|" * (len(columns) + 1)]
    for arm in dict.fromkeys(run["arm"] for run in runs):
        mine = [run for run in runs if run["arm"] == arm]
        cells = [str(len(mine))]
        cells += [
            "{:.4f} ± {:.4f}".format(*interval([run[name] for run in mine]))
            for name in ("sampled", "greedy", "hypervolume")
        ]
        spent = [each for run in mine for each in run["training"].values()]
        for name, digits in (("updates", 0), ("seconds", 0), ("preparation", 1)):
            cells.append(f"{np.mean([each[name] for each in spent]):.{digits}f}" if spent else "")
        cells.append(f"+{np.mean([run['MiB'] for run in mine]):.0f}" if spent else "")
        lines.append(f"| {arm} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """Run every arm and seed in a process of its own, write JSON after each, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shared", type=Path, required=True, help="folder with models/ and data/")
    parser.add_argument("--output", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--seeds", type=int, default=3, help="number of seeds (default 3)")
    parser.add_argument("--seconds", type=float, default=60, help="of training for a router (default 60)")
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=ARMS, help="default all")
    parser.add_argument("--split", default="test", choices=["validation", "test"], help="prompts to report on")
    parser.add_argument("--set", type=json.loads, default={}, metavar="JSON", help="{arm: settings}, for the search")
    parser.add_argument("--one", choices=ARMS, help=argparse.SUPPRESS)
    parser.add_argument("--one-seed", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        arguments.output.write_text(json.dumps(one(arguments)), encoding="utf-8")
        return
    result: dict[str, Any] = {
        "peft_hoe": peft_hoe.__version__, "torch": torch.__version__, "split": arguments.split, "seconds": arguments.seconds,
        "common": COMMON, "settings": {arm: {**SETTINGS[arm], **arguments.set.get(arm, {})} for arm in TRAINERS}, "runs": [],
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(arguments.seeds):
            for arm in arguments.arms:
                answer = Path(folder) / "answer.json"
                command = [sys.executable, __file__, "--shared", str(arguments.shared), "--output", str(answer)]
                command += [
                    "--seconds",
                    str(arguments.seconds),
                    "--split",
                    arguments.split,
                    "--set",
                    json.dumps(arguments.set),
                ]
                command += ["--one", arm, "--one-seed", str(seed), "--folder", folder]
                subprocess.run(command, check=True)
                result["runs"].append(json.loads(answer.read_text(encoding="utf-8")))
                arguments.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
                print(f"{arm}, seed {seed}", file=sys.stderr, flush=True)
    print(table(result["runs"]))


if __name__ == "__main__":
    main()
