"""The modules for Hugging Face `evaluate` that come with the package; no network is needed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..errors import MetricError

_FOLDER = Path(__file__).parent / "evaluate_modules"
NAMES = ("hypervolume", "pareto_dominance", "steerability")


def path(name: str) -> str:
    """The folder of a module, for `evaluate.load`.

    Args:
        name: "hypervolume", "pareto_dominance" or "steerability".

    Raises:
        MetricError: there is no such module.

    >>> from peft_hoe.metrics import path
    >>> path("hypervolume").endswith("hypervolume")
    True
    """
    if name not in NAMES:
        raise MetricError(
            f"there is no evaluate module {name!r}; use one of {', '.join(NAMES)}",
            argument="name", value=name, allowed=NAMES,
        )  # fmt: skip
    return str(_FOLDER / name)


def load(name: str, **settings: Any) -> Any:
    """`evaluate.load` of a module.

    Args:
        name: as for `path`.
        settings: of `evaluate.load`, such as `num_process`, `process_id`, `experiment_id` and `cache_dir`.

    Returns:
        An `evaluate.Metric`.

    Raises:
        MetricError: there is no such module.
        ImportError: evaluate is missing; says what to install.

    >>> from peft_hoe.metrics import load
    >>> module = load("hypervolume")
    >>> module.compute(predictions=[[1.0, 2.0], [2.0, 1.0]], reference_point=[0.0, 0.0])["hypervolume"]
    3.0
    """
    folder = path(name)
    try:
        import evaluate
    except ImportError as error:
        raise ImportError(f"this needs evaluate: pip install 'peft-hoe[eval]' ({error})") from error
    return evaluate.load(folder, **settings)
