"""`peft-hoe vllm-check`: whether trained routers can vote inside the vLLM that is installed here."""

from __future__ import annotations

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """It has none."""


def run(arguments: argparse.Namespace) -> int:
    """Print what fits or does not; 1 where routers would be left out."""
    from ..serving.vllm_seams import problems

    found = problems()
    for problem in found:
        print(f"does not fit: {problem}")
    if found:
        print(
            "trained routers cannot vote inside this vLLM; their preferences would get the interpolation of the LoRA experts"
        )
        return 1
    print("trained routers can vote inside this vLLM")
    return 0
