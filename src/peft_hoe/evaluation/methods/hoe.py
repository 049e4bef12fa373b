"""What a sweep measures: methods that turn prompts and preferences into completions.

A method is any callable `(prompts, preferences) -> completions`: K prompts (texts or chat messages), preferences `(K, N)`, K
texts. Rows may have different preferences, and a greedy method's text for a row must not depend on the other rows. What else a
sweep reads of a method, each optional:

| attribute | meaning | without it |
|---|---|---|
| `name` | what tables and plots call it | the function's name |
| `objectives` | the N names, in the preferences' order | the names of the rewards |
| `decoding` | how it generates, as `Decoding.record`; `do_sample: True` says that a second text would differ | `{}` |
| `settings` | what else its texts depend on, plain JSON | `{}` |
| `fingerprint()` | tells this model from another, so that an interrupted sweep is not continued with the wrong one | `None` |
| `mixes_rows` | False where all rows of a call must share one preference | True |

`HoEMethod` is the one for models with HoE layers; others (a server, say) are functions or small classes of the same shape, and
`evaluation.baselines` has those that HoE is compared with.

Shapes: K rows, P prompt positions, N objectives.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch

from ...adapter_sample import sample_of
from ...errors import check_choice
from ...generation.completer import Completer
from ...generation.settings import evaluating
from ...preference import FloatArray
from ...tuner.adapter import ROUTERS
from ...tuner.functional import adapter_of
from ...tuner.growing import own_tensors
from .fingerprints import model_fingerprint


class Generate(Protocol):
    """The smallest method.

    >>> def answer(prompts, preferences):
    ...     return ["glad" if weights[0] > 0.5 else "red" for weights in preferences]
    >>> answer(["Once", "Once"], [[1, 0], [0, 1]])
    ['glad', 'red']
    """

    def __call__(self, prompts: Sequence[Any], preferences: FloatArray, /) -> Sequence[str]:
        """Complete K prompts, row k at `preferences[k]` of `(K, N)`."""


class HoEMethod:
    """A model that carries HoE layers, steered row by row.

    Args:
        model: its first active HoE adapter is steered.
        tokenizer: the policy's, or a processor that holds it.
        decoding: what `Decoding.of` takes; default greedy, 64 new tokens.
        routers: as in `HoEModel.use_preference`: "keep", "static", or "drop" for the interpolation of the LoRA experts alone.

    Raises:
        PreferenceError: there is no active HoE adapter.
        HoEError: an option is out of range, or the tokenizer has no padding token.

    >>> import numpy as np
    >>> from peft_hoe import Decoding, demo
    >>> from peft_hoe.evaluation import HoEMethod
    >>> method = HoEMethod(demo.load_demo_adapter(), demo.load_tokenizer(), decoding=Decoding(8))
    >>> len(method(["Once upon a time", "One day"], np.array([[1.0, 0.0], [0.2, 0.8]])))
    2
    """

    name = "HoE"

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        decoding: Any = None,
        routers: str = "keep",
    ) -> None:
        adapter = adapter_of(model)
        self.model, self.adapter = model, adapter.name
        self.objectives = tuple(adapter.objectives)
        check_choice("routers", routers, ROUTERS)
        self.completer = Completer(model, tokenizer, decoding)
        self.tokenizer = self.completer.tokenizer
        self.routers = routers
        self.mixes_rows = True

    @property
    def decoding(self) -> dict[str, Any]:
        """How it generates, as plain JSON."""
        return self.completer.decoding.record

    @property
    def settings(self) -> dict[str, Any]:
        """What else its texts depend on."""
        return {"routers": self.routers}

    def fingerprint(self) -> str:
        """Changes with the adapter's tensors, preferences and `trained` marks, and with the base."""
        return model_fingerprint(self.model, self.adapter)

    def calibrates(self) -> dict[str, Any]:
        """Which experts and trained routers a calibration of the dial by this method's sweep holds for."""
        return adapter_of(self.model, self.adapter).config.calibrates()

    def sample(self) -> dict[str, list[float] | None]:
        """Some of the adapter's numbers, by which its files are known."""
        tensors = own_tensors(self.model, self.adapter)
        return sample_of(list(tensors), tensors.__getitem__)

    @torch.no_grad()
    def __call__(self, prompts: Sequence[Any], preferences: FloatArray) -> list[str]:
        """Complete K prompts, row k at `preferences[k]` of `(K, N)`.

        The model's modes, marks and generation settings are as before afterwards.
        """
        wanted = np.asarray(preferences, dtype=np.float64)
        with evaluating(self.model):
            texts, self.mixes_rows = self.completer.complete_at(
                self.model, self.adapter, prompts, wanted, mixed=self.mixes_rows, routers=self.routers
            )
        return texts
