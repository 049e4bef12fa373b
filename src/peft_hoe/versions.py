"""Which versions of PEFT and transformers work together."""

from __future__ import annotations

from importlib import metadata

from packaging.version import Version

PEFT_MINIMUM = "0.18.0"
# PEFT before 0.20 fails in transformers 5's own adapter save.
PEFT_MINIMUM_TRANSFORMERS_5 = "0.20.0"


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
