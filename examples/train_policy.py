"""Train one policy for one mixture of objectives (MORLHF), the dearest method that HoE is compared with.

    python examples/train_policy.py --preference 0.3,0.7

Runs on the tiny models that the package brings. For your own, change the constants. Needs pip install "peft-hoe[train]".
For policies of one objective each, which an adapter is built from, there is a command: peft-hoe policy --help.
"""

import argparse

from peft import LoraConfig

from peft_hoe import RewardNormalizer, demo, train_policy
from peft_hoe.policies import policy_gradient_config
from peft_hoe.preference import read_preference

BASE = demo.BASE
REWARDS = demo.REWARDS  # {objective: function of prompts and completions that returns a number for each}
PROMPTS = demo.load_prompts()
# Mean rewards of the two single-objective policies, a row for each: what makes rewards of different scale comparable.
PAYOFF = [[2.725, 0.875], [0.0, 7.2]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--preference", default="0.3,0.7", help="how much each objective weighs (default 0.3,0.7)")
    add("--output", default="mixture", help="folder of the policy")
    add("--updates", type=int, default=40)
    add("--full", action="store_true", help="train every weight in place of a LoRA adapter")
    arguments = parser.parse_args()
    lora = LoraConfig(r=16, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    train_policy(
        BASE,
        policy_gradient_config(
            arguments.output,
            prompts=4,  # in an update,
            samples=8,  # and answers to each of them
            max_steps=arguments.updates,
            max_completion_length=48,
            learning_rate=4e-4 if arguments.full else 4e-3,
            beta=0.2,  # how strongly the policy is held to the base
            scale_rewards="batch",
            logging_steps=max(1, arguments.updates // 10),
            use_cpu=True,  # leave it out to use a GPU
        ),
        rewards=REWARDS,
        preference=read_preference(arguments.preference),
        normalizer=RewardNormalizer(PAYOFF, list(REWARDS)),
        train_dataset=[{"prompt": prompt} for prompt in PROMPTS],
        peft_config=None if arguments.full else lora,
        say=print,
    )
    print(f"The policy is in {arguments.output}")


if __name__ == "__main__":
    main()
