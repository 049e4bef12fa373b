"""The recipe on a base, policies and openings that no choice has seen: HoE untrained and trained against soups and TIES.

    python benchmarks/unseen_base.py --shared DIR --output unseen --plan
    python benchmarks/unseen_base.py --shared DIR --output unseen

The base is a TinyStories Llama of 656,000 parameters (`DIR/models/tinystories-656k`). Its policies *positive*, *rich* and
*dialog* are trained here, every weight, as `peft-hoe policy --full` trains them but for a rate of 2e-4. Everything else is at
its defaults: the build's, and `router_recipe.py`'s for routers of both kinds, which are left untrained where the verdict on
the validation prompts says so. `hoe_group` has routers by token that compare 8 answers to a prompt in place of a critic; they
are kept whatever a verdict would say.

For each pair three more policies are trained for mixtures of both rewards, on the scale of the payoff table. MORLHF answers
with the policy that was trained for a preference. `hoe_mixture` is HoE whose expert in the middle is made of the policy
trained for [.5, .5], in place of a merged one. All are also compared at MORLHF's preferences alone.

Fronts are measured on the 120 test openings and 840 further ones, which nothing has read before: the same sentences with
other names, animals and things. Greedy, and sampled at temperature 1; 48 new tokens. Every hypervolume is in
rewards normalised by the payoff table of the one-hot experts on the 120 validation prompts and 840 further openings,
reference point −0.1; the table's prompts are drawn in every interval. The verdicts see the same prompts as the table. The
difference that the design can see is the half width of the interval between two untrained methods, printed below each
table.

Every finished stage is a small file in `<output>/records`: rewards, versions, and what a router was judged. A stage that has
its record is not repeated. `--plan` prints the stages that are left, with minutes of one core.
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
from figures_setting import Setting, parser
from front_differences import front_table
from peft_hoe import ExpertSpec
from peft_hoe.evaluation import HoEMethod, Sweep
from peft_hoe.objectives import RewardNormalizer
from peft_hoe.policies import policy_gradient_config, train_policy
from peft_hoe.router_recipe import default_experts, default_routers
from router_training import NEW_TOKENS
from stages import Stage, add_arguments, go_on
from stories_rewards import REWARDS
from trained_routers import trained_routers

BASE, ENDING, END = "tinystories-656k", " ", "<|end_story|>"
OBJECTIVES = ("positive", "rich", "dialog")
SETS = {
    "positive,rich": OBJECTIVES[:2], "positive,dialog": ("positive", "dialog"), "rich,dialog": OBJECTIVES[1:],
    "all": OBJECTIVES,
}  # fmt: skip
UNTRAINED = ("hoe", "rs", "rs_norm", "rs_dense", "ties")
MIXED = ("hoe_mixture", "morlhf")  # for pairs
MIXTURES = (0.3, 0.5, 0.7)  # weights of the first of two objectives, for which policies are trained
TRAINED = {"hoe_token": "token", "hoe_module": "module", "hoe_group": "token"}
# Of `hoe_group`: 8 answers to a prompt in place of a critic, in 16 updates, which are as many answers as the recipe's.
GROUPED: dict[str, Any] = {
    "num_generations": 8, "baseline": "group", "per_device_train_batch_size": 512, "local_rollout_forward_batch_size": 512,
}  # fmt: skip
GROUPED_UPDATES = 16
AGAINST = ("hoe", "rs", "rs_dense", "ties", "morlhf")
POLICY = {"prompts": 8, "samples": 16, "max_steps": 120, "beta": 0.2, "scale_rewards": "batch", "learning_rate": 2e-4}
FURTHER = 840  # openings besides the 120 of a split
# Minutes of one quiet core, guesses for --plan.
MINUTES = {"policy": 3.0, "router": 2.0, "greedy": 1.0, "sampled": 1.5}


def further_openings() -> tuple[list[str], list[str]]:
    """Openings that nothing has read before, for the payoff table and for the fronts; none is in both.

    They are the prompts' own sentences with other names, animals, places and things.
    """
    names = "Ruby Oscar Ivy Hugo Nora Felix Clara Emil Rosa Arlo Daisy Otto Greta Paul Lena Theo Alma Carl Edith Noah".split()
    animals = "fox goat owl pony mouse bear hen wolf turtle squirrel lamb crow".split()
    places = "hill garden lake barn street castle river shop field pond tower library".split()
    things = "lamp drum shell ladder basket spoon bell rope crown blanket candle bucket".split()
    moods = "quiet proud hungry gentle curious tired lonely clever calm nervous merry lazy".split()
    sentences = (
        "Once upon a time, there was a {mood} {animal} named {name}. {name} went to the {place}",
        "There was a {mood} {animal} who lived near the {place}.",
        "One day, {name} found a {mood} {thing} in the {place}.",
        "{name} wanted a new {thing}, but",
        "{name} and {other} were playing in the {place}.",
        "It was a {mood} day at the {place}. {name}",
        "{name} lost the {thing} at the {place} and",
        'In the {place}, a {mood} {animal} saw a {thing}. "Look at that {thing}!" said {name}.',
    )
    generator = np.random.default_rng(656)

    def one(sentence: str) -> str:
        name, other = generator.choice(names, 2, replace=False)
        drawn = {key: generator.choice(of) for key, of in
                 (("animal", animals), ("place", places), ("thing", things), ("mood", moods))}  # fmt: skip
        return sentence.format(name=name, other=other, **drawn)

    found: dict[str, None] = {}
    for sentence in itertools.cycle(sentences):
        found.setdefault(one(sentence) + ENDING)
        if len(found) == 2 * FURTHER:
            break
    texts = list(found)
    return texts[:FURTHER], texts[FURTHER:]


class Problem(Setting):
    """One set of objectives on this base."""

    def __init__(self, arguments: argparse.Namespace, key: str) -> None:
        super().__init__(
            arguments.shared, arguments.output, SETS[key], arguments.output / "policies", arguments.limit,
            base=BASE, ending=ENDING, stop_strings=(END,),
        )  # fmt: skip
        self.key = key
        scale, fronts = further_openings()
        self.validation = [*self.validation, *scale[: arguments.limit]]
        self.openings = [*self.test, *fronts[: arguments.limit]]

    def trained(self, name: str, seed: int) -> Path:
        """HoE with the recipe's experts and routers of one kind."""
        n = len(self.objectives)
        routers = [{"preference": point, "kind": TRAINED[name]} for point in default_routers(n)]
        untrained = self.adapter(f"{name}-untrained", experts=default_experts(n), routers=routers)
        if name == "hoe_group":
            return trained_routers(self, untrained, name, seed, GROUPED_UPDATES, changes=GROUPED)
        return trained_routers(self, untrained, name, seed, judged=True)

    def mixtures(self) -> dict[tuple[float, ...], Path]:
        """`{λ: folder}` of the policies for mixtures of two objectives, whether trained or not."""
        folder = self.folder.parent / "policies"
        return {(weight, 1 - weight): folder / f"{BASE}-{self.key}-{weight}" for weight in MIXTURES}

    def morlhf(self) -> dict[tuple[float, ...], str]:
        """`{λ: folder}` of these and of the policies of single objectives."""
        one, other = self.policies.values()
        return {(1.0, 0.0): one, (0.0, 1.0): other} | {point: str(path) for point, path in self.mixtures().items()}

    def hoe(self, name: str, seed: int) -> Path:
        """The folder of one of the variants of HoE."""
        if name in TRAINED:
            return self.trained(name, seed)
        if name == "hoe_mixture":
            return self.adapter(name, experts=[ExpertSpec([0.5, 0.5], policy=str(self.mixtures()[0.5, 0.5]))])
        return self.adapter(name)

    def method(self, name: str, seed: int, sampled: bool) -> Any:
        """What answers prompts at a preference."""
        if name == "morlhf":
            return self.baseline(name, self.morlhf(), sampled=sampled, objectives=self.objectives)
        if name.startswith("hoe"):
            return HoEMethod(self.steered(self.hoe(name, seed)), self.tokenizer, decoding=self.decoding(sampled))
        return self.baseline(name, sampled=sampled)


