"""A saved adapter gains and loses experts, routers and objectives: a new adapter is written, in another place or in its own.

What stays is copied bit by bit. A new expert is built as the others were, with the settings of the adapter's build report, from
a policy of its own, or as a merge of the policies that the report names. As a build does, one that was killed goes on.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ..config import HoEConfig
from ..errors import ExpertError, HoEWarning
from ..growth import Change, with_expert, with_objective, with_router, without_expert, without_router
from ..output_directory import check_output, disk_errors, resumable_directory
from ..preference import one_hot
from ..specs import ExpertSpec, as_spec
from ..unfinished import Unfinished
from .adapter_files import WRITTEN
from .changed_report import changed_report
from .checkpoints import PathOrHubId
from .devices import CPU
from .new_expert import NewExpert, build_expert, expert_key
from .saved_adapter import SavedAdapter, expert_weights, open_adapter, write_adapter_changes


def add_expert(
    adapter: PathOrHubId,
    expert: Any,
    output_dir: PathOrHubId,
    *,
    base: PathOrHubId | None = None,
    device: torch.device | str = CPU,
    overwrite: bool = False,
) -> HoEConfig:
    """Write an adapter with one more expert.

    Args:
        adapter: directory or Hub id of a HoE adapter.
        expert: a preference or `ExpertSpec`. It is built from its `policy`, or as a merge of the policies that the adapter's
            build report names.
        output_dir: where the new adapter goes; the adapter's own directory with `overwrite`.
        base: directory or Hub id; default the one that the adapter names.
        device: where the expert is computed, "cpu" or "cuda", as for `build_adapter`.
        overwrite: whether an adapter in `output_dir` may be replaced.

    Returns:
        the new configuration.

    Raises:
        ExpertError: its name or preference is taken, or the device is none for a build.
        CheckpointError: something cannot be read, found or written.

    >>> from peft_hoe import demo
    >>> from peft_hoe.experts import add_expert
    >>> report = demo.build_demo_adapter("adapter", experts=[])
    >>> add_expert("adapter", [0.5, 0.5], "grown").expert_names
    ['cheerful', 'vivid', 'centroid']
    """
    saved = open_adapter(adapter)
    spec: ExpertSpec = as_spec(expert, ExpertSpec)
    plain = replace(spec, policy=None)
    with_expert(saved.config, plain, dict.fromkeys(saved.low_rank, 1))  # refuses before anything is built
    with _place(output_dir, overwrite, expert_key(saved, spec, base)) as place:
        built = build_expert(saved, spec, base, place.state, device)
        change = with_expert(saved.config, plain, built.ranks(saved.low_rank))
        return _finished(saved, [change], built, place, output_dir)


def add_objective(
    adapter: PathOrHubId,
    name: str,
    policy: PathOrHubId,
    output_dir: PathOrHubId,
    *,
    expert: Any = None,
    base: PathOrHubId | None = None,
    device: torch.device | str = CPU,
    overwrite: bool = False,
) -> HoEConfig:
    """Write an adapter with one more objective, the last, and an expert for it.

    Args:
        adapter: directory or Hub id of a HoE adapter.
        name: of the objective.
        policy: directory or Hub id of a policy that was trained for it.
        output_dir: as in `add_expert`.
        expert: a preference of all objectives with the new one that the policy was trained for, or `ExpertSpec`; default the
            new objective alone.
        base: as in `add_expert`.
        device: as in `add_expert`.
        overwrite: as in `add_expert`.

    Raises:
        ExpertError: the name is taken, or the expert's is, or the device is none for a build.
        CheckpointError: something cannot be read, found or written.

    >>> from peft_hoe import demo
    >>> from peft_hoe.experts import add_objective, build_adapter
    >>> report = build_adapter(demo.BASE, {"cheerful": demo.POLICIES["cheerful"]}, "adapter", progress=False)
    >>> config = add_objective("adapter", "vivid", demo.POLICIES["vivid"], "grown")
    >>> config.objectives, config.default_preference
    (['cheerful', 'vivid'], [1.0, 0.0])
    """
    saved = open_adapter(adapter)
    n = len(saved.config.objectives or []) + 1
    spec: ExpertSpec = as_spec(one_hot(n - 1, n) if expert is None else expert, ExpertSpec)
    if spec.policy is not None:
        raise ExpertError(
            f"the expert of objective {name!r} names the policy {spec.policy!r} beside policy={policy!r}; give one of them, as "
            "policy",
            argument="expert", value=spec.policy,
        )  # fmt: skip
    with_objective(saved.config, name, spec, dict.fromkeys(saved.low_rank, 1))  # refuses before anything is built
    own = replace(spec, policy=policy)
    with _place(output_dir, overwrite, expert_key(saved, own, base)) as place:
        built = build_expert(saved, own, base, place.state, device)
        change = with_objective(saved.config, name, spec, built.ranks(saved.low_rank))
        return _finished(saved, [change], built, place, output_dir)


def add_router(adapter: PathOrHubId, router: Any, output_dir: PathOrHubId, *, overwrite: bool = False) -> HoEConfig:
    """Write an adapter with one more router, which changes nothing until it is trained.

    Args:
        adapter: directory or Hub id of a HoE adapter.
        router: a preference or `RouterSpec`.
        output_dir: as in `add_expert`.
        overwrite: as in `add_expert`.

    Raises:
        ExpertError: its name or preference is taken.
        CheckpointError: something cannot be read or written.

    >>> from peft_hoe import demo
    >>> from peft_hoe.experts import add_router
    >>> report = demo.build_demo_adapter("adapter")
    >>> add_router("adapter", [0.75, 0.25], "grown").router_names
    ['r0']
    """
    saved = open_adapter(adapter)
    change = with_router(saved.config, router)
    with _place(output_dir, overwrite) as place:
        return _finished(saved, [change], None, place, output_dir)


def remove(
    adapter: PathOrHubId,
    output_dir: PathOrHubId,
    *,
    experts: Sequence[str] = (),
    routers: Sequence[str] = (),
    overwrite: bool = False,
) -> HoEConfig:
    """Write an adapter without some experts and routers.

    Args:
        adapter: directory or Hub id of a HoE adapter.
        output_dir: as in `add_expert`.
        experts: names; a router that stays must not vote for one.
        routers: names, removed first.
        overwrite: as in `add_expert`.

    Raises:
        ExpertError: there is no such expert or router, none is named, or a router votes for an expert.
        CheckpointError: something cannot be read or written.

    >>> from peft_hoe import demo
    >>> from peft_hoe.experts import remove
    >>> report = demo.build_demo_adapter("adapter")
    >>> remove("adapter", "smaller", experts=["centroid"]).expert_names
    ['cheerful', 'vivid']
    """
    if not experts and not routers:
        raise ExpertError("nothing is to be removed; name experts or routers", argument="experts", value=list(experts))
    saved = open_adapter(adapter)
    changes: list[Change] = []
    for name in routers:
        changes.append(without_router(changes[-1].after if changes else saved.config, name))
    for name in experts:
        changes.append(without_expert(changes[-1].after if changes else saved.config, name, saved.low_rank))
    with _place(output_dir, overwrite) as place:
        return _finished(saved, changes, None, place, output_dir)


@contextmanager
def _place(output_dir: PathOrHubId, overwrite: bool, key: str | None = None) -> Iterator[Unfinished]:
    """Where the new adapter grows; after a kill the same work is gone on with where it has a key."""
    output = Path(output_dir)
    check_output(output, overwrite, names=WRITTEN)
    with resumable_directory(output, key) as place:
        yield place


def _finished(
    saved: SavedAdapter, changes: Sequence[Change], built: NewExpert | None, place: Unfinished, output_dir: PathOrHubId
) -> HoEConfig:
    config, output = changes[-1].after, Path(output_dir)
    report = changed_report(saved, config, built, output) if saved.report else {}
    for same in [] if built is None else _same_experts(saved, built):
        new = config.expert_names[-1]
        note = f"expert {new!r} has exactly the weights of expert {same!r}; is one model given under two names?"
        warnings.warn(note, HoEWarning, stacklevel=3)
        if report:
            report["notes"].append(note)
    with disk_errors(output):
        write_adapter_changes(saved, changes, {} if built is None else built.weights, report, place.files)
    return config


def _same_experts(saved: SavedAdapter, built: NewExpert) -> list[str]:
    """The experts of an adapter that have exactly the new one's weights."""

    def equal(module: str, index: int) -> bool:
        there, new = expert_weights(saved, module, index), built.weights.get(module, ())
        return len(there) == len(new) and all(torch.equal(x, y) for x, y in zip(there, new, strict=True))

    names = saved.config.expert_names
    return [name for index, name in enumerate(names) if all(equal(module, index) for module in saved.modules)]
