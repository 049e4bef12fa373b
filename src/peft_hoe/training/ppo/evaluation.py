"""What responses to evaluation prompts earn, written as in training.

Shapes: B prompts on this process, N objectives.
"""

from __future__ import annotations

import numpy as np

from ...generation.prompts import PromptBatch
from ...generation.settings import evaluating, seeded
from ...tuner.functional import use_preference
from ..run.logged import objective_metrics
from ..run.processes import mean_rewards, over_processes
from .rollouts import have_end
from .router_ppo import RouterPPO


def process_share(rows: int, process: int, processes: int) -> tuple[list[int], int]:
    """The rows of a dataset that are this process's, as many as every other's, and how many of them are counted."""
    mine = list(range(process, rows, processes))
    most = -(-rows // processes)
    return mine + [0] * (most - len(mine)), len(mine)


def evaluation_metrics(ppo: RouterPPO, prompts: PromptBatch, counted: int) -> dict[str, float]:
    """Mean rewards, raw and normalised, and how responses ended, over all processes, at the router's preference.

    Random numbers are those of the settings' seed, the same at every evaluation; training's go on as if there had been none.

    Args:
        ppo: of a run whose scale is known.
        prompts: B of them.
        counted: how many, from the first; the others are there so that all processes do as much.
    """
    here = use_preference(ppo.policy, {ppo.router.adapter: ppo.router.preference.tolist()})
    with evaluating(ppo.policy), here, seeded(ppo.settings.seed), ppo.actor_critic.autocast():
        responses = ppo.respond(prompts, ppo.settings.decoding)
    raw = ppo.score_responses(prompts, responses)
    raw[counted:] = np.nan
    normalized = ppo.normalize(raw)
    means = {
        "reward": mean_rewards(ppo.accelerator, raw),
        "reward_normalized": mean_rewards(ppo.accelerator, normalized),
    }
    ended = have_end(responses, ppo.tokenizer.eos_token_id)[:counted].sum()
    total, length, ends = over_processes(
        ppo.accelerator, [counted, float(responses.mask[:counted].sum()), float(ended)]
    ).tolist()
    found = objective_metrics(ppo.state.objectives, means)
    scores = float(np.nansum(means["reward_normalized"] * ppo.weights.u))
    return found | {"objective/scores": scores, "completion/length": length / total, "completion/ended": ends / total}