# -- stages ---


def stages(arguments: argparse.Namespace) -> Iterator[Stage]:
    """All of them, in order."""
    for objective in OBJECTIVES:
        yield Stage(f"policy-{objective}", MINUTES["policy"], lambda o=objective: train(arguments, o))
    for key in arguments.sets:
        for name, seed in itertools.product(TRAINED, range(arguments.seeds)):
            minutes = MINUTES["router"] * len(SETS[key])
            yield Stage(f"{key}-{name}-{seed}", minutes, lambda k=key, n=name, s=seed: routers(arguments, k, n, s))
        pair = len(SETS[key]) == 2
        for weight in MIXTURES if pair else ():
            yield Stage(
                f"{key}-policy-{weight}", MINUTES["policy"], lambda k=key, w=weight: train_mixture(arguments, k, w)
            )
        for decoding, name in itertools.product(arguments.decodings, (*UNTRAINED, *MIXED * pair, *TRAINED)):
            for seed in range(arguments.seeds if name in TRAINED else 1):
                yield Stage(
                    f"{key}-{name}-{seed}-{decoding}", MINUTES[decoding],
                    lambda k=key, n=name, s=seed, d=decoding: swept(arguments, k, n, s, d),
                )  # fmt: skip


def train(arguments: argparse.Namespace, objective: str) -> dict[str, Any]:
    """Train the policy of an objective, unless its folder is there."""
    return train_for(arguments, arguments.output / "policies" / f"{BASE}-{objective}", {objective: 1})


