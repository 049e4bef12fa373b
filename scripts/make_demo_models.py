"""Make the embedded demonstration: a tiny base and two single-objective policies, from text written here.

The text comes from the grammar of `demo_stories.py` and nothing else. The base learns it from scratch; each policy is the
base with every weight fine-tuned by policy gradient towards one reward of `peft_hoe.demo.rewards`.

    python scripts/make_demo_models.py
"""

from __future__ import annotations

import argparse
import copy
import json
import random
import time
from pathlib import Path

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from torch.nn import functional as F
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    get_cosine_schedule_with_warmup,
    set_seed,
)

import peft_hoe.demo
from demo_stories import SEED, any_mood, held_out, openings, story
from peft_hoe.demo.rewards import cheerful, vivid

ASSETS = Path(peft_hoe.demo.__file__).parent / "assets"
REWARDS = {"cheerful": cheerful, "vivid": vivid}
NEW_TOKENS = 48
LR = 5e-4
KL = 0.1  # its coefficient in the loss
TEMPERATURE = 0.7  # of the samples that policies learn from

# -- the models --------------------------------------------------------------------------------------------------------


def make_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """One token a word, with its leading space, and one a punctuation mark."""
    split = pre_tokenizers.Sequence([pre_tokenizers.Metaspace(), pre_tokenizers.Punctuation()])
    words = sorted({piece for text in texts for piece, _ in split.pre_tokenize_str(text)})
    vocabulary = {word: index for index, word in enumerate(["<pad>", "<s>", "</s>", "<unk>", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer, tokenizer.decoder = split, decoders.Metaspace()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in ("<pad>", "<s>", "</s>", "<unk>")])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        padding_side="left",
        model_max_length=256,
    )


