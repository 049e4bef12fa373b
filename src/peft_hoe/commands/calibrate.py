"""`peft-hoe calibrate`: a dial whose equal steps are equal steps along the front, from a sweep of the adapter."""

from __future__ import annotations

import argparse
import os
import tempfile
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    add = parser.add_argument
    add("adapter", metavar="ADAPTER", help="directory of a HoE adapter; its adapter_config.json gets the calibration")
    add(
        "--sweep",
        metavar="DIR",
        required=True,
        help="directory of a sweep of it, on prompts that were kept for choices",
    )
    add("--replicates", type=int, default=1000, help="of the bootstrap (default 1000)")


def run(arguments: argparse.Namespace) -> int:
    """Calibrate and print the map.

    Raises:
        HoEError: the adapter or the sweep cannot be used, or they do not belong together.
    """
    from peft.utils import CONFIG_NAME

    from ..errors import CheckpointError
    from ..evaluation import Sweep, calibrate
    from ..experts.saved_adapter import open_adapter

    adapter = Path(arguments.adapter)
    if not (adapter / CONFIG_NAME).is_file():
        raise CheckpointError(
            f"{adapter} holds no {CONFIG_NAME}; give the directory of an adapter, since the calibration is written there",
            path=adapter,
        )
    saved = open_adapter(adapter)
    report = calibrate(saved, Sweep.load(arguments.sweep), replicates=arguments.replicates)
    with tempfile.TemporaryDirectory(dir=adapter) as whole:
        saved.config.save_pretrained(whole)
        os.replace(Path(whole) / CONFIG_NAME, adapter / CONFIG_NAME)
    print(report.table())
    return 0
