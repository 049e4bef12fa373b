"""The build report of a saved adapter, as it reads after a change."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..config import HoEConfig
from .new_expert import ADDED, NewExpert
from .saved_adapter import SavedAdapter


def changed_report(saved: SavedAdapter, config: HoEConfig, built: NewExpert | None, output: Path) -> dict[str, Any]:
    """The report in JSON types.

    Args:
        saved: the adapter before, which has one.
        config: the configuration after.
        built: the expert that is new, if one is.
        output: where the adapter goes.
    """
    report: dict[str, Any] = json.loads(json.dumps(saved.report))
    known = {expert["name"]: expert for expert in report["experts"]}
    names = config.expert_names
    report["output_dir"] = str(output)
    report["experts"] = [
        {**known.get(spec.name, {}), "name": spec.name, "preference": list(spec.preference), "r": spec.r}
        for spec in config.experts or []
    ]
    report["routers"] = [
        {"name": spec.name, "preference": list(spec.preference), "votes_for": list(spec.votes_for)}
        for spec in config.routers or []
    ]
    for module, experts in report["modules"].items():
        report["modules"][module] = {name: row for name, row in experts.items() if name in names}
    if built is not None:
        new = next(name for name in names if name not in saved.config.expert_names)
        _add_to_report(report, saved, config, built, new)
    return report


def _add_to_report(report: dict[str, Any], saved: SavedAdapter, config: HoEConfig, built: NewExpert, new: str) -> None:
    """Add the expert `new`: its rows, its policy, and what it lost."""
    for module, experts in built.report["modules"].items():
        if module in report["modules"]:
            report["modules"][module][new] = experts[built.name]
    if built.name != ADDED:
        policy = built.report["policies"]["policy"]
        objectives = [name for name in config.objectives or [] if name not in (saved.config.objectives or [])]
        report["policies"][objectives[0] if objectives else new] = policy
        if not objectives:
            next(expert for expert in report["experts"] if expert["name"] == new)["policy"] = policy["source"]
    lost = sorted(set(built.weights) - set(saved.modules))
    if lost:
        report["notes"].append(
            f"expert {new!r} lacks what its policy changed in {lost}, where the adapter has no experts"
        )
