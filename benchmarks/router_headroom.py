"""How far outward can the votes of a router move the front of two objectives?

    OMP_NUM_THREADS=1 python benchmarks/router_headroom.py --shared DIR --output headroom --policies POLICIES

A router that is trained at a preference can do two things: slide along the front, which another preference does for free, or
move it outward. Sliding is not a gain. So this script trains with fixed weights of objectives, those of the front's normal:
to first order, they see no gain in sliding. Everything else is `HoERouterTrainer` with `baseline="group"`: 16 updates of 512
answers, 8 to a prompt, the same number of answers as the recipe's.

Printed, for each base, kind and place:

- *cosine*: between the gradients of the two mean rewards with respect to the router's biases (a router by module has nothing
  else), before training. At -1 votes can only trade one reward for the other.
- *outward*: how far training moved the normalised rewards along the normal of the untrained front, on the validation prompts
  and 840 further openings, with its standard error over prompts. The normal there is that of the untrained front between the
  two preferences a tenth away. The same random numbers are drawn for both.

`DIR` and `POLICIES` as in `default_fronts.py`: policies of tinystories-656k are in `<its output>/tinystories-656k/policies`.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

import peft_hoe
from figures_setting import Setting, parser
from peft_hoe.evaluation import HoEMethod
from peft_hoe.router_recipe import default_experts
from peft_hoe.training import HoERouterConfig, HoERouterTrainer
from peft_hoe.training.ppo.advantages import leave_one_out
from peft_hoe.training.ppo.likelihoods import token_logprobs
from router_training import NEW_TOKENS
from stories_bases import BASES, StoriesSetting

FloatArray = NDArray[np.float64]
UPDATES, ANSWERS, GROUP, PARTS = 16, 512, 8, 8
TEXTS = 2  # for each prompt, where they are sampled
RATES = {"token": 3.2, "module": 0.4}  # by hidden size, for routers by token
# Name: (preference, whether the centroid has a merged expert)
PLACES = {"between centroid and corner": ((0.25, 0.75), True), "centroid, none merged": ((0.5, 0.5), False)}


def setting(arguments: argparse.Namespace, base: str) -> StoriesSetting:
    """The objectives *positive* and *rich* on a base."""
    objectives = ("positive", "rich")
    return StoriesSetting(arguments.shared, arguments.output / base, objectives, arguments.policies, None, base)


def measured(problem: Setting, model: Any, preferences: Any, sampled: bool) -> FloatArray:
    """Normalised rewards `(K, P, N)` on the validation prompts."""
    sweep = peft_hoe.sweep(
        prompts=problem.validation, rewards=problem.rewards, preferences=preferences, payoff=problem.scale(sampled),
        generate=HoEMethod(model, problem.tokenizer, decoding=problem.decoding(sampled)),
        texts=TEXTS if sampled else 1, batch_size=720, progress=False,
    )  # fmt: skip
    return np.asarray(problem.scale(sampled).normalize(sweep.values[0]))


def normal(points: FloatArray) -> FloatArray:
    """The weights `(2,)`, of sum 1, of which a chord from one point `(2,)` to another is no gain."""
    away = np.abs(points[1] - points[0])[::-1]
    return np.asarray(away / away.sum())


def neighbours(preference: tuple[float, float]) -> list[list[float]]:
    """A tenth to both sides."""
    return [[preference[0] + step, preference[1] - step] for step in (-0.1, 0.1)]


class Headroom:
    """One router.

    Args:
        problem: base, rewards and prompts.
        kind: of the router.
        preference: where it stands.
        merged: whether the centroid has a merged expert.
    """

    def __init__(self, problem: Setting, kind: str, preference: tuple[float, float], merged: bool, seed: int) -> None:
        self.problem, self.preference = problem, preference
        name = f"headroom-{kind}-{preference[0]:g}-{'merged' if merged else 'corners'}"
        router = {"preference": list(preference), "name": "r0", "kind": kind}
        self.path = problem.adapter(name, experts=default_experts(2) if merged else [], routers=[router])
        self.model, self.untrained = problem.steered(self.path), problem.steered(self.path)
        hidden = self.model.config.hidden_size
        args = HoERouterConfig(
            output_dir=str(problem.folder / name), max_steps=UPDATES, per_device_train_batch_size=ANSWERS,
            gradient_accumulation_steps=1, num_generations=GROUP, baseline="group", local_rollout_forward_batch_size=ANSWERS,
            learning_rate=RATES[kind] / (hidden if kind == "token" else 1), response_length=NEW_TOKENS, stop_token="eos",
            stop_strings=list(problem.stop_strings) or None, seed=seed, use_cpu=True, disable_tqdm=True, report_to=[],
            logging_steps=UPDATES, save_strategy="no", num_sample_generations=0,
        )  # fmt: skip
        self.trainer = HoERouterTrainer(
            args=args, processing_class=problem.tokenizer, model=self.model, reward_model=problem.rewards,
            train_dataset=[{"prompt": prompt} for prompt in problem.prompts["train"]], normalizer=problem.scale(True),
        )  # fmt: skip
        self.gradients: list[FloatArray] = []

    def train(self) -> None:
        """Along the normal; the first update's gradients are kept."""
        ppo: Any = self.trainer.ppo
        sides = measured(self.problem, self.untrained, neighbours(self.preference), sampled=True)
        weights, advantages = normal(sides.mean(1)), ppo.advantages

        def seen(rollout: Any, rewards: FloatArray, u: FloatArray) -> Any:
            if not self.gradients:
                self.gradients = [self.gradient(rollout, rewards, rows) for rows in np.split(np.arange(ANSWERS), PARTS)]
            return advantages(rollout, rewards, u)

        ppo.weigh, ppo.advantages = lambda rewards: weights, seen
        with contextlib.redirect_stdout(sys.stderr):  # the trainer prints its log
            self.trainer.train()

    def gradient(self, rollout: Any, rewards: FloatArray, rows: Any) -> FloatArray:
        """Of the mean of each reward with respect to the biases, from some answers: `(N, biases)`."""
        ppo: Any = self.trainer.ppo
        ids = rollout.responses.ids[rows]
        logits, _ = ppo.model(*rollout.sequences(torch.as_tensor(rows)), ids.shape[1])
        scores = (token_logprobs(logits, ids, 1.0) * rollout.responses.mask[rows]).sum(1)
        biases = [parameter for name, parameter in ppo.router.named_parameters() if name.endswith("bias")]
        found = []
        for column in leave_one_out(torch.as_tensor(rewards[rows], dtype=scores.dtype), GROUP).unbind(1):
            parts = torch.autograd.grad((column * scores).mean(), biases, retain_graph=True)
            found.append(torch.cat([part.flatten() for part in parts]).double().numpy())
        return np.stack(found)

    def cosine(self) -> float:
        """Between the gradients; only products of different parts of the answers are taken, whose noise is independent."""
        each = np.stack(self.gradients)  # (PARTS, N, biases)
        total = each.sum(0)
        products = total @ total.T - np.einsum("pni,pmi->nm", each, each)
        return float(products[0, 1] / np.sqrt(products[0, 0] * products[1, 1]))

    def row(self, sampled: bool) -> str:
        """Cells of the table."""
        before, *sides = measured(
            self.problem, self.untrained, [self.preference, *neighbours(self.preference)], sampled
        )
        after = measured(self.problem, self.model, [self.preference], sampled)[0]
        moved = (after - before) @ normal(np.stack(sides).mean(1))
        points = " | ".join(" / ".join(f"{value:.3f}" for value in side.mean(0)) for side in (before, after))
        return f"{points} | {moved.mean():+.3f} ± {moved.std(ddof=1) / len(moved) ** 0.5:.3f}"


def main() -> None:
    """Train, compare, print."""
    command = parser(__doc__)
    command.add_argument("--policies", type=Path, required=True, help="folder with the policies of tinystories-656k")
    command.add_argument("--bases", nargs="+", choices=BASES, default=list(BASES))
    command.add_argument("--kinds", nargs="+", choices=list(RATES), default=list(RATES))
    command.add_argument("--places", nargs="+", choices=list(PLACES), default=list(PLACES))
    command.add_argument("--seed", type=int, default=0)
    arguments = command.parse_args()
    print("| base | router | place | decoding | cosine | untrained | trained | outward |\n|" + "---|" * 8, flush=True)
    for base, place, kind in itertools.product(arguments.bases, arguments.places, arguments.kinds):
        found = Headroom(setting(arguments, base), kind, *PLACES[place], seed=arguments.seed)
        found.train()
        for sampled in (True, False):
            start = f"{base} | {kind} | {place} | {'sampled' if sampled else 'greedy'} | {found.cosine():.2f}"
            print(f"| {start} | {found.row(sampled)} |", flush=True)


if __name__ == "__main__":
    main()
