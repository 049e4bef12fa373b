from __future__ import annotations

import evaluate
import pytest


@pytest.fixture(scope="session", autouse=True)
def evaluate_cache(tmp_path_factory):
    """Modules and their rows go into an empty cache. One for the session: Python imports `evaluate_modules` only once."""
    folder = tmp_path_factory.mktemp("huggingface")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluate.config, "HF_MODULES_CACHE", folder / "modules")
        patch.setattr(evaluate.config, "HF_METRICS_CACHE", folder / "metrics")
        yield folder
