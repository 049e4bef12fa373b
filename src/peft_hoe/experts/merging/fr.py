"""FR-Merging: task vectors without their lowest frequencies."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..pieces import kth_smallest
from ..pruning import prune_rank
from .sums import linear


def fr(deltas: Sequence[Tensor], weights: Sequence[float], *, density: float) -> Tensor:
    """The filter of FREE-Merging: each policy's matrix loses its lowest spatial frequencies; then the weighted sum.

    A frequency says how fast entries change from neuron to neuron. The order of neurons in a layer means nothing to the model:
    who permutes them gets another result, with this method alone. So take it as an experiment.

    Args:
        deltas: K tensors `(d_out, d_in)`, or of one row `(n,)`.
        weights: K numbers.
        density: share of frequencies that stay, the highest, in [0, 1]; those tied with the last one stay.
    """
    merged = linear(deltas, weights)
    if density == 1:
        return merged
    frequencies = _radius(merged.shape).to(merged.device)  # the same on every device, with its ties
    dropped = frequencies.numel() - prune_rank(density, frequencies.numel())
    if dropped == frequencies.numel():
        return merged.zero_()
    lowest = kth_smallest(frequencies, dropped + 1)
    # The transform is linear, so the sum is filtered once.
    spectrum = torch.fft.fft2(merged) if merged.ndim > 1 else torch.fft.fft(merged)
    spectrum[frequencies < lowest] = 0
    return (torch.fft.ifft2(spectrum) if merged.ndim > 1 else torch.fft.ifft(spectrum)).real.contiguous()


def _radius(shape: Sequence[int]) -> Tensor:
    """The length of every entry's frequency, in the shape of the transform."""
    parts = [torch.fft.fftfreq(side).square() for side in shape]
    return (parts[0] if len(parts) == 1 else parts[0][:, None] + parts[1]).sqrt()
