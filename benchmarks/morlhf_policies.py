"""Trains the policies that other benchmarks compare with: MORLHF, one policy for every preference, and more objectives.

    python benchmarks/morlhf_policies.py --shared DIR --output policies

MORLHF with three seeds, at five preferences of positive x rich and of positive x dialog and at seven of all three objectives
(`morlhf-<weights of positive, rich and dialog>-seed<k>`); rewards are on the scale of the payoff table of `fronts.py`, so that
a preference means what it means there. And single-objective policies: past and pronouns (`stories260k-past`, ...) make five
objectives with the three policies of DIR; positive, rich and dialog are trained again, which makes HoE of MORLHF's own recipe.

Every policy starts from the base, all weights train: 120 updates of 8 prompts x 16 samples. Finished policies are skipped, so
that the command can be repeated. Beside each folder stands a JSON file with settings, log, seconds, and mean rewards and KL
divergence to the base in nats, on 512 samples for the validation prompts at temperature 1. 48 new tokens.
"""

from __future__ import annotations

import contextlib
import json
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

from figures_setting import parser
from fronts_adapters import OBJECTIVES, SETS, Problem
from peft_hoe.objectives import RewardNormalizer
from peft_hoe.policies import policy_gradient_config, train_policy
from problem import quiet
from router_training import NEW_TOKENS
from stories_rewards import REWARDS

SEEDS, SAMPLES = 3, 512
PAIR = [[0.1, 0.9], [0.3, 0.7], [0.5, 0.5], [0.7, 0.3], [0.9, 0.1]]
# Of MORLHF, by set of objectives; points of the grids that `fronts.py` sweeps.
PREFERENCES = {
    "positive,rich": PAIR,
    "positive,dialog": PAIR,
    "all": [
        [1 / 3, 1 / 3, 1 / 3],
        *([0.8, 0.1, 0.1], [0.1, 0.8, 0.1], [0.1, 0.1, 0.8]),
        *([0.4, 0.4, 0.2], [0.4, 0.2, 0.4], [0.2, 0.4, 0.4]),
    ],
}
# Advantages are divided by the batch's standard deviation. Without that ("none"), a KL coefficient of 0.2 outweighs these
# rewards: `positive` was at 0.63 and 1.8 nats from the base after 60 updates, those of DIR are at 4 to 9.
SETTINGS: dict[str, Any] = {
    "prompts": 8, "samples": 16, "max_steps": 120, "learning_rate": 3e-4, "beta": 0.2, "temperature": 1.0,
    "max_completion_length": NEW_TOKENS, "scale_rewards": "batch",
}  # fmt: skip


@dataclass(frozen=True)
class Run:
    """One policy."""

    name: str
    preference: dict[str, float]
    seed: int
    normalized: bool


def morlhf_name(preference: Mapping[str, float], seed: int) -> str:
    """Folder of the policy for a preference."""
    weights = "-".join(f"{preference.get(name, 0):.2g}" for name in OBJECTIVES)
    return f"morlhf-{weights}-seed{seed}"


def runs(key: str, seeds: int) -> list[Run]:
    """MORLHF on one set of objectives."""
    found = [dict(zip(SETS[key], preference, strict=True)) for preference in PREFERENCES[key]]
    return [Run(morlhf_name(point, seed), point, seed, True) for seed in range(seeds) for point in found]


def payoff(shared: Path, output: Path, key: str) -> RewardNormalizer:
    """The scale of `fronts.py`, sampled; kept in the output folder."""
    path = output / f"payoff-{key.replace(',', '-')}.json"
    if not path.exists():
        with tempfile.TemporaryDirectory() as folder:
            scale = Problem(shared, Path(folder), key).scale(True)
        path.write_text(json.dumps(scale.state_dict(), indent=1) + "\n", encoding="utf-8")
    return RewardNormalizer.from_state_dict(json.loads(path.read_text(encoding="utf-8")))


