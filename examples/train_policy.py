"""Train one policy with rewards of your own: a single-objective policy, or one for a preference (MORLHF).

    python examples/train_policy.py --base stories260k --prompts prompts.json --output rich --reward rich=my_rewards:rich
    python examples/train_policy.py ... --reward positive=my_rewards:positive --reward rich=my_rewards:rich --preference .3,.7

Needs `pip install 'peft-hoe[train]'`. Single-objective policies are what `peft-hoe build` takes. Rewards are functions
(prompts, completions, **columns) of an importable module, classifiers of the Hub (NAME=hub:ID#label) or servers (NAME=url:...);
with several, give a payoff table, or see that they are on one scale.
"""

import argparse
import json
from pathlib import Path

from peft import LoraConfig

from peft_hoe.objectives import RewardNormalizer
from peft_hoe.policies import policy_gradient_config, train_policy
from peft_hoe.preference import one_hot, read_preference
from peft_hoe.rewards.command_line import parse_rewards


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--base", required=True, help="directory or Hub id")
    add("--prompts", type=Path, required=True, help="JSON: a list of prompts, or {train: [...]}")
    add("--output", required=True, help="folder of the policy")
    add("--reward", action="append", required=True, metavar="NAME=SOURCE", help="once for each objective")
    add("--preference", help="such as 0.3,0.7 or positive=0.3,rich=0.7; not needed for one objective")
    add("--payoff", type=Path, help="JSON of RewardNormalizer.state_dict(): the scale of the rewards")
    add("--lora-rank", type=int, help="train a LoRA adapter on all linear layers; default every weight")
    add("--updates", type=int, default=120)
    add("--prompts-per-update", type=int, default=8)
    add("--samples", type=int, default=16, help="completions of each prompt (default 16)")
    add("--learning-rate", type=float, default=3e-4)
    add("--kl-coef", type=float, default=0.2, help="coefficient of the KL divergence to the base (default 0.2)")
    add("--max-new-tokens", type=int, default=48)
    add(
        "--scale-rewards",
        default="none",
        choices=["none", "batch", "group"],
        help="divide advantages by what deviation",
    )
    add("--seed", type=int, default=0)
    add("--cpu", action="store_true", help="use no accelerator")
    arguments = parser.parse_args()
    prompts = json.loads(arguments.prompts.read_text(encoding="utf-8"))
    prompts = prompts["train"] if isinstance(prompts, dict) else prompts
    normalizer = None
    if arguments.payoff:
        normalizer = RewardNormalizer.from_state_dict(json.loads(arguments.payoff.read_text(encoding="utf-8")))
    lora = None
    if arguments.lora_rank:
        lora = LoraConfig(
            r=arguments.lora_rank, lora_alpha=arguments.lora_rank, target_modules="all-linear", task_type="CAUSAL_LM"
        )
    log = train_policy(
        arguments.base,
        policy_gradient_config(
            arguments.output,
            prompts=arguments.prompts_per_update,
            samples=arguments.samples,
            max_steps=arguments.updates,
            learning_rate=arguments.learning_rate,
            beta=arguments.kl_coef,
            max_completion_length=arguments.max_new_tokens,
            scale_rewards=arguments.scale_rewards,
            seed=arguments.seed,
            use_cpu=arguments.cpu,
        ),
        rewards=parse_rewards(arguments.reward),
        preference=read_preference(arguments.preference) if arguments.preference else one_hot(0, 1),
        train_dataset=[{"prompt": prompt} for prompt in prompts],
        normalizer=normalizer,
        peft_config=lora,
    )
    print(f"{len(log)} log entries, the last of an update: {[entry for entry in log if 'reward' in entry][-1:]}")
    print(f"the policy is in {arguments.output}")


if __name__ == "__main__":
    main()
