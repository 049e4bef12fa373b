"""Requests to llama.cpp's server: a preference as the scales of the experts' LoRAs.

The server adds up scale times delta, so the votes of a preference are the scales, exactly, where experts are averaged as they
are (`interpolation="linear"`). With `"norm"` every module has a factor c of its own, which one scale for the whole file cannot
be: the best common factor stands for all of them, and what that loses is measured.

Two faults of the server are stepped around: its prompt cache returns states of other scales, and a LoRA that a request does not
name may keep its scale. So every request names all files and leaves the cache alone.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from ..errors import HoEError, StaticMergeError
from ..rewards.url import post, shown
from .engine_limits import refuse_apart
from .frozen_votes import freeze
from .lora import open_source
from .lora_factors import lora_factors


@dataclass(frozen=True)
class ExpertScales:
    """What a request sends for a preference.

    Attributes:
        experts: names, in the order of the files.
        scales: of each of them.
        factor: the common factor in them; 1 where experts are averaged as they are.
        lost: what the common factor loses, as a share of the delta's norm; 0 when exact.
    """

    experts: list[str]
    scales: list[float]
    factor: float
    lost: float

    @property
    def lora(self) -> list[dict[str, Any]]:
        """The `lora` list of a request: every file, also those with scale 0."""
        return [{"id": index, "scale": scale} for index, scale in enumerate(self.scales)]


def expert_scales(
    source: nn.Module | str | os.PathLike[str],
    preference: Any,
    *,
    routers: str = "keep",
    adapter_name: str | None = None,
) -> ExpertScales:
    """The scales of the files of `export_gguf_experts` at a preference.

    Args:
        source: as for `export_lora`.
        preference: N numbers or `{objective: weight}`.
        routers: as for `export_lora`; "keep" refuses where trained routers vote.
        adapter_name: as for `export_lora`.

    Raises:
        PreferenceError: not a point of the simplex.
        StaticMergeError: trained routers vote.
    """
    adapter, _ = open_source(source, None, None, adapter_name)
    refuse_apart(adapter, "a GGUF LoRA cannot change a norm", norms_alone=True)
    votes = freeze(adapter.config, preference, routers)
    voting = [*votes.trained, *votes.modular]
    if voting and routers == "keep":
        raise StaticMergeError(
            f"at {list(votes.route.requested)} the trained routers {voting} choose experts by the input or the module, which "
            'scales cannot. Use routers="drop" (--routers drop), or export this preference alone over calibration prompts '
            "(peft-hoe export --format gguf --preference ... --prompts FILE)",
            value=list(votes.route.requested),
            routers=voting,
        )
    factor, lost = 1.0, 0.0
    if adapter.config.interpolation == "norm":
        # Least squares over modules of delta d and factor c: the best common one is sum(c |d|^2) / sum(|d|^2).
        factors = [float(adapter.length_factor(module, votes.shared)) for module in adapter.modules]
        lengths = [lora_factors(adapter, module, votes.shared).norm for module in adapter.modules]  # c |d|
        squares = [(length / c) ** 2 for length, c in zip(lengths, factors, strict=True)]
        factor = sum(c * square for c, square in zip(factors, squares, strict=True)) / (sum(squares) or 1.0) or 1.0
        missed = sum((c - factor) ** 2 * square for c, square in zip(factors, squares, strict=True))
        lost = math.sqrt(missed) / (math.hypot(*lengths) or 1.0)
    return ExpertScales(adapter.config.expert_names, [factor * vote for vote in votes.shared.tolist()], factor, lost)


def request_body(scales: ExpertScales | Sequence[float], **body: Any) -> dict[str, Any]:
    """The JSON of a request that mixes the experts safely.

    Args:
        scales: of every file, in their order.
        **body: everything else, such as `prompt` or `messages`.

    Raises:
        HoEError: `body` sets what is set here.
    """
    if taken := sorted({"lora", "cache_prompt"} & body.keys()):
        raise HoEError(
            f"{taken} cannot be set: the scales name all files, and the server's prompt cache mixes up states of "
            "different scales",
            argument=taken[0],
        )
    values = scales if isinstance(scales, ExpertScales) else ExpertScales([], [float(s) for s in scales], 1.0, 0.0)
    return {**body, "lora": values.lora, "cache_prompt": False}


def complete(
    url: str,
    scales: ExpertScales | Sequence[float],
    *,
    path: str = "/completion",
    timeout: float = 60.0,
    retries: int = 0,
    headers: Mapping[str, str] | None = None,
    **body: Any,
) -> dict[str, Any]:
    """Ask llama-server, with the experts mixed by `scales`.

    Args:
        url: of the server, such as `http://127.0.0.1:8080`.
        scales: as for `request_body`.
        path: `/completion`, `/v1/completions` or `/v1/chat/completions`.
        timeout: seconds that the server may stay silent.
        retries: how often the request is sent again after a timeout, a broken connection, or status 429 or 5xx.
        headers: more HTTP headers, such as an authorisation.
        **body: what the path takes, such as `prompt=`, `n_predict=`, `messages=`.

    Returns:
        the server's answer.

    Raises:
        HoEError: no answer, an HTTP error, or one that is not JSON.
    """
    if body.get("stream"):
        raise HoEError(
            "stream=True is not for this function; send request_body(...) with a client that streams",
            argument="stream", value=body["stream"], allowed=[False],
        )  # fmt: skip
    content = json.dumps(request_body(scales, **body)).encode()
    answer = post(
        url.rstrip("/") + path,
        content,
        timeout=timeout,
        retries=retries,
        backoff=0.5,
        headers=headers or {},
        error=HoEError,
    )
    try:
        parsed: dict[str, Any] = json.loads(answer)
    except ValueError:
        raise HoEError(f"{url} answered {shown(answer)}, which is not JSON", argument="url", value=url) from None
    return parsed
