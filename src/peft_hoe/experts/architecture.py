"""Which weights of an architecture become experts: its linear layers, found without loading a weight.

The base's class is instantiated from its config on the meta device, so module names, types and shapes are those that
the adapter will meet.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from peft.tuners.tuners_utils import check_target_module_exists
from torch import nn
from transformers.pytorch_utils import Conv1D

from ..errors import CheckpointError
from ..tuner.embedding import embedding_features
from .empty_model import empty_model
from .parameter_names import ParameterNames

LINEAR, FUSED, HEAD = "linear", "fused experts", "task head"  # kinds of parameters
CAPTURED = "captured "  # before the kind of a parameter outside linear layers that experts hold all the same
# What PEFT's model of a task trains and saves whole beside the adapter, and expects in its file: modules whose names end so.
_HEAD_NAMES = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}


@dataclass(frozen=True)
class LinearModule:
    """One weight in scope.

    Attributes:
        name: full name of the module.
        d_in, d_out: its widths.
        transposed: whether the weight is stored (d_in, d_out), as transformers' Conv1D and embeddings do.
        apart: whether it is an embedding or an output head, which is neither pruned nor routed.
    """

    name: str
    d_in: int
    d_out: int
    transposed: bool
    apart: bool = False

    @property
    def weight(self) -> str:
        """Name of the weight."""
        return f"{self.name}.weight"

    @property
    def shape(self) -> tuple[int, int]:
        """The stored shape of the weight."""
        return (self.d_in, self.d_out) if self.transposed else (self.d_out, self.d_in)


@dataclass
class Architecture:
    """What a base's config says about its weights.

    Attributes:
        model_type: the config's, such as "llama".
        task_type: PEFT's name of what the model does, or None where the class does not tell.
        dtype: the config's, or None.
        targets: the weights in scope, in the model's order, those apart at the end.
        norms: `{module: names of its parameters}` of the norms that get deltas.
        heads: `{module: names of its tensors}` of the heads that PEFT saves whole with an adapter for this task.
        kinds: every parameter's kind, "linear" for those in scope.
        sizes: how many numbers every parameter has; tied ones count once.
        names: how checkpoints call the parameters.
    """

    model_type: str
    task_type: str | None
    dtype: torch.dtype | None
    targets: list[LinearModule]
    norms: dict[str, list[str]]
    heads: dict[str, list[str]]
    kinds: dict[str, str]
    sizes: dict[str, int]
    names: ParameterNames

    @property
    def linear(self) -> list[LinearModule]:
        """The weights in scope of linear layers, which are pruned and compared."""
        return [target for target in self.targets if not target.apart]

    def kind(self, parameter: str) -> str:
        """Kind of a parameter, or of a tensor of the file that is no parameter."""
        return self.kinds.get(parameter, FUSED if "expert" in parameter else "other")


def read_architecture(
    directory: Path,
    *,
    target_modules: str | Sequence[str] = "all-linear",
    exclude_modules: str | Sequence[str] | None = None,
    task_type: str | None = None,
    capture: Sequence[str] = (),
) -> Architecture:
    """Find the weights in scope from the config in a directory; no weight is read.

    Args:
        directory: holds the base's config.json.
        target_modules: "all-linear" (every linear layer but the output embedding and task heads), a regular
            expression, or names, as in PEFT.
        exclude_modules: a regular expression or names to leave out.
        task_type: overrides the class that the config names.
        capture: what else gets experts: "embeddings" (and the output head), "norms".

    Raises:
        CheckpointError: the config is missing or of an unknown architecture, or a target is missing or not linear.
    """
    model, task = empty_model(directory, task_type)
    output = model.get_output_embeddings()
    heads = _find_heads(model, task)
    targets = [
        target
        for target in _find_targets(model, target_modules, exclude_modules, output)
        if not _belongs(target.name, heads)
    ]
    if not targets:
        linear = [name for name, module in model.named_modules() if isinstance(module, (nn.Linear, Conv1D))]
        raise CheckpointError(
            f"target_modules={target_modules!r} with exclude_modules={exclude_modules!r} selects no linear layer of "
            f"{type(model).__name__}; it has {linear[:8]}{' ...' if len(linear) > 8 else ''}",
            argument="target_modules", value=target_modules, allowed=linear,
        )  # fmt: skip
    names = ParameterNames.of(model)
    apart = find_apart(model, {target.name for target in targets}, names.tied) if "embeddings" in capture else []
    norms = find_norms(model) if "norms" in capture else {}
    kinds = _kinds(model, {target.weight for target in targets}, output, heads)
    for parameter in [*(target.weight for target in apart), *(name for each in norms.values() for name in each)]:
        kinds[parameter] = CAPTURED + ("norms" if kinds[parameter] == "biases" else kinds[parameter])
    dtype = getattr(model.config, "dtype", None) or getattr(model.config, "torch_dtype", None)
    return Architecture(
        model_type=model.config.model_type,
        task_type=task,
        dtype=getattr(torch, dtype) if isinstance(dtype, str) else dtype,
        targets=[*targets, *apart],
        norms=norms,
        heads=heads,
        kinds=kinds,
        sizes={name: parameter.numel() for name, parameter in model.named_parameters() if name not in names.tied},
        names=names,
    )


def _find_heads(model: Any, task: str | None) -> dict[str, list[str]]:
    endings = _HEAD_NAMES.get(task or "", ())
    heads: dict[str, list[str]] = {}
    for name, module in model.named_modules():
        if name.endswith(endings) and endings and not _belongs(name, heads):
            heads[name] = [f"{name}.{key}" for key in module.state_dict()]
    return heads


def _belongs(name: str, modules: Iterable[str]) -> bool:
    """Whether `name` is one of the modules, or lies in one."""
    return any(name == module or name.startswith(f"{module}.") for module in modules)


def _find_targets(
    model: Any, wanted: str | Sequence[str], excluded: str | Sequence[str] | None, output: nn.Module | None
) -> list[LinearModule]:
    everything = isinstance(wanted, str) and wanted.lower() == "all-linear"
    rule = SimpleNamespace(
        target_modules=".*" if everything else wanted if isinstance(wanted, str) else set(wanted),
        exclude_modules=excluded if excluded is None or isinstance(excluded, str) else set(excluded),
    )
    targets = []
    for name, module in model.named_modules():
        if not name or not check_target_module_exists(rule, name):
            continue
        if isinstance(module, (nn.Linear, Conv1D)):
            if everything and module is output:
                continue
            rows, columns = module.weight.shape
            transposed = isinstance(module, Conv1D)
            d_in, d_out = (rows, columns) if transposed else (columns, rows)
            targets.append(LinearModule(name, d_in, d_out, transposed))
        elif not everything and not isinstance(wanted, str):
            raise CheckpointError(
                f"target module {name!r} is a {type(module).__name__}; experts live in nn.Linear and Conv1D only",
                argument="target_modules", value=name, allowed=["nn.Linear", "Conv1D"],
            )  # fmt: skip
    return targets


def find_apart(model: Any, known: Iterable[str], tied: Mapping[str, str]) -> list[LinearModule]:
    """The input embeddings and, where it has a weight of its own and is no target, the output head.

    Raises:
        CheckpointError: more than a head shares the embeddings' weight.
        ModuleError: the embeddings do more than look rows up.
    """
    modules = {id(module): name for name, module in model.named_modules()}
    embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
    name, of_head = modules[id(embeddings)], modules.get(id(head), "")
    rows, width = embedding_features(embeddings, name)
    sharing = {alias for pair in tied.items() if f"{name}.weight" in pair for alias in pair}
    others = sorted(sharing - {f"{name}.weight", f"{of_head}.weight"})
    if others:
        raise CheckpointError(
            f"capture names the embeddings, but {name} shares its weight with {others}, which would not follow its experts; "
            "build without capturing embeddings",
            argument="capture", value="embeddings", tensor=f"{name}.weight",
        )  # fmt: skip
    found = [LinearModule(name, rows, width, transposed=True, apart=True)]
    if isinstance(head, nn.Linear) and f"{of_head}.weight" not in {*tied, *tied.values()} and of_head not in known:
        rows, width = head.weight.shape
        found.append(LinearModule(of_head, width, rows, transposed=False, apart=True))
    return found


def find_norms(model: nn.Module) -> dict[str, list[str]]:
    """`{module: names of its weight and bias}` of every norm with a weight of one dimension."""
    return {
        name: [f"{name}.{parameter}" for parameter, _ in module.named_parameters(recurse=False)]
        for name, module in model.named_modules()
        if "Norm" in type(module).__name__ and getattr(getattr(module, "weight", None), "ndim", 0) == 1
    }


def _kinds(model: Any, targets: set[str], output: nn.Module | None, heads: Iterable[str]) -> dict[str, str]:
    kinds = {}
    for prefix, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            full = f"{prefix}.{name}" if prefix else name
            if full in targets:
                kinds[full] = LINEAR
            else:
                kinds[full] = HEAD if _belongs(full, heads) else _kind(module, name, parameter, module is output)
    return kinds


def _kind(module: nn.Module, name: str, parameter: torch.Tensor, is_output: bool) -> str:
    if is_output:
        return "lm_head"
    if isinstance(module, nn.Embedding):
        return "embeddings"
    if name.endswith("bias"):
        return "biases"
    if isinstance(module, (nn.Linear, Conv1D)):
        return "linear not targeted"
    if parameter.ndim == 1:
        return "norms"
    if parameter.ndim == 3 and not type(module).__name__.startswith("Conv"):
        return FUSED
    return "other"
