"""The policy of a run: what it must be, how it generates, and what is put back afterwards."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any

from peft import PeftModel, get_peft_model
from torch import nn

from ...config import HoEConfig
from ...errors import ExpertError, HoEError
from ...generation.decoding import padding_token
from ...generation.settings import modes_kept
from ...generation.vocabulary import tokenizer_of
from ...tuner.functional import adapter_of, check_in_effect, mark_trained, use_preference
from ...tuner.steering import Steering
from .optimizer import frozen
from .trained_router import TrainedRouter


def steerable(model: Any, peft_config: Any = None) -> Any:
    """A PeftModel with a HoE adapter: `model`, or `model` with the adapter that `peft_config` says.

    Args:
        model: a PeftModel; with `peft_config` the plain model.
        peft_config: directory or Hub id of a built adapter; or a HoEConfig with `init_weights=False`, whose experts are random.

    Raises:
        PreferenceError: there is no HoE adapter.
        HoEError: `peft_config` is neither, or the model is none that this trainer can train.
    """
    Steering.find(model)  # refuses what is no model
    if peft_config is not None:
        model = _with_adapter(model, peft_config)
    Steering.of(model)
    if not isinstance(model, PeftModel):
        raise HoEError(
            f"model is a {type(model).__name__} with HoE layers, but no PeftModel; load it with PeftModel.from_pretrained",
            argument="model",
            value=type(model).__name__,
        )
    if getattr(model.config, "is_encoder_decoder", False):
        raise HoEError(
            "model is an encoder-decoder; routers are trained with decoder-only language models",
            argument="model",
            value=type(model).__name__,
        )
    return model


def _with_adapter(model: Any, peft_config: Any) -> Any:
    if isinstance(model, PeftModel):
        raise HoEError(
            "model is a PeftModel and peft_config is given too; give the plain model with it, or leave it out",
            argument="peft_config",
            value=peft_config,
        )
    if isinstance(peft_config, (str, os.PathLike)):
        try:
            return PeftModel.from_pretrained(model, os.fspath(peft_config))
        except HoEError:
            raise
        except (OSError, ValueError) as error:
            raise HoEError(
                f"cannot load the adapter that peft_config names, {os.fspath(peft_config)!r}: {error}",
                argument="peft_config", value=peft_config,
            ) from error  # fmt: skip
    if not isinstance(peft_config, HoEConfig):
        raise HoEError(
            f"peft_config is a {type(peft_config).__name__}; give the directory of a HoE adapter, or a model that has one",
            argument="peft_config",
        )
    if peft_config.init_weights:
        raise HoEError(
            "peft_config is a HoEConfig, whose new experts are all zero, so a router has nothing to choose between. Build them "
            "from policies with peft_hoe.build_adapter(base, policies, directory, routers=...), and give peft_config=directory",
            argument="peft_config",
        )
    return get_peft_model(model, peft_config)


def check_reference(ref_model: Any, policy: Any) -> None:
    """See that a reference for a KL term is another model than the policy.

    Raises:
        HoEError: it is no loaded model, or carries the policy's own adapter.
    """
    if ref_model is None:
        return
    if not isinstance(ref_model, nn.Module):
        what = repr(ref_model) if isinstance(ref_model, str) else type(ref_model).__name__
        raise HoEError(
            f"ref_model is {what}; load it, or leave it out for the base model", argument="ref_model", value=ref_model
        )
    if Steering.find(ref_model) is Steering.of(policy):
        raise HoEError(
            "ref_model carries the policy's own adapter, so that it is no other model: PEFT puts an adapter into the model "
            "that it is given. Leave ref_model out for the base model, or load the base a second time",
            argument="ref_model",
        )


def check_padding(policy: Any, processing_class: Any, trainer: str) -> None:
    """See that a trainer of TRL, which looks padding up in the embedding, can do so.

    Raises:
        HoEError: the embedding has no row for the tokenizer's padding token.
    """
    tokenizer = tokenizer_of(processing_class)
    if padding_token(policy, tokenizer) != tokenizer.pad_token_id:
        raise HoEError(
            f"the padding token {tokenizer.pad_token!r} is token {tokenizer.pad_token_id}, for which the model has no "
            f"embedding, and TRL's {trainer} looks it up; set tokenizer.pad_token = tokenizer.eos_token, or take another "
            "token that the model knows",
            argument="processing_class",
            value=tokenizer.pad_token_id,
        )


def hidden_size(policy: Any) -> int:
    """Width of the policy's last hidden state."""
    config = policy.config.get_text_config() if hasattr(policy.config, "get_text_config") else policy.config
    size: int = config.hidden_size
    return size


def stop_dropout(model: nn.Module | None) -> None:
    """Set the rates of a model's dropout modules to 0."""
    for module in () if model is None else model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0


def without_dropout(model: Any) -> None:
    """Put a policy or a critic into evaluation mode, but for the modules that checkpoint: two forwards must give the same.

    `stop_dropout` is not enough: some models drop out by a function that goes by the mode.
    """
    model.eval()
    for module in model.modules():
        if getattr(module, "gradient_checkpointing", False):
            module.training = True


@contextlib.contextmanager
def checkpointed(policy: Any, args: Any) -> Iterator[None]:
    """Gradient checkpointing, where the arguments ask for it; off again afterwards if it was off before.

    Reentrant checkpointing hooks the embeddings, and leaves it to `ModelSettings` to take the hook away.
    """
    model = policy.get_base_model()
    before = any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
    wanted = bool(args.gradient_checkpointing) and not before
    if wanted:
        settings = {"use_reentrant": False} | (args.gradient_checkpointing_kwargs or {})
        _renamed(model, "gradient_checkpointing_enable")(settings)
        if settings["use_reentrant"]:  # it has gradients only where an input has some
            model.enable_input_require_grads()
    try:
        yield
    finally:
        if wanted:
            _renamed(model, "gradient_checkpointing_disable")()


def _renamed(model: Any, name: str) -> Any:
    """A method of transformers before 5.23, or what it is called since."""
    return getattr(model, name.replace("gradient", "activation"), None) or getattr(model, name)


@contextlib.contextmanager
def reaching_threads(policy: Any, router: TrainedRouter) -> Iterator[None]:
    """The router's preference as the adapter's default: generation in a thread of its own sees no `use_preference` block."""
    config = adapter_of(policy, router.adapter).config
    before, config.default_preference = config.default_preference, router.preference.tolist()
    try:
        yield
    finally:
        config.default_preference = before


@contextlib.contextmanager
def steered(policy: Any, router: TrainedRouter) -> Iterator[None]:
    """While the block lasts, the policy serves the router's preference, the router votes from its own Parameters, and nothing
    in the policy trains. Afterwards the user's preference, modes, what trains, and the router's mark are as they were.

    Raises:
        ExpertError: the router is not what serves its preference.
        PreferenceError: the adapter is disabled or merged.
    """
    check_in_effect(policy, router.adapter, unmerged=True)
    adapter = adapter_of(policy, router.adapter)
    before = bool(adapter.trained[router.index])
    mark_trained(policy, router.router, adapter_name=router.adapter)
    try:
        plan = adapter.plan(router.preference)
        if float((plan.live + plan.by_module)[0, router.index]) < 1 - 1e-6:
            raise ExpertError(
                f"router {router.router!r} does not vote at its own preference {router.preference.tolist()}",
                argument="router",
                value=router.router,
            )
        here = use_preference(policy, {router.adapter: router.preference.tolist()})
        with modes_kept(policy), frozen(policy), here, router.attached():
            yield
    finally:
        mark_trained(policy, router.router, trained=before, adapter_name=router.adapter)
