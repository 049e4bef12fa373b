"""Other signals than rewards of whole answers: does a router move the front further outward with them?

    OMP_NUM_THREADS=1 python benchmarks/router_signals.py --shared DIR --output headroom --policies POLICIES

Each signal moves one router, at [.25, .75] between the centroid and the corner, on *positive* and *rich*. What is printed is
what `router_headroom.py` prints, so that the lines can be compared with its own, and with its first one, which is repeated
here as `gradient`. Every signal that needs answers has as many, 8192.

- `softmin`: the same, but an answer is worth the soft minimum −τ ln Σ_i w_i exp(−R_i / τ) of its normalised rewards, τ = 0.3,
  w the normal of the front. It asks that an answer has both at once, not that answers have both on average.
- `morlhf`: the log-likelihood of answers of the policy that was trained for [.3, .7] of both rewards.
- `arrow`: no training. The weights of an expert's vote are the first right singular vector of its change B A, as in Arrow
  (arXiv 2405.11157). Arrow takes the absolute value of the projection, which a linear router cannot; so each vector points
  where it is positive on the average token, and the projections are standardised on the answers to the training prompts.
- `search`: no gradients. CMA-ES over one shift of the votes for each kind of module (q_proj, ...), 64 settings of 128
  answers with the same random numbers, worth w · R. The router's weights stay 0. Needs `pip install "peft-hoe[search]"`.

`POLICIES` as in `router_headroom.py`; `BASE-positive,rich-0.3` is among them.
"""

from __future__ import annotations

import contextlib
import itertools
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import AutoModelForCausalLM

import peft_hoe
from figures_setting import parser
from peft_hoe.evaluation import HoEMethod
from peft_hoe.generation.responses import generate_responses
from peft_hoe.training.ppo.updates import Targets
from router_headroom import PLACES, Headroom, measured, neighbours, normal, setting
from stories_bases import BASES

FloatArray = NDArray[np.float64]
TAU = 0.3
SETTINGS, ANSWERS = 64, 128  # of the search
PLACE = "between centroid and corner"