def train(run: Run, base: Path, folder: Path, prompts: Sequence[str], scale: RewardNormalizer | None) -> dict[str, Any]:
    """Train one policy; its record."""
    args = policy_gradient_config(folder, seed=run.seed, use_cpu=True, disable_tqdm=True, **SETTINGS)
    started, cpu = time.monotonic(), time.process_time()
    with contextlib.redirect_stdout(sys.stderr):  # what the trainer logs
        log = train_policy(
            base,
            args,
            rewards={name: REWARDS[name] for name in run.preference},
            preference=run.preference,
            train_dataset=[{"prompt": prompt} for prompt in prompts],
            normalizer=scale,
        )
    seconds = {"seconds": round(time.monotonic() - started), "cpu_seconds": round(time.process_time() - cpu)}
    return {**asdict(run), "settings": SETTINGS, **seconds, "log": log}


@torch.inference_mode()
def measure(folder: Path, base: Path, prompts: Sequence[str]) -> dict[str, Any]:
    """Mean rewards, and KL divergence to the base summed over a completion."""
    model, reference = (AutoModelForCausalLM.from_pretrained(path).eval() for path in (folder, base))
    tokenizer = AutoTokenizer.from_pretrained(base, padding_side="left")
    batch = tokenizer([prompts[i % len(prompts)] for i in range(SAMPLES)], return_tensors="pt", padding=True)
    width = batch["input_ids"].shape[1]
    torch.manual_seed(0)
    ids = model.generate(**batch, do_sample=True, temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=NEW_TOKENS)
    texts = tokenizer.batch_decode(ids[:, width:], skip_special_tokens=True)
    new = ids[:, width:] != tokenizer.pad_token_id
    mask = torch.cat([batch["attention_mask"], new.long()], dim=1)
    own, other = (F.log_softmax(m(ids, attention_mask=mask).logits[:, width - 1 : -1], -1) for m in (model, reference))
    divergence = (F.kl_div(other, own, log_target=True, reduction="none").sum(-1) * new).sum(1).mean()
    means = {name: float(np.mean(reward(texts, texts))) for name, reward in REWARDS.items()}
    return {"rewards": means, "kl": float(divergence)}


def row(record: Mapping[str, Any]) -> str:
    """A line of the table."""
    cells = [record["name"], *(f"{value:.3f}" for value in record["rewards"].values()), f"{record['kl']:.2f}"]
    cells += [str(record.get(key, "-")) for key in ("seconds", "cpu_seconds")]
    return "| " + " | ".join(cells) + " |"


def main() -> None:
    """Train what is missing, measure, print a table."""
    command = parser(__doc__)
    command.add_argument(
        "--sets", nargs="*", choices=SETS, default=list(SETS), help="objectives of MORLHF (default all)"
    )
    command.add_argument("--seeds", type=int, default=SEEDS, help=f"of MORLHF (default {SEEDS})")
    arguments = command.parse_args()
    quiet()
    arguments.output.mkdir(parents=True, exist_ok=True)
    base = arguments.shared / "models/stories260k"
    prompts = json.loads((arguments.shared / "data/stories/prompts.json").read_text(encoding="utf-8"))
    print(
        f"| policy | {' | '.join(REWARDS)} | KL | seconds | CPU seconds |\n|{'---|' * (len(REWARDS) + 4)}", flush=True
    )
    shipped = {f"{name} of DIR": arguments.shared / f"models/policies/stories260k-{name}" for name in OBJECTIVES}
    for name, path in {"base": base, **shipped}.items():
        print(row({"name": name, **measure(path, base, prompts["validation"])}), flush=True)
    single = [Run(f"stories260k-{name}", {name: 1.0}, 0, False) for name in REWARDS]
    wanted = [(run, None) for run in single]
    for key in arguments.sets:
        scale = payoff(arguments.shared, arguments.output, key)
        wanted += [(run, scale) for run in runs(key, arguments.seeds)]
    for run, scale in wanted:
        folder, file = arguments.output / run.name, arguments.output / f"{run.name}.json"
        if not file.exists():
            trained = (folder / "config.json").exists()
            record = asdict(run) if trained else train(run, base, folder, prompts["train"], scale)
            record |= measure(folder, base, prompts["validation"])
            file.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        print(row(json.loads(file.read_text(encoding="utf-8"))), flush=True)


if __name__ == "__main__":
    main()
