"""Existing single-objective policies become a steerable adapter (paper section 3.1): the one way in, `build_adapter`.

Streaming, module by module: what stays in memory is one module's weights and the adapter itself; never a model.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from ..config import HoEConfig
from ..errors import HoEWarning
from ..preference import one_hot, parse_preference, uniform
from ..routing import HULL
from ..specs import ExpertSpec, as_spec
from .adapter_files import check_output, complete_directory, module_tensors, write_adapter
from .lora_policy import LoraPolicy
from .module_builder import ModuleBuilder
from .options import DEFAULT_INTERPOLATION, DEFAULT_PRUNE, DEFAULT_RANK, DEFAULT_RESCALE, BuildOptions
from .report import REPORT_FILE, BuildReport, ModuleReport
from .scan import Scan, scan_policies
from .sources import Source, Sources, open_sources

_LOW_SHARE = 0.1  # a module of which pruning keeps less is reported
_OFF_TARGET = 0.05


def build_adapter(
    base: Source,
    policies: Mapping[str, Source],
    output_dir: str | os.PathLike[str],
    *,
    experts: Sequence[Any] | None = None,
    routers: Sequence[Any] | None = None,
    r: int | str | None = "auto",
    prune: float | str | None = DEFAULT_PRUNE,
    prune_scope: str = "global",
    merge: str = "ties",
    merge_options: Mapping[str, float] | None = None,
    rescale: str | float | None = DEFAULT_RESCALE,
    interpolation: str = DEFAULT_INTERPOLATION,
    svd: str = "randomized",
    seed: int = 0,
    target_modules: str | Sequence[str] = "all-linear",
    exclude_modules: str | Sequence[str] | None = None,
    task_type: str | None = None,
    dtype: torch.dtype | str | None = None,
    default_preference: Any = None,
    overwrite: bool = False,
    progress: bool = True,
    allow_pickle: bool = False,
    revision: str | None = None,
    token: str | bool | None = None,
) -> BuildReport:
    """Turn single-objective policies into a HoE adapter.

    Each policy becomes the expert of its objective by task-SVD (paper eq. 3): prune, truncate, rescale. Multi-objective
    experts are merges of the policies' raw task vectors (eq. 4), truncated and rescaled likewise. A policy that is a
    LoRA adapter is taken as it is.

    Args:
        base: directory or Hub id of the model that the policies were trained from.
        policies: `{objective: directory or Hub id}`, full fine-tunes or LoRA adapters.
        output_dir: where the adapter goes; it appears there when it is complete.
        experts: multi-objective experts, as preferences or `ExpertSpec`. Default: the centroid. One at a corner
            replaces the expert of that objective, which sets its name or rank.
        routers: router experts, as preferences or `RouterSpec`. Default: none.
        r: rank; "full" (or None) for all directions; "auto" for the default, and LoRA policies at their own.
        prune: share of the smallest entries of each task vector to drop; None or "none" for none.
        prune_scope: "global" or "module": what the share is counted over.
        merge: "linear", "ties" or "pcb".
        merge_options: such as `{"density": 0.6}`.
        rescale: "norm", "policy_norm", a number or None; see `rescale.rescale_factor`.
        interpolation: "norm" keeps the length of experts between them too, "linear" is the paper's; see `HoEConfig`.
        svd: "randomized" or "exact".
        seed: of the randomised solver; a build is deterministic.
        target_modules: "all-linear", names or a regular expression, as in PEFT.
        exclude_modules: names or a regular expression.
        task_type: PEFT's; default from the base's class.
        dtype: of the adapter; default the base's.
        default_preference: stored in the adapter.
        overwrite: whether an adapter in `output_dir` may be replaced.
        progress: whether to show a bar and print the report's table.
        allow_pickle: whether `.bin` checkpoints may be read (with `weights_only`).
        revision: of the base on the Hub; a policy's is written `id@revision`.
        token: for the Hub.

    Returns:
        the report that is also written to `build_report.json`.

    Raises:
        CheckpointError: something cannot be read or does not fit.
        ExpertError: a setting or an expert is not allowed.
        PreferenceError: a preference is not a point of the simplex.
    """
    options = BuildOptions.checked(
        r=r, prune=prune, prune_scope=prune_scope, merge=merge, merge_options=merge_options, rescale=rescale,
        interpolation=interpolation, svd=svd, seed=seed, dtype=dtype,
    )  # fmt: skip
    output = Path(output_dir)
    check_output(output, overwrite)
    sources = open_sources(
        base, policies, target_modules=target_modules, exclude_modules=exclude_modules, task_type=task_type,
        allow_pickle=allow_pickle, revision=revision, token=token,
    )  # fmt: skip
    check_output(output, overwrite, sources.directories)
    config = HoEConfig(
        objectives=list(policies),
        experts=_expert_specs(experts, sources, options),
        routers=list(routers or []),
        r=options.r if isinstance(options.r, int) else _rank(None, sources, options, list(policies)),
        task_type=sources.architecture.task_type,
        base_model_name_or_path=str(base),
        revision=revision,
        inference_mode=True,
        default_preference=default_preference,
        interpolation=options.interpolation,
    )
    with complete_directory(output) as directory:
        with tqdm(disable=not progress, desc="building", unit="module") as bar:
            scan = scan_policies(sources, options, bar)
            tensors, modules = _build_modules(sources, options, config, scan, bar)
        write_adapter(directory, config, tensors)
        report = _report(base, policies, output, sources, options, config, scan, modules)
        report.save(directory / REPORT_FILE)
    if progress:
        tqdm.write(report.table())
    return report


def _expert_specs(experts: Sequence[Any] | None, sources: Sources, options: BuildOptions) -> list[ExpertSpec]:
    """One expert per policy, then the multi-objective ones, each with its rank."""
    objectives = list(sources.policies)
    n = len(objectives)
    if experts is None:
        experts = [uniform(n)] if n > 1 else []
    corners = [ExpertSpec(one_hot(i, n)) for i in range(n)]
    others = []
    for item in experts:
        spec: ExpertSpec = as_spec(item, ExpertSpec)
        point = parse_preference(spec.preference, objectives)
        if point.max() > 1 - HULL:
            corners[int(np.argmax(point))] = spec
        else:
            others.append(spec)
    for spec in (*corners, *others):
        point = parse_preference(spec.preference, objectives)
        if spec.r is None:
            spec.r = _rank(point, sources, options, objectives)
    return [*corners, *others]


def _rank(point: Any, sources: Sources, options: BuildOptions, objectives: list[str]) -> int:
    if isinstance(options.r, int):
        return options.r
    used = [sources.policies[name] for i, name in enumerate(objectives) if point is None or point[i] > 0]
    own = [policy.rank for policy in used if isinstance(policy, LoraPolicy)]
    if len(used) == 1 and own:
        return own[0]
    if options.r == "full":
        return max(min(target.shape) for target in sources.architecture.targets)
    return max(DEFAULT_RANK, *own) if own else DEFAULT_RANK


def _build_modules(
    sources: Sources, options: BuildOptions, config: HoEConfig, scan: Scan, bar: tqdm[Any]
) -> tuple[dict[str, Tensor], dict[str, dict[str, ModuleReport]]]:
    """All tensors of the adapter; fills the config's targets and ranks."""
    dtype = options.dtype or sources.dtype
    votes = torch.from_numpy(config.initial_router_bias()).float()
    requested = [expert.r for expert in config.experts or []]
    builder = ModuleBuilder(sources, options, config, scan.thresholds)
    tensors: dict[str, Tensor] = {}
    modules: dict[str, dict[str, ModuleReport]] = {}
    rank_pattern: dict[str, list[int]] = {}
    adapted: list[str] = []
    for target in sources.architecture.targets:
        factors, rows = builder.build(target)
        bar.update()
        changed = any(row.tau_norm for row in rows.values())
        if changed:
            modules[target.name] = rows
        if not any(factor.rank for factor in factors):
            why = "pruning dropped all of its changes" if changed else "it is the same in the base and in all policies"
            scan.notes.append(f"{target.name} gets no expert: {why}")
            continue
        adapted.append(target.name)
        pairs = [(factor.b, factor.a) for factor in factors]
        tensors.update(module_tensors(target, pairs, votes, dtype, options.interpolation))
        ranks = [factor.rank for factor in factors]
        if ranks != requested:
            rank_pattern[target.name] = ranks
    scan.check_any(adapted)
    for name, share in builder.dropped.items():
        scan.policies[name].dropped = share
    config.target_modules = set(adapted)
    config.rank_pattern = rank_pattern
    return tensors, modules


