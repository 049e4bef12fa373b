"""Existing single-objective policies become a steerable adapter (paper section 3.1): the one way in, `build_adapter`.

Streaming, module by module: what stays in memory is one module's weights; never a model, nor the adapter.
"""

from __future__ import annotations

import functools
import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from .. import model_card
from ..config import HoEConfig
from ..errors import HoEWarning
from ..output_directory import check_output, disk_errors, resumable_directory, scratch_directory
from ..specs import check_names
from .adapter_config import adapter_config, expert_specs
from .adapter_files import WRITTEN
from .build_inputs import BuildInputs, open_inputs
from .capture import captured
from .checkpoints import PathOrHubId
from .devices import CPU
from .option_groups import Loading, Merging, Pruning, Ranks, TaskSVD
from .options import DEFAULT_CAPTURE, DEFAULT_INTERPOLATION, DEFAULT_RESCALE, BuildOptions
from .report import REPORT_FILE, BuildReport, notes_on_solvers, warn_about_pruning
from .search import Search
from .sources import base_sample, read_sources
from .stages import Build, Built, work_key


def build_adapter(
    base: PathOrHubId,
    policies: Mapping[str, PathOrHubId],
    output_dir: str | os.PathLike[str],
    *,
    experts: Sequence[Any] | None = None,
    routers: Sequence[Any] | None = None,
    default_preference: Any = None,
    r: Ranks | int | float | str | None = "auto",
    pruning: Pruning | float | str | None = Pruning(),  # noqa: B008  frozen
    merging: Merging | str = Merging(),  # noqa: B008
    svd: TaskSVD | str = TaskSVD(),  # noqa: B008
    rescale: Search | str | float | None = DEFAULT_RESCALE,
    interpolation: str = DEFAULT_INTERPOLATION,
    capture: Sequence[str] | str = DEFAULT_CAPTURE,
    seed: int = 0,
    target_modules: str | Sequence[str] = "all-linear",
    exclude_modules: str | Sequence[str] | None = None,
    loading: Loading = Loading(),  # noqa: B008
    dtype: torch.dtype | str | None = None,
    num_processes: int = 1,
    device: torch.device | str = CPU,
    overwrite: bool = False,
    progress: bool = True,
) -> BuildReport:
    """Turn single-objective policies into a HoE adapter.

    Each policy becomes the expert of its objective by task-SVD (paper eq. 3): prune, truncate, rescale. Multi-objective
    experts are merges of the policies' raw task vectors (eq. 4), truncated and rescaled likewise. A policy that is a
    LoRA adapter is taken as it is. A build that was killed or interrupted goes on where it stopped when it is called again
    with the same arguments, and gives the same bytes.

    Args:
        base: directory or Hub id of the model that the policies were trained from.
        policies: `{objective: directory or Hub id}`, full fine-tunes or LoRA adapters.
        output_dir: where the adapter goes; it appears there when it is complete.
        experts: multi-objective experts, as preferences or `ExpertSpec`. Default: the centroid. One at a corner
            replaces the expert of that objective, which sets its name or rank. One with a `policy`, trained for its
            preference, is made of that one as a corner is of its; the others are merges.
        routers: router experts, as preferences or `RouterSpec`. Default: none.
        default_preference: stored in the adapter.
        r: `Ranks`, or a rank alone; a share such as 0.95 keeps as many directions as hold that share of the energy, at most
            128; "full" (or None) keeps all; "auto" is the default, and LoRA policies at their own.
        pruning: `Pruning`, or its share alone; None for none.
        merging: `Merging`, or its method alone.
        svd: `TaskSVD`, or its solver alone.
        rescale: "norm", "policy_norm", a number or None; see `rescale.rescale_factor`. Or `search`, which chooses this and
            other settings by a score on validation data.
        interpolation: "norm" keeps the length of experts between them too, "linear" is the paper's; see `HoEConfig`.
        capture: what gets experts besides linear layers: "embeddings" (low rank, with the output head), "norms" (deltas),
            both or (). "auto": embeddings where they hold a quarter or more of what a policy changed.
        seed: of the randomised solver; a build is deterministic.
        target_modules: "all-linear", names or a regular expression, as in PEFT.
        exclude_modules: names or a regular expression.
        loading: how base and policies are read.
        dtype: of the adapter; default the base's.
        num_processes: share the work, with one thread each; the result does not depend on how many there are. In a script, call
            this under `if __name__ == "__main__":`, since each process imports the script again.
        device: where each module is computed, "cpu" or "cuda"; the same numbers up to rounding.
        overwrite: whether an adapter in `output_dir` may be replaced.
        progress: whether to show a bar and print the report's table.

    Returns:
        the report that is also written to `build_report.json`.

    Raises:
        CheckpointError: something cannot be read or does not fit.
        ExpertError: a setting or an expert is not allowed.
        PreferenceError: a preference is not a point of the simplex.

    >>> from peft_hoe import build_adapter, demo
    >>> report = build_adapter(demo.BASE, demo.POLICIES, "adapter", routers=[[0.75, 0.25]], progress=False)
    >>> list(report.policies)
    ['cheerful', 'vivid']
    """
    settings: dict[str, Any] = {
        "experts": experts, "routers": routers, "default_preference": default_preference, "r": r, "pruning": pruning,
        "merging": merging, "svd": svd, "rescale": rescale, "interpolation": interpolation, "capture": capture, "seed": seed,
        "target_modules": target_modules, "exclude_modules": exclude_modules, "loading": loading, "dtype": dtype,
        "num_processes": num_processes, "device": device,
    }  # fmt: skip
    curve: list[dict[str, Any]] = []
    if isinstance(rescale, Search):
        check_output(Path(output_dir), overwrite, names=WRITTEN)
        build = functools.partial(_build, base, policies, overwrite=False, progress=False, curve=[])
        loading = replace(loading, keep_shards=True)  # many builds of the same files
        with scratch_directory(Path(output_dir)) as folder:
            settings, curve = rescale.run(build, {**settings, "rescale": DEFAULT_RESCALE, "loading": loading}, folder)
    return _build(base, policies, output_dir, overwrite=overwrite, progress=progress, curve=curve, **settings)