def train_mixture(arguments: argparse.Namespace, key: str, weight: float) -> dict[str, Any]:
    """Train a policy for a mixture of two objectives, unless its folder is there."""
    problem = Problem(arguments, key)
    preference = dict(zip(problem.objectives, (weight, 1 - weight), strict=True))
    return train_for(arguments, problem.mixtures()[weight, 1 - weight], preference, problem.scale(sampled=True))


def train_for(
    arguments: argparse.Namespace, folder: Path, preference: dict[str, float], scale: RewardNormalizer | None = None
) -> dict[str, Any]:
    """Train a policy with these settings, unless its folder is there."""
    if (folder / "config.json").exists():
        return {"kept": True}

    def reward(objective: str) -> Any:
        return lambda prompts, completions: REWARDS[objective](prompts, [text.split(END)[0] for text in completions])

    base = arguments.shared / "models" / BASE
    prompts = json.loads((arguments.shared / "data/stories/prompts.json").read_text(encoding="utf-8"))["train"]
    args = policy_gradient_config(
        folder, **POLICY, temperature=1.0, max_completion_length=NEW_TOKENS, seed=0,
        use_cpu=True, disable_tqdm=True, logging_steps=12,
    )  # fmt: skip
    log = train_policy(
        base, args, rewards={objective: reward(objective) for objective in preference}, preference=preference,
        train_dataset=[{"prompt": prompt + ENDING} for prompt in prompts], normalizer=scale, say=lambda line: None,
    )  # fmt: skip
    return {"reward": [entry["reward"] for entry in log if "reward" in entry]}


def routers(arguments: argparse.Namespace, key: str, name: str, seed: int) -> dict[str, Any]:
    """Train routers; how they were judged."""
    found: dict[str, Any] = json.loads((Problem(arguments, key).trained(name, seed) / "training.json").read_text())
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


def table(arguments: argparse.Namespace, key: str, decoding: str) -> str:
    """Hypervolumes, and differences with intervals; empty without `hoe` and `rs_dense`."""
    folder = arguments.output / "-".join(SETS[key]) / "sweeps"
    sweeps: dict[str, Sweep] = {}
    for name in (*UNTRAINED, *MIXED, *TRAINED):
        runs = [folder / f"{name}-{seed}-{decoding}" for seed in range(arguments.seeds)]
        found = [Sweep.load(run) for run in runs if (run / "sweep.json").exists()]
        if found:
            sweeps[name] = Sweep.stack(found)
    if not {"hoe", "rs_dense"} <= sweeps.keys():
        return ""
    whole = {name: sweep for name, sweep in sweeps.items() if name != "morlhf"}  # it has fewer points
    parts = [f"### {key}, {decoding}", front_table(whole, AGAINST)]
    if "morlhf" in sweeps:
        parts += ["At MORLHF's preferences alone:", front_table(sweeps, AGAINST, sweeps["morlhf"].preferences)]
    return "\n\n".join(parts)


def main() -> None:
    """Do the stages that are left; print the tables."""
    command = parser(__doc__)
    command.add_argument("--sets", nargs="+", choices=SETS, default=list(SETS), help="sets of objectives (default all)")
    command.add_argument("--decodings", nargs="+", choices=["greedy", "sampled"], default=["greedy", "sampled"])
    command.add_argument("--seeds", type=int, default=2, help="of training (default 2)")
    command.add_argument("--texts", type=int, default=1, help="sampled texts for each opening (default 1)")
    command.add_argument("--limit", type=int, help="use the first prompts only")
    add_arguments(command)
    arguments = command.parse_args()
    if not go_on(stages(arguments), arguments):
        return
    parts = [table(arguments, key, decoding) for key, decoding in itertools.product(SETS, ("greedy", "sampled"))]
    text = "\n\n".join(part for part in parts if part)
    Path(arguments.output / "unseen_base.md").write_text(text + "\n", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
