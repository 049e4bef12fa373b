"""Train the routers of an adapter for their preferences, with rewards of your own.

    python examples/train_router.py --base stories260k --adapter adapter --prompts prompts.json --output trained

Needs `pip install 'peft-hoe[train]' vaderSentiment`, and an adapter with routers: `peft-hoe build ... --router 0.25,0.75`. Its
objectives are those of `REWARDS` below; put your own there.
"""

import argparse
import json
import re
from pathlib import Path

from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer
from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

from peft_hoe.training import HoERouterConfig
from peft_hoe.training.every_router import train_routers

vader = SentimentIntensityAnalyzer()


def positive(prompts: list[str], completions: list[str]) -> list[float]:
    """VADER's compound sentiment, in [-1, 1]."""
    return [vader.polarity_scores(text)["compound"] for text in completions]


def rich(prompts: list[str], completions: list[str]) -> list[float | None]:
    """2 * distinct words / words - 1; no reward without words."""
    found = [re.findall(r"[a-z']+", text.lower()) for text in completions]
    return [2 * len(set(words)) / len(words) - 1 if words else None for words in found]


REWARDS = {"positive": positive, "rich": rich}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", required=True)
    parser.add_argument("--adapter", required=True)
    parser.add_argument("--prompts", type=Path, required=True, help="JSON: {train: [...], validation: [...]}")
    parser.add_argument("--output", required=True)
    parser.add_argument("--updates", type=int, default=60)
    parser.add_argument("--batch-size", type=int, default=128, help="prompts of an update on each process")
    parser.add_argument("--shard-policy", action="store_true", help="with several processes, see docs/launching.md")
    arguments = parser.parse_args()
    prompts = json.loads(arguments.prompts.read_text(encoding="utf-8"))
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(arguments.base), arguments.adapter)
    tokenizer = AutoTokenizer.from_pretrained(arguments.base, padding_side="left")
    args = HoERouterConfig(
        output_dir=arguments.output,
        max_steps=arguments.updates,
        per_device_train_batch_size=arguments.batch_size,
        local_rollout_forward_batch_size=arguments.batch_size,
        learning_rate=3 / model.config.hidden_size,
        num_ppo_epochs=1,
        lam=1.0,
        kl_coef=0.0,
        temperature=1.0,
        response_length=48,
        stop_token="eos",
        save_strategy="no",
        report_to=[],
        logging_steps=10,
        shard_policy=arguments.shard_policy,
        use_cpu=True,
    )
    normalizer = train_routers(
        model,
        args,
        processing_class=tokenizer,
        reward_model=REWARDS,
        train_dataset=[{"prompt": prompt} for prompt in prompts["train"]],
        eval_dataset=[{"prompt": prompt} for prompt in prompts["validation"]],
    )
    print(f"payoff table, rows are experts: {normalizer.payoff.round(3).tolist()}")
    print(f"trained {[router.name for router in model.peft_config['default'].routers]}, saved in {arguments.output}")


if __name__ == "__main__":
    main()
