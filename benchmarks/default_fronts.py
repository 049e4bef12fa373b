"""HoE at its defaults, untrained and trained, against soups, merges and policies that were trained for mixtures.

    python benchmarks/default_fronts.py --base stories260k --shared DIR --output fronts --plan
    python benchmarks/default_fronts.py --base stories260k --shared DIR --output fronts
    python benchmarks/default_fronts.py --base tinystories-656k --shared DIR --output fronts

The first base, a TinyStories Llama of 260,000 parameters, is the one that defaults were chosen on, with the policies of
`DIR/models/policies`. The second one, of 656,000 parameters, is one that they were not chosen on. Its policies *positive*,
*rich* and *dialog* are trained here, every weight, as `peft-hoe policy --full` trains them but for a rate of 2e-4. Everything
else is at its defaults: the build's, and `router_recipe.py`'s for routers of both kinds. Routers are kept whatever the
verdict on the validation prompts says; what it said is in their records. `hoe_group` has routers by token that compare 8
answers to a prompt in place of a critic. `hoe_placed` begins with one-hot experts, and `place` adds experts and routers where
the validation prompts' greedy front is weak, for ten minutes.

For each set more policies are trained for mixtures of its rewards, on the scale of the payoff table. MORLHF answers with the
policy that was trained for a preference. `hoe_mixture` is HoE whose expert in the middle is made of the policy trained for even
weights, in place of a merged one, and `hoe_mixture_token` has trained routers by token besides. `hoe_bone`, for two
objectives, has experts of the policies for [.7, .3] and [.3, .7] at the corners, as bone soups have. All are also compared at
MORLHF's preferences alone.

Fronts are measured on the 120 test openings and 840 further ones, which no choice has read: the same sentences with
other names, animals and things. Greedy, and sampled at temperature 1; 48 new tokens. Every hypervolume is in
rewards normalised by the payoff table of the one-hot experts on the 120 validation prompts and 840 further openings,
reference point −0.1; the table's prompts are drawn in every interval. The verdicts see the same prompts as the table. The
difference that the design can see is the half width of the interval between two untrained methods, printed below each
table.

Every finished stage is a small file in `<output>/<base>/records`: rewards, versions, and what a router was
judged; beside it lie the routers themselves. A stage that has its record is not repeated. Of another run copy only the routers
and their records there: then these are not trained again. `--plan` prints the stages that are left, with minutes of one core.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

import peft_hoe
from figures_setting import parser
from front_differences import cell, drawn_volumes, front_table
from peft_hoe import ExpertSpec
from peft_hoe.evaluation import HoEMethod, Sweep
from peft_hoe.objectives import RewardNormalizer
from peft_hoe.policies import policy_gradient_config, train_policy
from peft_hoe.preference import uniform
from peft_hoe.router_recipe import UPDATES, default_experts, default_routers
from router_training import NEW_TOKENS
from stages import Stage, add_arguments, go_on
from stories_bases import BASES, OWN_POLICIES, StoriesSetting
from stories_rewards import REWARDS
from trained_routers import keep_routers, placed_adapter, restored, trained_routers

OBJECTIVES = ("positive", "rich", "dialog")
SETS = {
    "positive,rich": OBJECTIVES[:2], "positive,dialog": ("positive", "dialog"), "rich,dialog": OBJECTIVES[1:],
    "all": OBJECTIVES,
}  # fmt: skip
UNTRAINED = ("hoe", "rs", "rs_norm", "rs_dense", "ties", "pcb", "mod")
MIXED = ("hoe_mixture", "hoe_bone", "morlhf")
TRAINED = {
    "hoe_token": "token", "hoe_module": "module", "hoe_mixture_token": "token", "hoe_group": "token", "hoe_placed": "token",
}  # fmt: skip
PLACED_SECONDS = 600
# Of `hoe_group`: 8 answers to a prompt in place of a critic, in 16 updates, which are as many answers as the recipe's.
GROUPED: dict[str, Any] = {
    "num_generations": 8, "baseline": "group", "per_device_train_batch_size": 512, "local_rollout_forward_batch_size": 512,
}  # fmt: skip
GROUPED_UPDATES = 16
AGAINST = ("hoe", "rs", "rs_dense", "ties", "morlhf")
RELATIVE = ("hoe", "hoe_token", "hoe_mixture", "hoe_mixture_token")
DIFFERENCES = (
    ("hoe", "rs_dense"), ("hoe", "ties"), ("hoe_token", "hoe"), ("hoe_module", "hoe"), ("hoe_token", "ties"),
)  # fmt: skip
POLICY = {"prompts": 8, "samples": 16, "max_steps": 120, "beta": 0.2, "scale_rewards": "batch", "learning_rate": 2e-4}
# Minutes of one quiet core, guesses for --plan.
MINUTES = {"policy": 3.0, "router": 2.0, "greedy": 1.0, "sampled": 1.0}


class Problem(StoriesSetting):
    """One set of objectives on a base."""

    def __init__(self, arguments: argparse.Namespace, key: str) -> None:
        folder = arguments.output / "policies"
        super().__init__(arguments.shared, arguments.output, SETS[key], folder, arguments.limit, arguments.base)
        self.key = key

    def trained(self, name: str, seed: int) -> Path:
        """HoE with the recipe's experts and routers of one kind."""
        if name == "hoe_placed":
            return placed_adapter(self, name, seed, PLACED_SECONDS)
        routers = [{"preference": point, "kind": TRAINED[name]} for point in default_routers(len(self.objectives))]
        untrained = self.adapter(f"{name}-untrained", experts=self.experts(name), routers=routers)
        restored(untrained, self.kept(name, seed), self.folder / "trained" / f"{name}-seed{seed}")
        updates, changes = (GROUPED_UPDATES, GROUPED) if name == "hoe_group" else (UPDATES, {})
        return trained_routers(self, untrained, name, seed, updates, judged=True, changes=changes)

    def kept(self, name: str, seed: int) -> Path:
        """The file of trained routers beside their record."""
        return self.folder.parent / "records" / f"{self.key}-{name}-{seed}.safetensors"

    def experts(self, name: str) -> list[Any]:
        """The experts besides the objectives' own: the recipe's, merged or the policy trained for its preference."""
        merged = default_experts(len(self.objectives))
        if "mixture" not in name:
            return merged
        return [ExpertSpec(point, policy=str(self.mixtures()[tuple(point)])) for point in merged]

    def mixtures(self) -> dict[tuple[float, ...], Path]:
        """`{λ: folder}` of the policies for mixtures, whether trained or not."""
        folder = self.folder.parent / "policies"
        return {
            point: folder / f"{self.stories.name}-{self.key}-{weights}" for weights, point in mixtures(self.key).items()
        }

    def morlhf(self) -> dict[tuple[float, ...], str]:
        """`{λ: folder}` of these and of the policies of single objectives."""
        n = len(self.objectives)
        single = {tuple(np.eye(n)[i].tolist()): path for i, path in enumerate(self.policies.values())}
        return single | {point: str(path) for point, path in self.mixtures().items()}

    def hoe(self, name: str, seed: int) -> Path:
        """The folder of one of the variants of HoE."""
        if name in TRAINED:
            return self.trained(name, seed)
        if name == "hoe_bone":
            ends = sorted(self.mixtures().items(), reverse=True)  # the most of the first objective first
            policies = {name: str(ends[k][1]) for name, k in zip(self.objectives, (0, -1), strict=True)}
            return self.adapter("hoe_bone", policies)
        return self.adapter(name, experts=self.experts(name)) if name == "hoe_mixture" else self.adapter(name)

    def method(self, name: str, seed: int, sampled: bool) -> Any:
        """What answers prompts at a preference."""
        if name == "morlhf":
            return self.baseline(name, self.morlhf(), sampled=sampled, objectives=self.objectives)
        if not name.startswith("hoe"):
            return self.baseline(name, sampled=sampled)
        model = self.steered(self.hoe(name, seed))
        for router in model.peft_config["default"].routers or [] if name in TRAINED else []:
            model.mark_trained(router.name)  # whatever the verdict was
        return HoEMethod(model, self.tokenizer, decoding=self.decoding(sampled))


