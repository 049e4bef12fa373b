"""What steering costs on text that no reward asks for: the loss of the steered model against that of the base.

    python benchmarks/base_skills.py --shared DIR --output figures

Nats per token above the base's, for each preference, on three kinds of text that no policy was trained on:

- openings: the stories' test prompts;
- stories: what the base writes after them at temperature 1 (one sample each, 48 new tokens, seed 0). Here the difference
  estimates the divergence KL(base || steered);
- instructions: self-instruct's instructions with their inputs and answers, cut at 256 tokens: English, but no stories.

Intervals are 95 %, of a bootstrap over texts. "linear" is HoE with the paper's linear interpolation; "RS" interpolates
all weights of the policies.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional as F
from transformers import GenerationConfig

from figures_setting import NEW_TOKENS, Setting, parser, write
from fronts_tables import markdown

CUT, ROWS = 256, 60
FloatArray = NDArray[np.float64]


@torch.inference_mode()
def losses(model: Any, tokenizer: Any, texts: Sequence[str], skipped: Sequence[int], **steering: Any) -> FloatArray:
    """Sum of the negative log-likelihoods of each text's tokens after the first `skipped`, and their number, `(texts, 2)`."""
    found = []
    for start in range(0, len(texts), ROWS):
        part = slice(start, start + ROWS)
        batch = tokenizer(
            list(texts[part]), return_tensors="pt", padding=True, truncation=True, max_length=CUT, padding_side="right"
        )
        ids, mask = batch["input_ids"], batch["attention_mask"]
        logits = model(input_ids=ids, attention_mask=mask, **steering).logits[:, :-1].float()
        each = F.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")
        places = torch.arange(1, ids.shape[1])
        counted = mask[:, 1:].bool() & (places >= torch.tensor(list(skipped[part]))[:, None])
        found.append(torch.stack([(each * counted).sum(1), counted.sum(1).float()], 1).double().numpy())
    return np.concatenate(found)


@torch.no_grad()
def continued(model: Any, tokenizer: Any, prompts: Sequence[str]) -> list[str]:
    """Prompts with what the model writes after them at temperature 1."""
    torch.manual_seed(0)
    batch = tokenizer(list(prompts), return_tensors="pt", padding=True)
    settings = GenerationConfig(
        max_new_tokens=NEW_TOKENS, do_sample=True, top_k=0, pad_token_id=tokenizer.pad_token_id,
        eos_token_id=model.generation_config.eos_token_id,
    )  # fmt: skip
    ids = model.generate(**batch, generation_config=settings)
    texts: list[str] = tokenizer.batch_decode(ids, skip_special_tokens=True)
    return texts


def answered(path: Path) -> list[str]:
    """Instructions, inputs and answers."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    parts = [(row["instruction"], row["instances"][0]["input"], row["instances"][0]["output"]) for row in rows]
    return ["\n".join(part for part in row if part) for row in parts]


def difference(steered: FloatArray, base: FloatArray) -> list[float]:
    """Nats per token above the base's, with its interval."""

    def mean(rows: Any) -> float:
        return float((steered[rows, 0].sum() - base[rows, 0].sum()) / base[rows, 1].sum())

    rng = np.random.default_rng(0)
    drawn = [mean(rng.integers(len(base), size=len(base))) for _ in range(1000)]
    return [mean(np.arange(len(base))), *np.percentile(drawn, [2.5, 97.5]).tolist()]


@contextmanager
def soup_at(soup: Any, point: Sequence[float]) -> Iterator[tuple[Any, dict[str, Any]]]:
    """The soup's model at a preference, and that it needs no other steering."""
    with soup.at(np.asarray(point)) as model:
        yield model, {}


def main() -> None:
    """Measure each preference on each kind of text."""
    command = parser(__doc__)
    command.add_argument("--objectives", nargs=2, default=["positive", "rich"])
    args = command.parse_args()
    setting = Setting(args.shared, args.output, args.objectives)
    base, tokenizer = setting.model(), setting.tokenizer
    texts = {
        "openings": setting.test,
        "stories": continued(base, tokenizer, setting.test),
        "instructions": answered(args.shared / "data/self_instruct/user_oriented_instructions.jsonl"),
    }
    prompt = [len(tokenizer(text)["input_ids"]) for text in setting.test]
    skipped = {kind: prompt if kind == "stories" else [1] * len(found) for kind, found in texts.items()}
    own = {kind: losses(base, tokenizer, found, skipped[kind]) for kind, found in texts.items()}
    steered, linear = setting.steered(setting.adapter("hoe")), setting.steered(setting.linear())
    soup = setting.baseline("rs_dense")
    methods: dict[str, Callable[[Any], Any]] = {
        "HoE": lambda point: nullcontext((steered, {"preference": point})),
        "HoE, linear": lambda point: nullcontext((linear, {"preference": point})),
        "RS": lambda point: soup_at(soup, point),
    }
    result: dict[str, Any] = {
        "objectives": args.objectives,
        "tokens": {kind: int(found[:, 1].sum()) for kind, found in own.items()},
        "base": {kind: float(found[:, 0].sum() / found[:, 1].sum()) for kind, found in own.items()},
        "above the base": {},
    }
    rows = []
    for i in range(11):
        point = [i / 10, 1 - i / 10]
        cells = []
        for name, at in methods.items():
            with at(point) as (model, steering):
                found = {
                    kind: difference(losses(model, tokenizer, texts[kind], skipped[kind], **steering), own[kind])
                    for kind in texts
                }
            result["above the base"].setdefault(name, []).append({"preference": point, **found})
            cells += [f"{value[0]:+.3f} [{value[1]:+.3f}, {value[2]:+.3f}]" for value in found.values()]
        rows.append([f"{point[0]:.1f}, {point[1]:.1f}", *cells])
    write(setting.folder / "base_skills.json", result)
    print("base, nats per token:", {kind: round(value, 3) for kind, value in result["base"].items()}, result["tokens"])
    print(markdown(["preference", *(f"{name}: {kind}" for name in methods for kind in texts)], rows))


if __name__ == "__main__":
    main()
