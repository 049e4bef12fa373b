"""What an adapter must do on a model, each check against a naive computation or an equality that must hold; all in float64.

A check returns None where it is right, or where it does not apply a word that says so. What peft_hoe refuses by name raises an
error of ours, which the caller notes. Anything else is wrong.

Shapes: B = 2 rows, L experts, N = 2 objectives.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from models import Architecture
from peft import PeftModel, get_peft_model
from torch import nn

from peft_hoe import HoEConfig, HoELayer

SHARED, ROWS = [0.3, 0.7], [[0.3, 0.7], [0.9, 0.1]]
TOLERANCE = 1e-9
ABSENT = "does not apply"


class Wrong(AssertionError):
    """A number that is not what it must be."""


def adapted(architecture: Architecture) -> PeftModel:
    """The architecture's model with an adapter on all linear modules, whose experts and router weigh something."""
    torch.manual_seed(0)
    base = architecture.make().double().eval()
    config = HoEConfig(
        objectives=["a", "b"], routers=[[0.25, 0.75]], r=4, target_modules=architecture.targets,
        exclude_modules=architecture.excluded, task_type=architecture.task,
        interpolation="norm",
    )  # fmt: skip
    model = get_peft_model(base, config).double().eval()
    generator = torch.Generator().manual_seed(3)
    for name, parameter in model.named_parameters():
        if "hoe_A" in name or "hoe_B" in name or "hoe_router" in name:
            scale = 1.0 if "hoe_router" in name else 0.15
            parameter.data = scale * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    for module in layers(model):
        module.measure_lengths("default")
    model.mark_trained()
    return model


def layers(model: nn.Module) -> list[Any]:
    """Its HoE layers."""
    return [module for module in model.modules() if isinstance(module, HoELayer)]


def logits(model: Any, inputs: dict[str, torch.Tensor], **more: Any) -> torch.Tensor:
    """The output that matters, without a cache."""
    with torch.no_grad():
        output: torch.Tensor = model(**inputs, **more).logits
    return output


def close(found: torch.Tensor, expected: torch.Tensor, what: str) -> None:
    """See that two outputs are equal up to float64's rounding over a model.

    Raises:
        Wrong: they are not.
    """
    scale = max(1.0, float(expected.abs().max()))
    error = float((found - expected).abs().max()) / scale
    if not error <= TOLERANCE:
        raise Wrong(f"{what}: off by {error:.1e}")


def row(inputs: dict[str, torch.Tensor], number: int) -> dict[str, torch.Tensor]:
    """One of two rows; flattened patches belong to rows in equal shares."""
    return {name: value.chunk(2)[number] for name, value in inputs.items()}