def _report(
    base: Source,
    policies: Mapping[str, Source],
    output: Path,
    sources: Sources,
    options: BuildOptions,
    config: HoEConfig,
    scan: Scan,
    modules: dict[str, dict[str, ModuleReport]],
) -> BuildReport:
    for name, source in policies.items():
        scan.policies[name].source = str(source)
    experts, routers = [asdict(spec) for spec in config.experts or []], [asdict(spec) for spec in config.routers or []]
    report = BuildReport(
        base=str(base),
        output_dir=str(output),
        options={**options.to_dict(), "dtype": str(options.dtype or sources.dtype).removeprefix("torch.")},
        experts=[{key: spec[key] for key in ("name", "preference", "r")} for spec in experts],
        routers=[{key: spec[key] for key in ("name", "preference", "votes_for")} for spec in routers],
        policies=scan.policies,
        pairs=scan.pairs,
        modules=modules,
        notes=scan.notes,
    )
    if not routers and len(policies) > 1:
        point = [0.75, 0.25] + [0.0] * (len(policies) - 2)
        written = ",".join(f"{weight:g}" for weight in point)
        report.notes.append(f"no routers; add one with routers=[{point}] (--router {written}) and train it")
    _warn_about_pruning(report, options)
    return report


def _warn_about_pruning(report: BuildReport, options: BuildOptions) -> None:
    for name, policy in report.policies.items():
        if policy.kind == "full" and abs(policy.dropped - options.prune) > _OFF_TARGET:
            warnings.warn(
                f"pruning dropped {policy.dropped:.1%} of policy {name!r} instead of {options.prune:.1%}, because "
                "many of its entries are equal (16-bit checkpoints tie a lot)",
                HoEWarning,
                stacklevel=4,
            )
    low = [
        f"{module} of {expert} ({row.kept:.1%})"
        for module, rows in report.modules.items()
        for expert, row in rows.items()
        if row.kept < _LOW_SHARE
    ]
    if low:
        warnings.warn(
            f"pruning kept less than {_LOW_SHARE:.0%} of {len(low)} modules: {', '.join(low[:5])}"
            f"{' ...' if len(low) > 5 else ''}; prune_scope='module' or a smaller prune keeps more there",
            HoEWarning,
            stacklevel=4,
        )
