"""Which versions of PEFT and transformers work together."""

from __future__ import annotations

from importlib import metadata

from packaging.version import Version

PEFT_MINIMUM = "0.18.0"
# PEFT before 0.20 fails in transformers 5's own adapter save.
PEFT_MINIMUM_TRANSFORMERS_5 = "0.20.0"
# transformers 5.24 asks for it before it does anything with an adapter that stands in a model of its own, save loading it.
ASKING_TRANSFORMERS = "5.24.0"
ASKED_PEFT = "0.22.0"


def check() -> None:
    """Compare the installed versions; reads package metadata only.

    Raises:
        ImportError: PEFT is too old, on its own or for the installed transformers. Names both versions and the pip line
            that helps.
    """
    peft, transformers = metadata.version("peft"), metadata.version("transformers")
    five = Version(transformers).major >= 5
    minimum = PEFT_MINIMUM_TRANSFORMERS_5 if five else PEFT_MINIMUM
    # Release numbers only: 0.20.0.dev0 and 0.20.0rc1 have what 0.20 has.
    if Version(peft).release >= Version(minimum).release[:2]:
        return
    reason = f"with transformers {transformers} " if five else ""
    raise ImportError(
        f"peft_hoe {reason}needs peft>={minimum}, but peft {peft} and transformers {transformers} are installed. "
        f'Fix it with: pip install --upgrade "peft>={minimum}"'
    )


def refused_without_peft_model() -> str | None:
    """Why the installed transformers refuses to save or switch an adapter that no PeftModel holds; None if it does not.

    Names both versions and the pip line that helps.
    """
    peft, transformers = metadata.version("peft"), metadata.version("transformers")
    if Version(transformers) < Version(ASKING_TRANSFORMERS) or Version(peft) >= Version(ASKED_PEFT):
        return None
    return (
        f"transformers {transformers} asks for peft>={ASKED_PEFT} before it saves or switches an adapter that is not in a "
        f"PeftModel, and peft {peft} is installed: save_pretrained, set_adapter, disable_adapters and delete_adapter of this "
        f"model will fail. Load the adapter with peft.PeftModel.from_pretrained, or fix it with: pip install "
        f'"transformers<{ASKING_TRANSFORMERS}" (once it is released: pip install --upgrade "peft>={ASKED_PEFT}")'
    )
