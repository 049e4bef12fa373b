"""Whether embeddings and output heads get experts, where `capture="auto"` leaves it to the policies.

Experts of embeddings are worth much where policies changed them much, and nothing that could be measured where they did not
(`docs/measurements/build_capture.md`), so the share of the change that lies there decides.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from ..errors import HoEError
from .architecture import LinearModule
from .build_inputs import BuildInputs
from .lora_policy import LoraPolicy
from .model_weights import ModelWeights
from .options import AUTO_CAPTURE, BuildOptions
from .out_of_scope import squared_change
from .parentage import sampled_rows

MUCH = 0.25  # share of a policy's squared change; 0.08 to 0.12 gained nothing, 0.36 a third of the hypervolume


def captured(
    options: BuildOptions, opened: Callable[[Sequence[str]], BuildInputs]
) -> tuple[BuildOptions, BuildInputs, list[str]]:
    """Open what a build reads, and settle what it captures.

    Args:
        options: of the build.
        opened: opens base and policies with a choice of `capture`.

    Returns:
        the options with "auto" replaced, what was opened, and a note on what was chosen.
    """
    if options.capture != AUTO_CAPTURE:
        return options, opened(options.capture), []
    narrow, without = opened(()), replace(options, capture=())
    if narrow.shards:
        note = (
            "capture='auto' leaves embeddings out where weights come from the Hub one file at a time, since nothing is read "
            "beforehand; capture=['embeddings'] gives them experts"
        )
        return without, narrow, [note]
    if all(isinstance(policy, LoraPolicy) for policy in narrow.policies.values()):
        return without, narrow, []
    try:
        wide = opened(("embeddings",))
    except HoEError:  # resized, or shared with more than a head
        return without, narrow, []
    shares = embedding_shares(wide)
    if max(shares.values(), default=0.0) < MUCH:
        return without, narrow, []
    listed = ", ".join(f"{share:.0%} of what {name!r} changed" for name, share in shares.items())
    note = f"capture='auto' gave embeddings experts of their own, because they hold {listed} (squared, estimated)"
    return replace(options, capture=("embeddings",)), wide, [note]


def embedding_shares(inputs: BuildInputs) -> dict[str, float]:
    """By full policy the share of the squared change that lies in embeddings and a head that is not tied to them.

    Those are read whole, of linear layers some rows of each module.

    Args:
        inputs: opened with `capture=("embeddings",)`.
    """
    architecture, shares = inputs.architecture, {}
    for name, policy in inputs.policies.items():
        if inputs.base is None or isinstance(policy, LoraPolicy):
            continue
        apart = sum(squared_change(inputs.base, policy, each.weight) for each in architecture.targets if each.apart)
        linear = sum(_estimate(inputs.base, policy, target) for target in architecture.linear)
        shares[name] = apart / (apart + linear) if apart else 0.0
    return shares


def _estimate(base: ModelWeights, policy: ModelWeights, target: LinearModule) -> float:
    """The squared change of a module, from some of its rows."""
    changes = [(after.float() - before.float()).square().sum() for before, after in sampled_rows(base, policy, target)]
    return float(sum(changes)) * target.shape[0] / len(changes)