class Signals(Headroom):
    """One router that is moved by a signal of `SIGNALS`."""

    def weights(self) -> FloatArray:
        """The normal of the untrained front at the router's preference, `(2,)`."""
        return normal(measured(self.problem, self.untrained, neighbours(self.preference), sampled=True).mean(1))

    def gradient_of_rewards(self, policies: str) -> None:
        """As `router_headroom.py`."""
        self.train()

    def softmin(self, policies: str) -> None:
        """One worth for an answer, in both places of its rewards."""
        ppo: Any = self.trainer.ppo
        weights, advantages = self.weights(), ppo.advantages

        def soft(rollout: Any, rewards: FloatArray, u: FloatArray) -> Any:
            worth = -TAU * np.log((weights * np.exp(-rewards / TAU)).sum(1, keepdims=True))
            return advantages(rollout, np.repeat(worth, 2, axis=1), u)

        ppo.weigh, ppo.advantages = lambda rewards: weights, soft
        self._trained()

    def morlhf(self, policies: str) -> None:
        """Ones for advantages, on another policy's answers: the gradient of their log-likelihood."""
        ppo: Any = self.trainer.ppo
        teacher = AutoModelForCausalLM.from_pretrained(policies, dtype=torch.float32).eval()

        def respond(prompts: Any, decoding: Any) -> Any:
            return generate_responses(teacher, prompts, ppo.tokenizer, decoding, ppo.settings.rollout_batch)

        def ones(rollout: Any, rewards: FloatArray, u: FloatArray) -> Targets:
            mask = rollout.responses.mask
            return Targets(mask.float(), torch.zeros_like(rollout.values), torch.zeros(rewards.shape, dtype=torch.bool))

        ppo.respond, ppo.advantages = respond, ones
        self._trained()

    @torch.no_grad()
    def arrow(self, policies: str) -> None:
        """Singular vectors, standardised on the answers to the training prompts."""
        router = self.trainer.router
        voting = [self.trainer.training_state.experts.index(name) for name in router.voting_experts]
        directions = [_first_directions(layer, router.adapter, voting) for layer in router.layers]
        seen: list[list[torch.Tensor]] = [[] for _ in directions]

        def look(at: int, hidden: torch.Tensor) -> None:
            if hidden.shape[-2] == 1:  # a token of an answer; prompts come at once, padding among them
                seen[at].append(hidden.flatten(0, -2) @ directions[at].T)

        hooks = [
            layer.register_forward_pre_hook(lambda _, args, at=at: look(at, args[0]))
            for at, layer in enumerate(router.layers)
        ]
        texts = self.problem.prompts["train"]
        generate = HoEMethod(self.model, self.problem.tokenizer, decoding=self.problem.decoding(True))
        generate(texts, np.tile(self.preference, (len(texts), 1)))
        for hook in hooks:
            hook.remove()
        router.read()
        for own, vectors, parts in zip(router.linears, directions, seen, strict=True):
            projections = torch.cat(parts)
            mean, deviation = projections.mean(0), projections.std(0)
            scale = mean.sign() / deviation
            own.weight.copy_(vectors * scale[:, None])
            own.bias.sub_(mean * scale)
        self.trainer.training_state.put_router()

    def search(self, policies: str) -> None:
        """The best of all settings by CMA-ES."""
        import cma

        router, weights = self.trainer.router, self.weights()
        names = {module: name.rsplit(".", 1)[-1] for name, module in self.model.named_modules()}
        kinds = sorted({names[layer] for layer in router.layers})
        router.read()
        start = [own.bias.detach().clone() for own in router.linears]
        prompts = self.problem.prompts["train"][:ANSWERS]

        @torch.no_grad()
        def place(shifts: FloatArray) -> None:
            for layer, own, bias in zip(router.layers, router.linears, start, strict=True):
                own.bias.copy_(bias)
                own.bias[0] += float(shifts[kinds.index(names[layer])])
            self.trainer.training_state.put_router()

        def worth(shifts: FloatArray) -> float:
            place(shifts)
            method = HoEMethod(self.model, self.problem.tokenizer, decoding=self.problem.decoding(True))
            found = peft_hoe.sweep(
                prompts=prompts, rewards=self.problem.rewards, preferences=[self.preference], generate=method,
                payoff=self.problem.scale(True), batch_size=ANSWERS, progress=False,
            )  # fmt: skip
            return -float(found.normalized(found.points)[0] @ weights)

        options = {"popsize": 8, "maxiter": SETTINGS // 8, "seed": 1, "verbose": -9}
        best, _ = cma.fmin2(worth, np.zeros(len(kinds)), 0.5, options)
        place(np.asarray(best))

    def _trained(self) -> None:
        with contextlib.redirect_stdout(sys.stderr):
            self.trainer.train()


SIGNALS: dict[str, Callable[[Signals, str], None]] = {
    "gradient": Signals.gradient_of_rewards, "softmin": Signals.softmin, "morlhf": Signals.morlhf,
    "arrow": Signals.arrow, "search": Signals.search,
}  # fmt: skip


def _first_directions(layer: Any, adapter: str, experts: Sequence[int]) -> torch.Tensor:
    """The first right singular vector of each of some experts' changes of a module, `(V, d)`."""
    weight_a, weight_b = layer.factors(adapter)
    ranks = layer.hoe_layouts[adapter].ranks
    found = []
    for expert in experts:
        start = sum(ranks[:expert])
        rows = slice(start, start + ranks[expert])
        found.append(torch.linalg.svd(weight_b[:, rows] @ weight_a[rows], full_matrices=False).Vh[0])
    return torch.stack(found)


def main() -> None:
    """Move a router by each signal; print."""
    command = parser(__doc__)
    command.add_argument("--policies", required=True, type=Path, help="folder with policies of both bases")
    command.add_argument("--bases", nargs="+", choices=BASES, default=["tinystories-656k"])
    command.add_argument("--signals", nargs="+", choices=list(SIGNALS), default=list(SIGNALS))
    arguments = command.parse_args()
    print("| base | signal | decoding | untrained | trained | outward |\n|" + "---|" * 6, flush=True)
    for base, signal in itertools.product(arguments.bases, arguments.signals):
        found = Signals(setting(arguments, base), "token", *PLACES[PLACE], seed=0)
        SIGNALS[signal](found, str(arguments.policies / f"{base}-positive,rich-0.3"))
        for sampled in (True, False):
            print(f"| {base} | {signal} | {'sampled' if sampled else 'greedy'} | {found.row(sampled)} |", flush=True)


if __name__ == "__main__":
    main()