def mixtures(key: str) -> dict[str, tuple[float, ...]]:
    """The preferences that policies are trained for, by their names: the middle, and points around it."""
    if len(SETS[key]) == 2:
        return {f"{weight}": (weight, 1 - weight) for weight in (0.3, 0.5, 0.7)}
    around = [[0.2 if i == k else 0.4 for i in range(3)] for k in range(3)]
    return {"even": tuple(uniform(3).tolist())} | {"-".join(map(str, point)): tuple(point) for point in around}


# -- stages ---


def stages(arguments: argparse.Namespace) -> Iterator[Stage]:
    """All of them, in order."""
    for objective in () if arguments.base in OWN_POLICIES else OBJECTIVES:
        yield Stage(f"policy-{objective}", MINUTES["policy"], lambda o=objective: train(arguments, o))
    for key in arguments.sets:
        for weights in mixtures(key):
            yield Stage(
                f"{key}-policy-{weights}", MINUTES["policy"], lambda k=key, w=weights: train_mixture(arguments, k, w)
            )
        for name, seed in itertools.product(TRAINED, range(arguments.seeds)):
            placed = name == "hoe_placed"
            minutes = PLACED_SECONDS / 60 + 4 if placed else MINUTES["router"] * len(SETS[key])
            yield Stage(f"{key}-{name}-{seed}", minutes, lambda k=key, n=name, s=seed: routers(arguments, k, n, s))
        names = [name for name in (*UNTRAINED, *MIXED, *TRAINED) if name != "hoe_bone" or len(SETS[key]) == 2]
        for decoding, name in itertools.product(arguments.decodings, names):
            for seed in range(arguments.seeds if name in TRAINED else 1):
                yield Stage(
                    f"{key}-{name}-{seed}-{decoding}", MINUTES[decoding],
                    lambda k=key, n=name, s=seed, d=decoding: swept(arguments, k, n, s, d),
                )  # fmt: skip


