"""How methods turn prompts into texts: one decoding for all that are compared.

Shapes: K rows, P prompt positions.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig

from ..errors import HoEError
from .prompts import PromptCollator
from .settings import decoding_record, generating


class Decoder:
    """Generation settings and a tokenizer.

    Args:
        model: whose stop tokens count where `generation_config` has none; nothing else of its own settings does.
        tokenizer: the policy's, or a processor that holds it.
        max_new_tokens: length of a completion.
        do_sample: sample from the whole vocabulary; off, greedy.
        temperature: of sampling.
        generation_config: any other decoding in place of the three above; it needs `max_new_tokens`.

    Raises:
        HoEError: an option is out of range, or the tokenizer has no padding token.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        max_new_tokens: int = 64,
        do_sample: bool = False,
        temperature: float = 1.0,
        generation_config: GenerationConfig | None = None,
    ) -> None:
        if max_new_tokens < 1 or not temperature > 0:
            raise HoEError(
                f"max_new_tokens is {max_new_tokens} and temperature {temperature}; both must be above 0 (greedy is "
                "do_sample=False)"
            )
        self.collate = PromptCollator(tokenizer)
        self.tokenizer = self.collate.tokenizer
        sampling: dict[str, Any] = {"temperature": temperature, "top_k": 0, "top_p": 1.0} if do_sample else {}
        self.settings = copy.deepcopy(generation_config) or GenerationConfig(
            max_new_tokens=max_new_tokens, do_sample=do_sample, **sampling
        )
        if self.settings.max_new_tokens is None:
            raise HoEError("generation_config has no max_new_tokens; say how long completions may get")
        self.settings.pad_token_id = self.tokenizer.pad_token_id
        if self.settings.eos_token_id is None:
            self.settings.eos_token_id = _stop_tokens(model, self.tokenizer)

    @property
    def record(self) -> dict[str, Any]:
        """Whatever of the settings is not transformers' default, as plain JSON."""
        return decoding_record(self.settings)

    @torch.no_grad()
    def complete(self, model: Any, prompts: Sequence[Any]) -> list[str]:
        """Complete K prompts with a model as it stands; its own generation settings are as before afterwards."""
        ids, mask = self.tokens(model, prompts)
        with generating(model, self.settings):
            output = model.generate(input_ids=ids, attention_mask=mask, generation_config=self.settings)
        decoder_only = not getattr(model.config, "is_encoder_decoder", False)
        return self.texts(output[:, ids.shape[1] :] if decoder_only else output)

    def tokens(self, model: Any, prompts: Sequence[Any]) -> tuple[Tensor, Tensor]:
        """Ids and attention mask `(K, P)` of prompts, padded on the left, on the model's device."""
        batch = self.collate([{"prompt": prompt} for prompt in prompts])
        device = next(model.parameters()).device
        return batch["input_ids"].to(device), batch["attention_mask"].to(device)

    def texts(self, new: Tensor) -> list[str]:
        """The texts of new tokens `(K, T)`."""
        return list(self.tokenizer.batch_decode(new, skip_special_tokens=True))


def weights_digest(model: Any) -> str:
    """Changes with a model's weights: HoE tensors whole; of the others 256 numbers, which no training leaves as they were."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        if not isinstance(tensor, Tensor):
            continue
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        if tensor.device.type != "meta" and tensor.numel():
            step = 1 if "hoe_" in name else max(1, tensor.numel() // 256)
            some = tensor.detach().flatten()[::step].contiguous().cpu()
            digest.update(some.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _stop_tokens(model: Any, tokenizer: Any) -> Any:
    """The tokenizer's end of text, and what else the model's own settings stop at, such as the end of a turn."""
    own = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    stops = {tokenizer.eos_token_id, *(own if isinstance(own, (list, tuple)) else [own])} - {None}
    return min(stops) if len(stops) == 1 else sorted(stops) or None