def _build(
    base: PathOrHubId,
    policies: Mapping[str, PathOrHubId],
    output_dir: str | os.PathLike[str],
    *,
    experts: Sequence[Any] | None,
    routers: Sequence[Any] | None,
    default_preference: Any,
    target_modules: str | Sequence[str],
    exclude_modules: str | Sequence[str] | None,
    loading: Loading,
    overwrite: bool,
    progress: bool,
    curve: list[dict[str, Any]],
    **settings: Any,
) -> BuildReport:
    """One build; its arguments are those of `build_adapter`, and the curve of the search that chose them."""
    options = BuildOptions.checked(**settings)
    output = Path(output_dir)
    check_output(output, overwrite, names=WRITTEN)
    specs = expert_specs(experts, check_names(list(policies), "objective")) if policies else []
    own = {str(spec.name): spec.policy for spec in specs if spec.policy is not None}

    def opened(capture: Sequence[str]) -> BuildInputs:
        return open_inputs(
            base, policies, target_modules=target_modules, exclude_modules=exclude_modules, loading=loading, own=own,
            capture=capture,
        )  # fmt: skip

    options, inputs, notes = captured(options, opened)
    check_output(output, overwrite, inputs.directories)
    config = adapter_config(
        inputs, options, specs, routers, base_model_name_or_path=str(base), revision=loading.revision,
        default_preference=default_preference,
    )  # fmt: skip
    with resumable_directory(output, work_key(inputs, options, config)) as place:
        inputs.put_shards_in(place.state)
        with tqdm(disable=not progress, desc="building", unit="module") as bar:
            built = Build(inputs, options, config, place, output, bar).run()
        config.base_sample = base_sample(inputs, config)
        report = _report(output, inputs, options, config, built, curve)
        report.notes += notes
        with disk_errors(output):
            config.save_pretrained(str(place.files))  # after the weights: it writes a model card beside them
            model_card.add_sources(place.files, report.sources)
            report.save(place.files / REPORT_FILE)
    if progress:
        tqdm.write(report.table())
    return report


def _shown(spec: dict[str, Any], inputs: BuildInputs) -> dict[str, Any]:
    """An expert in the report; with the policy that is its own, if it has one."""
    own = {} if spec["name"] in inputs.objectives else {"policy": inputs.given.get(spec["name"])}
    shown = {key: spec[key] for key in ("name", "preference", "r")}
    return {**shown, **{key: value for key, value in own.items() if value is not None}}


def _report(
    output: Path,
    inputs: BuildInputs,
    options: BuildOptions,
    config: HoEConfig,
    built: Built,
    curve: list[dict[str, Any]],
) -> BuildReport:
    experts, routers = [asdict(spec) for spec in config.experts or []], [asdict(spec) for spec in config.routers or []]
    report = BuildReport(
        base=str(config.base_model_name_or_path),
        output_dir=str(output),
        options={**options.to_dict(), "dtype": str(options.dtype or inputs.dtype).removeprefix("torch.")},
        experts=[_shown(spec, inputs) for spec in experts],
        routers=[{key: spec[key] for key in ("name", "preference", "votes_for")} for spec in routers],
        policies=built.statistics.reports,
        pairs=built.statistics.pairs,
        modules=built.modules,
        sources=read_sources(inputs),
        search=curve,
        notes=built.notes,
    )
    report.notes += [*_notes_on_output_embeddings(report), *notes_on_solvers(report)]
    n = len(inputs.objectives)
    if not routers and n > 1:
        point = [0.75, 0.25] + [0.0] * (n - 2)
        written = ",".join(f"{weight:g}" for weight in point)
        report.notes.append(f"no routers; add one with routers=[{point}] (--router {written}) and train it")
    for note in built.statistics.notes:
        warnings.warn(note, HoEWarning, stacklevel=4)
    warn_about_pruning(report, options.pruning.share)
    return report


def _notes_on_output_embeddings(report: BuildReport) -> list[str]:
    """What is lost where a policy trained an output embedding of its own."""
    return [
        f"policy {name!r} changed the output embedding (lm_head), which its expert does not hold: "
        f"{policy.not_captured['lm_head']:.1%} of its squared change"
        for name, policy in report.policies.items()
        if policy.not_captured.get("lm_head")
    ]