def train(arguments: argparse.Namespace, objective: str) -> dict[str, Any]:
    """Train the policy of an objective, unless its folder is there."""
    return train_for(arguments, arguments.output / "policies" / f"{arguments.base}-{objective}", {objective: 1})


def train_mixture(arguments: argparse.Namespace, key: str, weights: str) -> dict[str, Any]:
    """Train a policy for a mixture of objectives, unless its folder is there."""
    problem, point = Problem(arguments, key), mixtures(key)[weights]
    preference = dict(zip(problem.objectives, point, strict=True))
    return train_for(arguments, problem.mixtures()[point], preference, problem.scale(sampled=True))


def train_for(
    arguments: argparse.Namespace, folder: Path, preference: dict[str, float], scale: RewardNormalizer | None = None
) -> dict[str, Any]:
    """Train a policy with these settings, unless its folder is there."""
    if (folder / "config.json").exists():
        return {"kept": True}

    stories = BASES[arguments.base]

    def reward(objective: str) -> Any:
        return lambda prompts, completions: REWARDS[objective](
            prompts, [stories.until_its_end(text) for text in completions]
        )

    base = arguments.shared / "models" / stories.name
    prompts = json.loads((arguments.shared / "data/stories/prompts.json").read_text(encoding="utf-8"))["train"]
    args = policy_gradient_config(
        folder, **POLICY, temperature=1.0, max_completion_length=NEW_TOKENS, seed=0,
        use_cpu=True, disable_tqdm=True, logging_steps=12,
    )  # fmt: skip
    log = train_policy(
        base, args, rewards={objective: reward(objective) for objective in preference}, preference=preference,
        train_dataset=[{"prompt": prompt + stories.ending} for prompt in prompts], normalizer=scale, say=lambda line: None,
    )  # fmt: skip
    return {"reward": [entry["reward"] for entry in log if "reward" in entry]}


def routers(arguments: argparse.Namespace, key: str, name: str, seed: int) -> dict[str, Any]:
    """Train routers; how they were judged."""
    problem = Problem(arguments, key)
    folder = problem.trained(name, seed)
    if name != "hoe_placed":  # which has experts of its own besides
        keep_routers(folder, problem.kept(name, seed))
    found: dict[str, Any] = json.loads((folder / "training.json").read_text())
    return found


