"""From policies to a front: build an adapter, write at several preferences, score all of them.

    python examples/steer.py

Runs on the tiny models that the package brings. For your own, change the constants: paths or Hub ids of a base and of its
fine-tuned versions or LoRA adapters, prompts, and a reward for each objective. Needs pip install "peft-hoe[eval]".
"""

import argparse
from pathlib import Path

from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

import peft_hoe
from peft_hoe import demo

BASE = demo.BASE
POLICIES = demo.POLICIES  # {objective: path}
REWARDS = demo.REWARDS  # {objective: function of prompts and completions that returns a number for each}
PROMPTS = demo.load_prompts()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("steered"), help="a folder for everything")
    parser.add_argument("--prompts", type=int, default=len(PROMPTS), help="how many to score on")
    arguments = parser.parse_args()

    # Policies become a steerable adapter: one expert for each, and one in the middle. No training.
    adapter = arguments.output / "adapter"
    peft_hoe.build_adapter(BASE, POLICIES, adapter, overwrite=True)

    tokenizer = AutoTokenizer.from_pretrained(BASE, padding_side="left")
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(BASE), adapter).eval()

    # Every row of a batch has a preference of its own.
    preferences = [[1, 0], [0.75, 0.25], [0.5, 0.5], [0.25, 0.75], [0, 1]]
    batch = tokenizer(PROMPTS[:1] * len(preferences), return_tensors="pt").to(model.device)
    texts = model.generate(**batch, preference=preferences, max_new_tokens=32, do_sample=False)
    for preference, text in zip(preferences, tokenizer.batch_decode(texts, skip_special_tokens=True), strict=True):
        print(f"\n{dict(zip(POLICIES, preference, strict=True))}\n{text}")

    # A sweep writes every prompt at every preference of a grid and scores what comes out.
    prompts = PROMPTS[: arguments.prompts]
    found = peft_hoe.sweep(model, tokenizer, prompts, REWARDS, decoding={"max_new_tokens": 48}, progress=False)
    print(f"\n{found.table()}\n\n{found.metrics().table()}")
    found.plot(arguments.output / "front.png")
    print(f"\nThe adapter and the picture of its front are in {arguments.output}")


if __name__ == "__main__":
    main()
