"""Where an adapter comes from: ids, revisions, licences and hashes of the base and the policies, for its report and card."""

from __future__ import annotations

import hashlib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import ModelCard

from ..base_sample import make_sample
from ..config import HoEConfig
from .build_inputs import BuildInputs
from .checkpoints import Checkpoint
from .pieces import sampled


@dataclass
class Source:
    """One model that went into an adapter.

    Attributes:
        id: as given, a directory or Hub id.
        commit: of the Hub's snapshot; None for a directory.
        license: what its model card says, where it has one.
        hash: of its tensors' names, types and shapes and of some rows of each; None where its weights were not read.
    """

    id: str
    commit: str | None
    license: str | None
    hash: str | None


def read_sources(inputs: BuildInputs) -> dict[str, Any]:
    """`{"base": ..., "policies": {objective: ...}}`, each a `Source` in JSON types."""
    base = inputs.base.checkpoint if inputs.base is not None else None
    policies = {
        name: asdict(_source(given, inputs.places[name], inputs.policies[name].checkpoint))
        for name, given in inputs.given.items()
    }
    return {"base": asdict(_source(inputs.base_given, inputs.places[None], base)), "policies": policies}


def base_sample(inputs: BuildInputs, config: HoEConfig) -> dict[str, Any] | None:
    """The record by which the base is known when the adapter is loaded; None where the base's weights were not read."""
    if inputs.base is None:
        return None
    base, adapted = inputs.base, {target.name: target for target in inputs.architecture.targets}
    shapes = {name: adapted[name].shape for name in config.target_modules or []}
    return make_sample(shapes, lambda name, row: base.rows(adapted[name].weight, row, row + 1)[0])


def _source(given: str, place: Path, checkpoint: Checkpoint | None) -> Source:
    commit = place.name if place.parent.name == "snapshots" else None
    return Source(given, commit, _license(place), None if checkpoint is None else _hash(checkpoint))


def _license(place: Path) -> str | None:
    card = place / "README.md"
    if not card.is_file():
        return None
    try:
        found = ModelCard.load(card, ignore_metadata_errors=True).data.to_dict()
    except Exception:  # a stranger's text, of the YAML library, of huggingface_hub, or of the encoding
        return None
    named = found.get("license_name") if found.get("license") == "other" else found.get("license")
    return str(named) if named else None


def _hash(checkpoint: Checkpoint) -> str:
    digest = hashlib.sha256()
    for name in checkpoint.names:
        shape = checkpoint.shape(name)
        digest.update(f"{name} {checkpoint.dtype(name)} {shape}\n".encode())
        for i in sampled(shape[0] if shape else 1):
            row = checkpoint.rows(name, i, i + 1).contiguous()
            digest.update(row.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]