@contextmanager
def naive(model: PeftModel, preference: list[float]) -> Iterator[None]:
    """Replace every HoE layer's forward by eq. 11 and 12 written out, expert by expert, at one preference for all rows."""
    weights = model.route(preference).experts
    config = model.peft_config["default"]
    names, members = config.expert_names, config.votes()

    def forward_of(layer: Any) -> Callable[..., torch.Tensor]:
        def forward(x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
            a, b = layer.hoe_A["default"].weight, layer.hoe_B["default"].weight
            ranks = layer.hoe_layouts["default"].ranks
            votes = [torch.full(x.shape[:-1], float(weights.get(name, 0.0)), dtype=x.dtype) for name in names]
            softmax = torch.softmax(layer.hoe_router["default"](x), dim=-1)
            for k, expert in enumerate(members[0]):
                votes[expert] = votes[expert] + weights.get("r0", 0.0) * softmax[..., k]
            deltas, start = [], 0
            for rank in ranks:
                deltas.append(b[:, start : start + rank] @ a[start : start + rank])
                start += rank
            lengths = [delta.norm() for delta in deltas]
            gram = torch.stack([torch.stack([(one * other).sum() for other in deltas]) for one in deltas])
            w = torch.stack(votes, dim=-1)
            mean = (w * torch.stack(lengths)).sum(-1)
            length = (w.unsqueeze(-1) * w.unsqueeze(-2) * gram).sum((-2, -1)).sqrt()
            factor = (mean / length).clamp_max(3.0).unsqueeze(-1)
            total = sum(vote.unsqueeze(-1) * (x @ delta.T) for vote, delta in zip(votes, deltas, strict=True))
            return layer.base_layer(x, *args, **kwargs) + factor * total

        return forward

    changed = layers(model)
    for layer in changed:
        layer.forward = forward_of(layer)
    try:
        yield
    finally:
        for layer in changed:
            del layer.forward


def forward(architecture: Architecture, model: PeftModel) -> str | None:
    """One preference for all rows, a router voting: the naive sum."""
    inputs = architecture.inputs()
    found = logits(model, inputs, preference=SHARED)
    with naive(model, SHARED):
        expected = logits(model, inputs)
    close(found, expected, "forward")
    with model.disable_adapter():
        if float((logits(model, inputs) - found).abs().max()) < 1e-6:
            raise Wrong("the adapter does nothing")
    return None


def rows(architecture: Architecture, model: PeftModel) -> str | None:
    """Each row of a batch at its own preference: as alone."""
    inputs = architecture.inputs()
    found = logits(model, inputs, preference=ROWS)
    for number, preference in enumerate(ROWS):
        close(found[number : number + 1], logits(model, row(inputs, number), preference=preference), f"row {number}")
    return None


def generate(architecture: Architecture, model: PeftModel) -> str | None:
    """Greedy texts of rows: as alone, and with a cache as without."""
    if not architecture.generates:
        return ABSENT
    inputs = {name: value for name, value in architecture.inputs().items() if name != "decoder_input_ids"}
    settings: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    for module in model.modules():
        if getattr(module, "generation_config", None) is not None:
            module.generation_config.eos_token_id = None  # all rows get their four tokens

    def complete(some: dict[str, torch.Tensor], preference: Any, **more: Any) -> torch.Tensor:
        with model.use_preference(preference):  # also where no task type tells PEFT to pass preference= on
            ids: torch.Tensor = model.generate(**some, **settings, **more)
        return ids

    found = complete(inputs, ROWS)
    for number, preference in enumerate(ROWS):
        for cache in (True, False):
            alone = complete(row(inputs, number), preference, use_cache=cache)
            if not torch.equal(found[number : number + 1], alone):
                raise Wrong(f"row {number} with use_cache={cache}: {found[number].tolist()}, alone {alone[0].tolist()}")
    return None


def save(architecture: Architecture, model: PeftModel) -> str | None:
    """Saved and loaded: the same."""
    inputs = architecture.inputs()
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        torch.manual_seed(0)
        loaded = PeftModel.from_pretrained(architecture.make().double().eval(), folder).double().eval()
    close(logits(loaded, inputs, preference=SHARED), logits(model, inputs, preference=SHARED), "loaded")
    return None


def merge(architecture: Architecture, model: PeftModel) -> str | None:
    """Merged with the routers dropped: as steered with untrained routers."""
    inputs = architecture.inputs()
    model.set_preference(SHARED)
    model.mark_trained(trained=False)
    expected = logits(model, inputs)
    close(logits(model.merge_and_unload(), inputs), expected, "merged")
    return None


def disable(architecture: Architecture, model: PeftModel) -> str | None:
    """With the adapter off: the base."""
    inputs = architecture.inputs()
    torch.manual_seed(0)
    with model.disable_adapter():
        close(logits(model, inputs), logits(architecture.make().double().eval(), inputs), "disabled")
    return None


def checkpointed(architecture: Architecture, model: PeftModel) -> str | None:
    """Gradients of the router's weights for rows, with and without gradient checkpointing: the same, and not all zero."""
    base = model.get_base_model()
    if not getattr(base, "supports_gradient_checkpointing", False):
        return ABSENT
    inputs, gradients = architecture.inputs(), []
    for wanted in (False, True):
        other = copy.deepcopy(model)
        routers = [p for name, p in other.named_parameters() if "hoe_router" in name]
        for parameter in routers:
            parameter.requires_grad_(True)
        if wanted:
            other.get_base_model().gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        other.train()
        for module in other.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        options = {"use_cache": False} if architecture.generates else {}
        other(**inputs, preference=ROWS, **options).logits.pow(2).mean().backward()
        gradients.append(
            torch.cat([torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten() for p in routers])
        )
    if not float(gradients[0].abs().max()) > 0:
        raise Wrong("no gradient reaches a router")
    close(gradients[1] / gradients[0].abs().max(), gradients[0] / gradients[0].abs().max(), "gradients")
    return None


CHECKS: dict[str, Callable[[Architecture, PeftModel], str | None]] = {
    "forward": forward, "rows": rows, "generate": generate, "save, load": save, "merge": merge, "disable": disable,
    "checkpointed gradients": checkpointed,
}  # fmt: skip
