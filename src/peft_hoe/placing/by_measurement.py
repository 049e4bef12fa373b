"""Placing by measurement: find where the front is weakest, add something there, and keep it if validation says so.

The paper does it by hand ("adaptively add one router expert based on the evaluation result", D.2). Here it is a loop:

1. rank the sweep's preferences by their weakness (`evaluation/front/weakness.py`);
2. at the weakest one add a merged expert, or a router and train it;
3. sweep the same validation prompts again;
4. keep what was added if the hypervolume has grown in at least `sure` of the bootstrap replicates, which draw the prompts, the
   same for both sweeps; else put the adapter back to the bit as it was, and try the next thing.

What is chosen on validation prompts looks better there than it is, the more the more is tried. Only a sweep of other prompts
says what was gained.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from ..errors import HoEError, HoEWarning
from ..evaluation.front.own_sweep import check_own_sweep, routers_of
from ..evaluation.front.weakness import Weakness, weaknesses
from ..evaluation.sweeps.sweep import Sweep
from ..experts.saved_adapter import open_adapter
from ..generation.prompt_rows import split_rows
from ..preference import FloatArray
from ..tuner.functional import adapter_of
from .additions import Additions
from .attempts import Attempts
from .budget import Budget
from .placement import Placement, Trial

SURE = 0.9  # as for a router's verdict


def place(
    model: Any,
    sweep: Sweep,
    *,
    budget: Budget,
    tokenizer: Any,
    rewards: Any,
    prompts: Any = None,
    source: Any = None,
    base: Any = None,
    args: Any = None,
    trainer: str = "ppo",
    train_dataset: Any = None,
    router_kind: str = "token",
    sure: float = SURE,
    batch_size: int = 128,
    trials: Sequence[Trial] = (),
    after: Callable[[Trial, Sweep], Any] | None = None,
    say: Callable[[str], Any] | None = None,
) -> Placement:
    """Add merged experts and routers to an adapter where its front is weak, as long as that makes the front better.

    Args:
        model: a PeftModel with a HoE adapter; changed in place.
        sweep: of this adapter as it is now, on prompts that are kept for choices, one run, on a payoff table's scale. Things
            are placed at its preferences, and measured at all of them.
        budget: of parameters or seconds.
        tokenizer: the policy's.
        rewards: as in `peft_hoe.sweep`.
        prompts: the sweep's prompts as rows, where rewards read other columns of them; default the sweep's.
        source: directory or Hub id of the adapter as it was built. Merged experts are made of the policies that its build
            report names, with its settings. None adds no experts.
        base: the base model's directory or Hub id; default what `source` names.
        args: a configuration to train routers with, as in `train_routers`. None adds no routers.
        trainer: "ppo", "grpo" or "distill".
        train_dataset: prompts that routers train on; not the sweep's.
        router_kind: "token" or "module".
        sure: share of the replicates in which the hypervolume must have grown.
        batch_size: completions at once; a sampled sweep keeps its own.
        trials: of an earlier call that was interrupted, whose kept ones the model has; they are not tried again, and count in
            the budget of parameters.
        after: is given each trial with the sweep as it is then, such as to save both.
        say: gets the story, line by line, such as `print`; and with `auto_stop` where the training of a router ended.

    Returns:
        the trials and the last sweep. What was not kept has left nothing in the model, whatever fails.

    Raises:
        HoEError: a budget, a sweep or an option that cannot be, a sweep of another adapter; the model is as before.
        RewardError: a reward fails.

    Warns:
        HoEWarning: the adapter's calibration is dropped, since it has gained something.

    >>> import tempfile
    >>> from peft_hoe import Decoding, demo, place, sweep
    >>> from peft_hoe.placing import Budget
    >>> directory = tempfile.mkdtemp()
    >>> _ = demo.build_demo_adapter(directory, experts=[])
    >>> model, tokenizer = demo.load_demo_adapter(experts=[]), demo.load_tokenizer()
    >>> front = sweep(
    ...     model, tokenizer, demo.load_prompts()[:12], demo.REWARDS, [[1, 0], [0.5, 0.5], [0, 1]], decoding=Decoding(24),
    ...     progress=False,
    ... )
    >>> found = place(
    ...     model, front, budget=Budget(parameters=100_000), tokenizer=tokenizer, rewards=demo.REWARDS, source=directory
    ... )
    >>> print(found.story())
    weakest at [0.5, 0.5]: regret ... of it to the hull; contributes ... of hypervolume
      expert 'centroid' at [0.5, 0.5], ... parameters: hypervolume ... of the replicates: ...
    everything was tried; kept ...
    """
    say = say or (lambda line: None)
    rows = _check(model, sweep, budget, prompts, sure)
    additions = Additions(
        model, tokenizer, rewards, None if source is None else open_adapter(source), base, args, trainer, train_dataset,
        router_kind, say,
    )  # fmt: skip
    attempts = Attempts(additions, rows, sure, batch_size)
    adapter = adapter_of(model)
    calibrated, started = adapter.config.calibration is not None, time.monotonic()
    done, current = list(trials), sweep
    ended = None
    while ended is None:
        spent = sum(trial.parameters for trial in done if trial.kept)
        ended = budget.used(spent, time.monotonic() - started)
        following = next(_open(additions, current, done), None) if ended is None else None
        if ended is None and following is None:
            ended = "everything was tried"
        if following is not None:
            kind, weak = following
            left = None if budget.parameters is None else budget.parameters - spent
            trial, current = attempts.attempt(kind, weak, current, left)
            for line in trial.told_after(done[-1] if done else None):
                say(line)
            done.append(trial)
            if after is not None:
                after(trial, current)
    found = Placement(done, current, str(ended))
    say(found.story().splitlines()[-1])
    if calibrated and adapter.config.calibration is None:
        warnings.warn(
            "the adapter's calibration was made for other experts and routers, so it is dropped; calibrate again",
            HoEWarning,
            stacklevel=2,
        )
    return found


def _check(model: Any, sweep: Sweep, budget: Any, prompts: Any, sure: float) -> list[Any]:
    """See that the front is this model's and can be measured again; the validation prompts as rows."""
    if not isinstance(budget, Budget):
        raise HoEError(
            f"budget is {budget!r}; give a Budget, such as Budget(parameters=100_000)", argument="budget", value=budget
        )
    if not isinstance(sure, (int, float)) or not 0 < sure <= 1:
        raise HoEError(f"sure is {sure!r}; it must be above 0 and at most 1", argument="sure", value=sure)
    check_own_sweep(model, sweep)
    if len(sweep.rewards) != 1 or not sweep.runs:
        raise HoEError(
            f"the sweep has {len(sweep.rewards)} runs and says how {len(sweep.runs)} of them were made; give the one of this "
            "model that peft_hoe.sweep returned",
            argument="sweep",
        )
    said = routers_of(sweep)
    if said != "keep" and adapter_of(model).config.routers:
        raise HoEError(
            f"the sweep was made with routers={said!r}, but the adapter has routers, and what is added is measured with them; "
            "sweep with routers='keep'",
            argument="sweep",
            value=said,
        )
    weaknesses(sweep, replicates=1)  # raises where there is no scale, or no front
    if prompts is None:
        return list(sweep.prompts)
    rows = list(prompts)
    if split_rows(rows)[0] != list(sweep.prompts):
        raise HoEError("prompts are other prompts than the sweep's; give the same, in its order", argument="prompts")
    return rows


def _open(additions: Additions, sweep: Sweep, done: Sequence[Trial]) -> Iterator[tuple[str, Weakness]]:
    """What has not been tried, the weakest preference first."""
    config = adapter_of(additions.model).config
    taken: FloatArray = np.concatenate([config.expert_preferences, config.router_preferences])
    tried = {(trial.kind, trial.place) for trial in done}
    closed = {trial.kind for trial in done if trial.after is None}  # one was too large, and so are the others
    for weak in weaknesses(sweep):
        here = tuple(weak.preference.values())
        if np.abs(taken - np.asarray(here)).max(axis=1).min() < 1e-6:
            continue
        yield from ((kind, weak) for kind in additions.kinds if kind not in closed and (kind, here) not in tried)
