"""The embedded demonstration: a tiny base, two tiny policies, their rewards, and the job on them.

    from peft_hoe import demo

    model, tokenizer = demo.load_demo_adapter(), demo.load_tokenizer()

`BASE` and `POLICIES` are the models' folders and `REWARDS` their reward functions, as `build_adapter`, `sweep` and the command
line take them. `peft-hoe demo` does the whole job.
"""

from .embedded import (
    BASE,
    POLICIES,
    REWARDS,
    build_demo_adapter,
    load_base,
    load_demo_adapter,
    load_prompts,
    load_tokenizer,
)

__all__ = [
    "BASE",
    "POLICIES",
    "REWARDS",
    "build_demo_adapter",
    "load_base",
    "load_demo_adapter",
    "load_prompts",
    "load_tokenizer",
]