def save_tokenizer(tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write it under the class name that transformers 4 knows as well."""
    tokenizer.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text(encoding="utf-8")) | {"tokenizer_class": "PreTrainedTokenizerFast"}
    settings["model_input_names"] = [
        "input_ids",
        "attention_mask",
    ]  # transformers 4 adds token_type_ids, which no Llama takes
    settings.pop("backend", None)
    path.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def train_base(tokenizer: PreTrainedTokenizerFast, texts: list[str], steps: int) -> LlamaForCausalLM:
    """Next-token training on the stories, each ended by </s>."""
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=48,
            intermediate_size=128,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=256,
            tie_word_embeddings=True,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
        )
    )
    rows = [torch.tensor([*tokenizer(text)["input_ids"], 2]) for text in texts]
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3, weight_decay=0.01)
    schedule = get_cosine_schedule_with_warmup(optimizer, 50, steps)
    rng = random.Random(SEED)
    for step in range(steps):
        batch = torch.nn.utils.rnn.pad_sequence(rng.sample(rows, 32), batch_first=True, padding_value=-100)
        loss = model(input_ids=batch.clamp(min=0), labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 200 == 199:
            print(f"  base: step {step + 1}, loss {loss.item():.3f}", flush=True)
    return model.eval()


def sample(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, texts: list[str], **how):
    """Completions as token ids (P, T) and as texts, with the prompt ids in front of the former."""
    batch = tokenizer(texts, return_tensors="pt", padding=True)
    with torch.no_grad():
        ids = model.generate(**batch, max_new_tokens=NEW_TOKENS, **how)
    width = batch["input_ids"].shape[1]
    return ids, width, tokenizer.batch_decode(ids[:, width:], skip_special_tokens=True)


def train_policy(base: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, name: str, steps: int) -> LlamaForCausalLM:
    """Policy gradient with a group baseline (8 prompts x 16 samples) and the exact KL to the base as a loss term.

    Embeddings and norms learn at a fiftieth of the rate. In so small a vocabulary they would else do all the work, and experts
    hold linear weights only; in the models that people use the linear weights do it anyway.
    """
    model = copy.deepcopy(base)
    linear = [weight for name, weight in model.named_parameters() if "_proj" in name]
    others = [weight for name, weight in model.named_parameters() if "_proj" not in name]
    optimizer = torch.optim.Adam([{"params": linear, "lr": LR}, {"params": others, "lr": LR / 50}])
    prompts, rng = openings(400, SEED + 1, held_out()), random.Random(SEED)
    for step in range(1, steps + 1):
        texts = [text for text in rng.sample(prompts, 8) for _ in range(16)]
        ids, width, completions = sample(model, tokenizer, texts, do_sample=True, temperature=TEMPERATURE, top_k=0)
        rewards = torch.tensor(REWARDS[name](texts, completions))
        loss, spent = policy_loss(model, base, ids, width, rewards)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 20 == 0:
            print(f"  {name}: step {step}, reward {rewards.mean():.3f}, KL {spent:.2f} nats", flush=True)
    return model


def policy_loss(
    model: LlamaForCausalLM, base: LlamaForCausalLM, ids: torch.Tensor, width: int, rewards: torch.Tensor
) -> tuple[torch.Tensor, float]:
    """The loss on samples `ids` (P, width + T) with rewards (P,), and the mean KL of a completion to the base in nats."""
    groups = rewards.view(-1, 16)
    advantages = ((groups - groups.mean(1, keepdim=True)) / rewards.std().clamp(min=1e-4)).view(-1, 1)
    targets, valid = ids[:, width:], (ids[:, width:] != 0).float()
    logps = F.log_softmax(model(ids).logits[:, width - 1 : -1] / TEMPERATURE, -1)
    with torch.no_grad():
        reference = F.log_softmax(base(ids).logits[:, width - 1 : -1] / TEMPERATURE, -1)
    chosen = logps.gather(-1, targets.unsqueeze(-1)).squeeze(-1)
    divergence = (logps.exp() * (logps - reference)).sum(-1)
    loss = ((KL * divergence - advantages * chosen) * valid).sum() / valid.sum()
    return loss, float((divergence.detach() * valid).sum() / len(rewards))


# -- what is written ---------------------------------------------------------------------------------------------------

README = """# The embedded demonstration
A word-level Llama of {parameters:,} parameters and a vocabulary of {vocabulary} tokens, and two policies fine-tuned from it
(every weight), made by this project from text that its own script writes:

    {command}

The base learns {stories:,} stories of a small grammar from scratch ({base_steps} steps). Each policy is trained by policy
gradient with a group baseline ({policy_steps} steps of 8 prompts x 16 samples at temperature {temperature}, Adam {lr},
embeddings and norms at a fiftieth of that, KL coefficient {kl} to the base).
The rewards count words, see `../rewards.py`. `prompts.json` holds {prompts} openings that no policy
was trained on. Weights are float32.

Mean rewards on these openings, {new_tokens} new tokens, greedy, and in brackets at temperature 1 ({samples} samples each):

| model | {names} |
|---|{rules}|
{rows}

Made in {seconds:.0f} s on one core. Licence: that of the project.
"""


def measure(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> list[str]:
    """Mean of every reward, greedy and (sampled), as table cells."""
    _, _, greedy = sample(model, tokenizer, texts, do_sample=False)
    _, _, drawn = sample(model, tokenizer, texts * 16, do_sample=True, temperature=1.0, top_k=0)
    cells = []
    for reward in REWARDS.values():
        first, second = (torch.tensor(reward([], found)).mean() for found in (greedy, drawn))
        cells.append(f"{first:.3f} ({second:.3f})")
    print("  " + greedy[0])
    return cells


def main() -> None:
    """Train the three models and write them with their README."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=ASSETS)
    parser.add_argument("--base-steps", type=int, default=1600)
    parser.add_argument("--policy-steps", type=int, default=200)
    parser.add_argument("--stories", type=int, default=8000)
    args = parser.parse_args()
    torch.set_num_threads(1)
    set_seed(SEED)
    started, rng = time.monotonic(), random.Random(SEED)
    texts = [" ".join(story(rng, any_mood(rng))) for _ in range(args.stories)]
    print("  " + texts[0])
    tokenizer, prompts = make_tokenizer(texts), held_out()
    base = train_base(tokenizer, texts, args.base_steps)
    made = {"base": base}
    for name in REWARDS:
        made[name] = train_policy(base, tokenizer, name, args.policy_steps)
    rows = []
    for name, model in made.items():
        model.save_pretrained(args.output / name)
        save_tokenizer(tokenizer, args.output / name)
        rows.append(" | ".join([f"| {name}", *measure(model, tokenizer, prompts)]) + " |")
    (args.output / "prompts.json").write_text(json.dumps(prompts, indent=1) + "\n", encoding="utf-8")
    card = README.format(
        parameters=base.num_parameters(),
        vocabulary=len(tokenizer),
        command="python scripts/make_demo_models.py",
        stories=args.stories,
        base_steps=args.base_steps,
        policy_steps=args.policy_steps,
        kl=KL,
        lr=LR,
        temperature=TEMPERATURE,
        prompts=len(prompts),
        new_tokens=NEW_TOKENS,
        samples=len(prompts) * 16,
        names=" | ".join(REWARDS),
        rules="|".join("---" for _ in REWARDS),
        rows="\n".join(rows),
        seconds=time.monotonic() - started,
    )
    (args.output / "README.md").write_text(card, encoding="utf-8")
    print(card)


if __name__ == "__main__":
    main()
