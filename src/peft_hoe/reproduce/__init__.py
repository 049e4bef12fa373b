"""A whole experiment in one resumable call: build, train routers, sweep, baselines, report.

    plan = Plan.of("helpful-assistant", base=..., policies={"helpful": ..., "harmless": ..., "humor": ...}, output_dir="out")
    print(describe(plan))
    found = reproduce(plan)

docs/reproduce.md has the command of the same name.
"""

from .experiment import Reproduction, describe, reproduce
from .plan import OWN, Plan

__all__ = ["OWN", "Plan", "Reproduction", "describe", "reproduce"]
