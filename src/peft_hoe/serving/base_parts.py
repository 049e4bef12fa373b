"""What experts of embeddings and norms need of their base: which modules look rows up, which heads are tied, what norms weigh.

A LoRA holds changes, and a norm's change is none that a LoRA can hold. So an export writes the norm itself, base plus delta.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from torch import Tensor, nn

from ..config import HoEConfig
from ..errors import CheckpointError
from ..experts.checkpoints import FLOATING, Checkpoint, fetch
from ..experts.empty_model import empty_model
from ..experts.parameter_names import ParameterNames
from ..tuner.embedding import HoEEmbedding, TiedHead
from ..tuner.norm import HoENorm


@dataclass(frozen=True)
class BaseParts:
    """A base as far as experts outside linear modules change it.

    Attributes:
        embeddings: modules that look rows up.
        tied_heads: `{head: the embeddings whose weight it shares}`, of embeddings with experts.
        norms: `{module: {parameter: reads it}}` of norms with experts; `(d,)` each.
        module_names: of all modules.
    """

    embeddings: frozenset[str] = frozenset()
    tied_heads: Mapping[str, str] = field(default_factory=dict)
    norms: Mapping[str, Mapping[str, Callable[[], Tensor]]] = field(default_factory=dict)
    module_names: frozenset[str] = frozenset()

    def saved_whole(self) -> list[str]:
        """The norms with experts as PEFT's `modules_to_save` names them.

        PEFT saves every module whose path ends with such a name. One that ends the name of another is written with its whole
        path in a PeftModel.
        """
        return [
            f"base_model.model.{norm}" if any(_ends(norm, name) for name in self.module_names) else norm
            for norm in self.norms
        ]


def _ends(name: str, other: str) -> bool:
    return other != name and other.endswith(name)


def parts_of_model(model: nn.Module, adapter: str, root: str) -> BaseParts:
    """Those of a model that carries the adapter.

    Args:
        model: the model.
        adapter: its name.
        root: the path of the base model in it, with a dot at the end; or "".
    """
    embeddings, tied, norms = set(), {}, {}
    for layer in model.modules():
        if isinstance(layer, HoEEmbedding) and adapter in layer.hoe_layouts:
            embeddings.add(layer.module_name)
        elif isinstance(layer, TiedHead) and adapter in layer.embedding.hoe_layouts:
            tied[layer.module_name] = layer.embedding.module_name
        elif isinstance(layer, HoENorm) and adapter in layer.hoe_layouts:
            parameters = layer.parameters_before_merging()
            norms[layer.module_name] = {
                name: _holder(f"{layer.module_name}.{name}", tensor) for name, tensor in parameters.items()
            }
    names = frozenset(path.removeprefix(root) for path, _ in model.named_modules())
    return BaseParts(frozenset(embeddings), tied, norms, names)


def parts_of_files(base: str | os.PathLike[str], config: HoEConfig) -> BaseParts:
    """Those of a checkpoint; of its weights only the norms with experts are read, when they are asked for.

    Args:
        base: directory or Hub id.
        config: of the adapter.

    Raises:
        CheckpointError: the base cannot be read, or lacks what the adapter names.
    """
    label = f"base {os.fspath(base)!r}"
    directory = fetch(base, weights=bool(config.target_norms))
    model, _ = empty_model(directory, config.task_type)
    names = ParameterNames.of(model)
    modules = dict(model.named_modules())
    embeddings = frozenset(
        name for name, module in modules.items() if isinstance(module, nn.Embedding) and config.votes_statically(name)
    )
    tied = {
        head: embedding
        for embedding in embeddings
        for head, module in modules.items()
        if isinstance(module, nn.Linear) and names.share(f"{embedding}.weight", f"{head}.weight")
    }
    norms: dict[str, dict[str, Callable[[], Tensor]]] = {}
    if config.target_norms:
        weights = Checkpoint(directory, label)
        located = names.locate(weights.names)
        for name, module in modules.items():
            if config.votes_statically(name) and not isinstance(module, (nn.Embedding, nn.Linear)):
                norms[name] = {
                    parameter: _reader(weights, located, f"{name}.{parameter}")
                    for parameter, _ in module.named_parameters(recurse=False)
                }
    return BaseParts(embeddings, tied, norms, frozenset(modules))


def _holder(parameter: str, tensor: Tensor) -> Callable[[], Tensor]:
    """A reader of a parameter `(d,)` of a model, of which nothing is looked at before it is called."""

    def read() -> Tensor:
        """The parameter on the CPU; CheckpointError where the model has it elsewhere than in memory."""
        if tensor.device.type == "meta" or hasattr(tensor, "ds_id"):
            raise CheckpointError(
                f"the base's {parameter!r}, to which experts add, is not in memory (offloaded or sharded); save the adapter, "
                "and export it from its directory",
                tensor=parameter,
            )
        return tensor.detach().cpu()

    return read


def _reader(weights: Checkpoint, located: Mapping[str, str], parameter: str) -> Callable[[], Tensor]:
    """A reader of a parameter `(d,)` of a checkpoint; `located` is `{parameter: its tensor in the files}`."""

    def read() -> Tensor:
        """The parameter on the CPU; CheckpointError where the files lack it, or hold a quantiser's numbers."""
        if parameter not in located:
            raise CheckpointError(
                f"{weights.label} has no tensor for {parameter!r}, to which experts of the adapter add; give the base that it "
                "was built for",
                tensor=parameter,
            )
        tensor = weights.tensor(located[parameter])
        if tensor.dtype not in FLOATING:
            raise CheckpointError(
                f"{weights.label}: {parameter!r} is stored as {tensor.dtype}, which means nothing without its quantiser; give "
                "the base with plain weights",
                tensor=parameter,
            )
        return tensor

    return read
