"""A policy that is a LoRA adapter: its factors, with every scale folded into B, exactly.

Shapes are PEFT's: A (r, d_in), B (d_out, r). They do not depend on how the base stores its weight, so `fan_in_fan_out`
changes nothing here.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from peft.utils.other import get_pattern_key
from torch import Tensor

from ..errors import CheckpointError
from ..files import ADAPTER_CONFIG, read_json
from .architecture import Architecture, LinearModule
from .checkpoints import PEFT_PREFIX, Checkpoint

_REFUSED = {  # config field: why its adapter is not the B A that an expert holds
    "use_dora": "DoRA normalises the weight's columns, which is not a low-rank delta",
    "modules_to_save": "it holds whole modules besides the low-rank deltas; merge it into its base and pass that",
    "trainable_token_indices": "it holds embedding rows besides the low-rank deltas; merge it into its base",
    "target_parameters": "experts live in linear layers, not in bare parameters",
    "lora_bias": "experts have no bias",
    "layer_replication": "it changes the number of layers of the base",
    "alora_invocation_tokens": "an activated LoRA applies from certain tokens on only",
    "use_qalora": "QA-LoRA pools its inputs",
    "use_bdlora": "block-diagonal factors are stored in another layout",
    "arrow_config": "Arrow is a router over other adapters",
    "velora_config": "VeLoRA reconstructs its activations",
    "kasa_config": "KaSA has singular values besides its factors",
    "monteclora_config": "MonteCLoRA samples its weights",
}
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


def is_adapter(directory: Path) -> bool:
    """Whether a directory holds a PEFT adapter."""
    return (directory / ADAPTER_CONFIG).is_file()


class LoraPolicy:
    """The factors of one LoRA adapter.

    Args:
        directory: holds adapter_config.json and the weights.
        label: how errors call it.
        architecture: of the base.
        allow_pickle: as in `Checkpoint`.

    Raises:
        CheckpointError: another adapter type, an option that is not a plain low-rank delta, or weights that do not
            fit the base.
    """

    def __init__(self, directory: Path, label: str, architecture: Architecture, *, allow_pickle: bool = False) -> None:
        self.label = label
        self.config = read_json(directory / ADAPTER_CONFIG)
        _check_plain(self.config, label)
        self.checkpoint = Checkpoint(directory, label, allow_pickle=allow_pickle)
        self.modules = self._match(architecture)

    def _match(self, architecture: Architecture) -> dict[str, str]:
        """`{module: name in the file}` of every module with factors."""
        targets = {target.name: target for target in architecture.targets}
        modules = {}
        for name in self.checkpoint.names:
            stem, _, part = name.removeprefix(PEFT_PREFIX).partition(".lora_")
            if part not in ("A.weight", "B.weight"):
                raise CheckpointError(
                    f"{self.label}: tensor {name!r} is not a factor of a linear layer, so it cannot be taken",
                    path=self.checkpoint.directory, tensor=name,
                )  # fmt: skip
            module = next((form for form in architecture.names.forms(stem) if form in targets), None)
            if module is None:
                raise CheckpointError(
                    f"{self.label}: tensor {name!r} of shape {self.checkpoint.shape(name)} belongs to no linear module "
                    f"in scope of the base ({architecture.model_type}); was it trained on another architecture, or do "
                    "target_modules or exclude_modules leave it out?",
                    path=self.checkpoint.directory, tensor=name,
                )  # fmt: skip
            modules[module] = name.rpartition(".lora_")[0]
        for module, stem in modules.items():
            self._check_shapes(stem, targets[module])
        return modules

    def _check_shapes(self, stem: str, target: LinearModule) -> None:
        for part, axis, width in (("A", 1, target.d_in), ("B", 0, target.d_out)):
            name = f"{stem}.lora_{part}.weight"
            if name not in self.checkpoint.names:
                raise CheckpointError(
                    f"{self.label}: tensor {name!r} is missing", path=self.checkpoint.directory, tensor=name
                )
            shape = self.checkpoint.shape(name)
            if len(shape) != 2 or shape[axis] != width:
                raise CheckpointError(
                    f"{self.label}: tensor {name!r} has shape {shape}, but the base's {target.weight!r} has shape "
                    f"{target.shape}: dimension {axis} must be {width}",
                    path=self.checkpoint.directory, tensor=name, value=shape, allowed=f"dimension {axis} of {width}",
                )  # fmt: skip
        ranks = [self.checkpoint.shape(f"{stem}.lora_A.weight")[0], self.checkpoint.shape(f"{stem}.lora_B.weight")[1]]
        if ranks[0] != ranks[1]:
            raise CheckpointError(
                f"{self.label}: {stem!r} has lora_A of rank {ranks[0]} but lora_B of rank {ranks[1]}",
                path=self.checkpoint.directory, tensor=f"{stem}.lora_B.weight", value=ranks[1], allowed=ranks[0],
            )  # fmt: skip

    @property
    def rank(self) -> int:
        """The largest rank of its modules."""
        return max((self.checkpoint.shape(f"{stem}.lora_A.weight")[0] for stem in self.modules.values()), default=1)

    @property
    def dtype(self) -> torch.dtype:
        """What its factors are stored in."""
        return self.checkpoint.dtype(self.checkpoint.names[0])

    def factors(self, module: str) -> tuple[Tensor, Tensor] | None:
        """B `(d_out, r)` with the scale folded in and A `(r, d_in)`, float32; None for a module without weights.

        Raises:
            CheckpointError: NaN or infinity.
        """
        if module not in self.modules:
            return None
        stem = self.modules[module]
        read = {part: self.checkpoint.tensor(f"{stem}.lora_{part}.weight").float() for part in "AB"}
        for part, tensor in read.items():
            if not bool(tensor.isfinite().all()):
                raise CheckpointError(
                    f"{self.label}: tensor '{stem}.lora_{part}.weight' holds NaN or infinity",
                    path=self.checkpoint.directory, tensor=f"{stem}.lora_{part}.weight",
                )  # fmt: skip
        return read["B"] * self._scale(module, read["A"].shape[0]), read["A"]

    def _scale(self, module: str, rank: int) -> float:
        patterns = self.config.get("alpha_pattern") or {}
        alpha = patterns.get(get_pattern_key(list(patterns), module), self.config.get("lora_alpha", 8))
        return float(alpha / (math.sqrt(rank) if self.config.get("use_rslora") else rank))


def _check_plain(config: dict[str, Any], label: str) -> None:
    kind = config.get("peft_type")
    if kind != "LORA":
        raise CheckpointError(
            f"{label} is a PEFT adapter of type {kind!r}; only LORA can be turned into experts",
            argument="peft_type", value=kind, allowed=["LORA"],
        )  # fmt: skip
    for name, reason in _REFUSED.items():
        if config.get(name):
            raise CheckpointError(
                f"{label} was trained with {name}={config[name]!r}: {reason}", argument=name, value=config[name]
            )
    if config.get("bias", "none") != "none":
        raise CheckpointError(
            f"{label} was trained with bias={config['bias']!r}: experts have no bias",
            argument="bias", value=config["bias"], allowed=["none"],
        )  # fmt: skip
    start = str(config.get("init_lora_weights")).lower()
    if start.startswith(_CHANGES_BASE):
        raise CheckpointError(
            f"{label} was trained with init_lora_weights={start!r}, which also changes the base's weights; save "
            "it with PEFT's path_initial_model_for_weight_conversion first",
            argument="init_lora_weights", value=start,
        )  # fmt: skip
