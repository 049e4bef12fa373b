"""Steer a base model between single-objective policies of your own, and score it.

    python examples/steer_stories.py --base stories260k --policies policies/positive policies/rich --prompts prompts.json

Needs `pip install peft-hoe vaderSentiment matplotlib`. A policy's objective is the last part of its directory's
name: "positive", "rich" or "dialog", for which there are rewards below; put your own in `REWARDS`.
"""

import argparse
import json
import re
from pathlib import Path

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer
from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

import peft_hoe

vader = SentimentIntensityAnalyzer()


def positive(text: str) -> float:
    """VADER's compound sentiment, in [-1, 1]."""
    return vader.polarity_scores(text)["compound"]


def rich(text: str) -> float:
    """2 * distinct words / words - 1; -1 without words."""
    words = re.findall(r"[a-z']+", text.lower())
    return 2 * len(set(words)) / len(words) - 1 if words else -1.0


def dialog(text: str) -> float:
    """min(number of double quotes, 6) / 3 - 1."""
    return min(text.count('"'), 6) / 3 - 1


REWARDS = {"positive": positive, "rich": rich, "dialog": dialog}


def complete(model, tokenizer, prompts: list[str], max_new_tokens: int, **steering) -> list[str]:
    """Greedy completions of a batch; `preference=[...]` holds one preference for each prompt."""
    batch = tokenizer(prompts, return_tensors="pt", padding=True, return_token_type_ids=False).to(model.device)
    with torch.inference_mode():
        ids = model.generate(**batch, max_new_tokens=max_new_tokens, do_sample=False, **steering)
    return tokenizer.batch_decode(ids[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)


def rounded(preference: list[float]) -> str:
    return str([round(weight, 2) for weight in preference])


def draw(names: list[str], points: list[list[float]], path: str) -> None:
    """The front of every pair of objectives."""
    import matplotlib.pyplot as plt

    pairs = [(x, y) for x in range(len(names)) for y in range(x + 1, len(names))]
    figure, axes = plt.subplots(1, len(pairs), figsize=(5 * len(pairs), 4), squeeze=False, layout="constrained")
    for (x, y), panel in zip(pairs, axes[0], strict=True):
        xs, ys = [point[x] for point in points], [point[y] for point in points]
        panel.plot(xs, ys, "o-" if len(names) == 2 else "o")
        panel.set(xlabel=f"mean reward: {names[x]}", ylabel=f"mean reward: {names[y]}")
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", required=True)
    parser.add_argument("--policies", nargs="+", required=True, metavar="DIR")
    parser.add_argument("--prompts", type=Path, required=True, help="JSON: a list, or {split: list}")
    parser.add_argument("--split", default="test")
    parser.add_argument("--limit", type=int, default=40, help="number of prompts")
    parser.add_argument("--max-new-tokens", type=int, default=48)
    parser.add_argument("--output", default="stories-adapter")
    parser.add_argument("--picture", default="stories-front.png")
    args = parser.parse_args()

    policies = {re.split(r"[-_/]", path.rstrip("/"))[-1]: path for path in args.policies}
    prompts = json.loads(args.prompts.read_text(encoding="utf-8"))
    prompts = (prompts if isinstance(prompts, list) else prompts[args.split])[: args.limit]

    # Policies become a steerable adapter: one expert for each, and one at the centre. No training.
    peft_hoe.build_adapter(args.base, policies, args.output, overwrite=True)

    tokenizer = AutoTokenizer.from_pretrained(args.base, padding_side="left")
    base = AutoModelForCausalLM.from_pretrained(args.base)
    model = PeftModel.from_pretrained(base, args.output)

    # Every row of a batch may have a preference of its own.
    grid = peft_hoe.preference_grid(len(policies)).tolist()
    texts = complete(model, tokenizer, prompts[:1] * len(grid), args.max_new_tokens, preference=grid)
    print(f"\n{prompts[0]} ...\n")
    for preference, text in zip(grid, texts, strict=True):
        print(f"{rounded(preference)}  {text}\n")

    print("preference".ljust(24) + "".join(name.rjust(12) for name in policies))
    points = []
    for preference in grid:
        texts = complete(model, tokenizer, prompts, args.max_new_tokens, preference=[preference] * len(prompts))
        means = [sum(map(REWARDS[name], texts)) / len(texts) for name in policies]
        print(rounded(preference).ljust(24) + "".join(f"{mean:12.3f}" for mean in means))
        points.append(means)
    draw(list(policies), points, args.picture)
    print(f"\nThe front: {args.picture}")


if __name__ == "__main__":
    main()
