"""The model of a directory's config without its weights: module names, types and shapes, on the meta device."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import transformers
from accelerate import init_empty_weights

from ..errors import CheckpointError
from ..tasks import AUTO_CLASSES

_TASKS = {  # suffix of the class name: PEFT's task type
    "ForCausalLM": "CAUSAL_LM",
    "LMHeadModel": "CAUSAL_LM",
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForQuestionAnswering": "QUESTION_ANS",
    "Model": "FEATURE_EXTRACTION",
}


def empty_model(directory: Path, task_type: str | None) -> tuple[Any, str | None]:
    """The model of a directory's config on the meta device, without a weight, and PEFT's name of what it does.

    Args:
        directory: holds config.json.
        task_type: overrides the class that the config names.

    Raises:
        CheckpointError: the config is missing or of an unknown architecture.
    """
    if task_type is not None and task_type not in AUTO_CLASSES:
        raise CheckpointError(
            f"task_type is {task_type!r}; allowed are {sorted(AUTO_CLASSES)}",
            argument="task_type", value=task_type, allowed=sorted(AUTO_CLASSES),
        )  # fmt: skip
    try:
        config = transformers.AutoConfig.from_pretrained(directory)
    except Exception as error:  # transformers raises OSError, ValueError, KeyError and validation errors of its own
        raise CheckpointError(
            f"{directory} has no config.json that transformers can read: {error}", path=directory
        ) from error
    name = (getattr(config, "architectures", None) or [""])[0]
    if task_type is None and hasattr(transformers, name):
        with init_empty_weights():
            return getattr(transformers, name)(config), _task(name, config)
    auto = AUTO_CLASSES[task_type or "CAUSAL_LM"]
    try:
        with init_empty_weights():
            model = getattr(transformers, auto).from_config(config)
    except ValueError as error:
        raise CheckpointError(
            f"{directory}: {auto} does not know the architecture {name or config.model_type!r}; pass task_type as one "
            f"of {sorted(AUTO_CLASSES)}",
            argument="task_type", value=task_type, allowed=sorted(AUTO_CLASSES), path=directory,
        ) from error  # fmt: skip
    return model, task_type or "CAUSAL_LM"


def _task(class_name: str, config: Any) -> str | None:
    if class_name.endswith("ForConditionalGeneration"):  # vision-language models too
        return "SEQ_2_SEQ_LM" if getattr(config, "is_encoder_decoder", False) else "CAUSAL_LM"
    return next((task for suffix, task in _TASKS.items() if class_name.endswith(suffix)), None)
