"""Where routers stand and how they train unless told otherwise: one place for trainers, commands, `reproduce` and benchmarks.

The paper places experts and routers by hand (D.2): a merged expert at the centroid and a router at [.25, .25, .5] for three
objectives, others for five, and prints no router for two. Here all objectives are treated alike.

An update is one step of Adam on fresh answers: what `docs/measurements/router_training.md` was measured with, on models of
width 64. The rate of a router by module was tried with one seed.

Shapes: N objectives.
"""

from __future__ import annotations

from .preference import uniform

UPDATES = 60
MOST_UPDATES = 240  # where training itself finds its end
COOL_DOWN = 10  # then the last ones, in which the rate falls to 0
RESPONSES = 128  # answers of an update, on each process
FORWARD = 16  # of these in one forward with gradients; gradients add up to the same
SAMPLES = 8  # answers to one prompt, where they are compared with one another

# Of Adam, falling to 0. One step moves each of the weights by about the rate, and so a logit by about the rate times the width
# of what the module reads. A router by module has a bias alone, which no width multiplies.
TOKEN_RATE = 3.2
MODULE_RATE = 0.3
RATES = f"{TOKEN_RATE:g} / hidden size, and {MODULE_RATE:g} for a router by module"


def learning_rate(kind: str, hidden_size: int) -> float:
    """The rate of a router of a kind ("token" or "module") in a model of that hidden size.

    >>> from peft_hoe.router_recipe import learning_rate
    >>> learning_rate("token", 64), learning_rate("module", 64)
    (0.05, 0.3)
    """
    return MODULE_RATE if kind == "module" else TOKEN_RATE / hidden_size


def default_experts(n: int) -> list[list[float]]:
    """The merged expert for N objectives, `(1, N)`: at the centroid.

    >>> from peft_hoe.router_recipe import default_experts
    >>> default_experts(2)
    [[0.5, 0.5]]
    """
    return [uniform(n).tolist()]


def default_routers(n: int) -> list[list[float]]:
    """The routers for N objectives, `(N, N)`: one between the centroid and each corner.

    [.75, .25] and [.25, .75] for two, the permutations of [.5, .25, .25] for three; with more, half for one objective and the
    rest even.

    >>> from peft_hoe.router_recipe import default_routers
    >>> default_routers(2), default_routers(3)
    ([[0.75, 0.25], [0.25, 0.75]], [[0.5, 0.25, 0.25], [0.25, 0.5, 0.25], [0.25, 0.25, 0.5]])
    """
    most = 0.75 if n == 2 else 0.5
    rest = (1 - most) / (n - 1)
    return [[most if i == k else rest for i in range(n)] for k in range(n)]
