"""Train the routers of an adapter, and save it with them.

    python examples/train_router.py

Runs on the tiny models that the package brings. For your own, change `load_policy` and the constants: an adapter with routers
(`peft-hoe build ... --router 0.25,0.75`), prompts, and a reward for each of its objectives. On several processes it is started
by torchrun or accelerate, see docs/launching.md.
"""

import argparse
from typing import Any

from peft_hoe import HoERouterConfig, demo, train_routers

PROMPTS = demo.load_prompts()
TRAINING, HELD_OUT = PROMPTS[:30], PROMPTS[30:]
REWARDS = demo.REWARDS  # {objective: function of prompts and completions that returns a number for each}


def load_policy() -> tuple[Any, Any]:
    """A PeftModel with a HoE adapter that has routers, and its tokenizer."""
    return demo.load_demo_adapter(routers=[[0.25, 0.75], [0.75, 0.25]]), demo.load_tokenizer()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--output", default="trained", help="folder of the adapter")
    add("--updates", type=int, default=10, help="of each router (default 10)")
    add("--batch-size", type=int, default=64, help="answers in an update on each process (default 64)")
    add("--shard-policy", action="store_true", help="with several processes, each holds a share of the frozen model")
    arguments = parser.parse_args()
    model, tokenizer = load_policy()
    normalizer = train_routers(
        model,
        HoERouterConfig(
            output_dir=arguments.output,
            max_steps=arguments.updates,
            per_device_train_batch_size=arguments.batch_size,
            gradient_accumulation_steps=1,
            response_length=48,
            stop_token="eos",
            save_strategy="no",
            logging_steps=1,
            num_sample_generations=0,  # show no samples on the way
            report_to="none",
            shard_policy=arguments.shard_policy,
            use_cpu=True,  # leave it out to use a GPU
        ),
        processing_class=tokenizer,
        reward_model=REWARDS,
        train_dataset=[{"prompt": prompt} for prompt in TRAINING],
        eval_dataset=[{"prompt": prompt} for prompt in HELD_OUT],
        say=print,  # whether each router helped
    )
    print(f"mean rewards of the experts, which make the rewards comparable: {normalizer.payoff.round(3).tolist()}")
    helped = [router.name for router in model.peft_config["default"].routers if router.trained]
    print(f"trained {helped}, the others did not help; saved in {arguments.output}")


if __name__ == "__main__":
    main()