def swept(arguments: argparse.Namespace, key: str, name: str, seed: int, decoding: str) -> dict[str, Any]:
    """Sweep a method; its mean rewards."""
    problem, sampled = Problem(arguments, key), decoding == "sampled"
    found = peft_hoe.sweep(
        prompts=problem.openings, rewards=problem.rewards, generate=problem.method(name, seed, sampled), name=name,
        payoff=problem.scale(sampled), texts=arguments.texts if sampled else 1, batch_size=720,
        output_dir=problem.folder / "sweeps" / f"{name}-{seed}-{decoding}", progress=False,
        preferences=sorted(problem.morlhf()) if name == "morlhf" else "grid",
    )  # fmt: skip
    return {"preferences": found.preferences.tolist(), "rewards": np.round(found.points, 5).tolist()}


# -- tables ---


def sweeps_of(arguments: argparse.Namespace, key: str, decoding: str) -> dict[str, Sweep]:
    """Those that are there, by method; empty without `hoe` and `rs_dense`."""
    folder = arguments.output / "-".join(SETS[key]) / "sweeps"
    sweeps: dict[str, Sweep] = {}
    for name in (*UNTRAINED, *MIXED, *TRAINED):
        runs = [folder / f"{name}-{seed}-{decoding}" for seed in range(arguments.seeds)]
        found = [Sweep.load(run) for run in runs if (run / "sweep.json").exists()]
        if found:
            sweeps[name] = Sweep.stack(found)
    return sweeps if {"hoe", "rs_dense"} <= sweeps.keys() else {}


def without_morlhf(sweeps: dict[str, Sweep]) -> dict[str, Sweep]:
    """Those that have all preferences."""
    return {name: sweep for name, sweep in sweeps.items() if name != "morlhf"}


def table(sweeps: dict[str, Sweep], title: str) -> str:
    """Hypervolumes, and differences with intervals."""
    parts = [f"### {title}", front_table(without_morlhf(sweeps), AGAINST)]
    if "morlhf" in sweeps:
        parts += ["At MORLHF's preferences alone:", front_table(sweeps, AGAINST, sweeps["morlhf"].preferences)]
    return "\n\n".join(parts)


def summary(fronts: dict[str, dict[str, Sweep]]) -> str:
    """One line for each set and decoding: hypervolumes relative to `rs_dense`, and the differences that matter most."""
    header = ["", *(f"{name} / rs_dense" for name in RELATIVE), *(f"{one} − {other}" for one, other in DIFFERENCES)]
    lines = [f"| {' | '.join(header)} |", "|" + "---|" * len(header)]
    for title, sweeps in fronts.items():
        estimates, volumes = drawn_volumes(without_morlhf(sweeps))
        cells = [f"{estimates[name] / estimates['rs_dense']:.2f}" if name in estimates else "" for name in RELATIVE]
        for one, other in DIFFERENCES:
            known = one in estimates and other in estimates
            cells.append(cell(estimates[one] - estimates[other], volumes[one] - volumes[other], "+") if known else "")
        lines.append(f"| {title} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Do the stages that are left; print the tables."""
    command = parser(__doc__)
    command.add_argument("--base", choices=BASES, required=True)
    command.add_argument("--sets", nargs="+", choices=SETS, default=list(SETS), help="sets of objectives (default all)")
    command.add_argument("--decodings", nargs="+", choices=["greedy", "sampled"], default=["greedy", "sampled"])
    command.add_argument("--seeds", type=int, default=2, help="of training (default 2)")
    command.add_argument("--texts", type=int, default=1, help="sampled texts for each opening (default 1)")
    command.add_argument("--limit", type=int, help="use the first prompts only")
    add_arguments(command)
    arguments = command.parse_args()
    arguments.output /= arguments.base
    if not go_on(stages(arguments), arguments):
        return
    fronts = {
        f"{key}, {decoding}": sweeps_of(arguments, key, decoding)
        for key, decoding in itertools.product(SETS, ("greedy", "sampled"))
    }
    known = {title: sweeps for title, sweeps in fronts.items() if sweeps}
    text = "\n\n".join([summary(known), *(table(sweeps, title) for title, sweeps in known.items())])
    (arguments.output / "default_fronts.md").write_text(text + "\n", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
