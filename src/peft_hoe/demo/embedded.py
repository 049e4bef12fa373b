"""The tiny models that the package carries: a base, two policies of it, their rewards, and an adapter of both.

They load in a blink and need no network, so that examples, tests and a first try run anywhere. `assets/README.md` says how they
were made and what they score.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..experts import BuildReport, build_adapter
from . import rewards

if TYPE_CHECKING:
    from peft import PeftModel

Reward = Callable[[Sequence[str], Sequence[str]], Sequence[float]]

ASSETS = Path(__file__).parent / "assets"
BASE: str = str(ASSETS / "base")
POLICIES: Mapping[str, str] = {name: str(ASSETS / name) for name in ("cheerful", "vivid")}
REWARDS: Mapping[str, Reward] = {"cheerful": rewards.cheerful, "vivid": rewards.vivid}


def load_base() -> Any:
    """The base: a Llama of 89,184 parameters that tells little stories, in evaluation mode.

    >>> from peft_hoe import demo
    >>> demo.load_base().num_parameters()
    89184
    """
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(BASE).eval()


def load_tokenizer() -> Any:
    """The tokenizer of base and policies: a token a word, padding on the left as generation needs.

    >>> from peft_hoe import demo
    >>> demo.load_tokenizer().tokenize("Mia laughed.")
    ['▁Mia', '▁laughed', '.']
    """
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(BASE, padding_side="left")


def load_prompts() -> list[str]:
    """Forty openings of stories that neither policy was trained on.

    >>> from peft_hoe import demo
    >>> demo.load_prompts()[0]
    'One day, Sam the dog went to the market. The bell changed.'
    """
    found: list[str] = json.loads((ASSETS / "prompts.json").read_text(encoding="utf-8"))
    return found


def build_demo_adapter(output_dir: str | os.PathLike[str], **options: Any) -> BuildReport:
    """`build_adapter` on the embedded base and policies, without a progress bar.

    Args:
        output_dir: where the adapter goes.
        options: any other argument of `build_adapter`, such as `routers=[[0.75, 0.25]]` or `overwrite=True`.

    >>> import tempfile
    >>> from peft_hoe import demo
    >>> with tempfile.TemporaryDirectory() as directory:
    ...     report = demo.build_demo_adapter(directory)
    >>> [expert["name"] for expert in report.experts]
    ['cheerful', 'vivid', 'centroid']
    """
    return build_adapter(BASE, POLICIES, output_dir, **{"progress": False, **options})


def load_demo_adapter(**options: Any) -> PeftModel:
    """The base with an adapter that `build_demo_adapter` makes from these options; nothing of it stays on disk.

    >>> from peft_hoe import demo
    >>> model = demo.load_demo_adapter(routers=[[0.75, 0.25]])
    >>> model.route([0.75, 0.25]).experts
    {'r0': 1.0}
    """
    from peft import PeftModel

    with tempfile.TemporaryDirectory() as directory:
        build_demo_adapter(directory, **options)
        return PeftModel.from_pretrained(load_base(), directory).eval()
