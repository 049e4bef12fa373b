"""Merging: several policies' task vectors become one, for a preference (paper eq. 4).

Every method is a pure function `(deltas, weights, **options) -> delta (...)` of one module's raw task vectors, K float32
tensors `(...)` of one shape, and the preference, K numbers above 0 that sum to 1. `merge` is the way in: it drops policies of
weight 0 and lets the weights sum to 1. For every method

- one policy alone gives its own task vector, trimmed as the method trims; at a density of 1 exactly;
- the order of policies does not matter, and scaling all task vectors scales the result;
- everywhere 0/0 = 0.

A method is one function in a file of this folder, and one entry of `methods.METHODS`.
"""

from .methods import METHODS, MergeMethod, check_merge, merge

__all__ = ["METHODS", "MergeMethod", "check_merge", "merge"]
