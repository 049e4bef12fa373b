"""Fronts of three policies of a 260k-parameter TinyStories Llama, and how far a full-rank expert is from its policy.

    python benchmarks/stories_fronts.py --shared DIR --output stories_fronts.json

Build defaults but for the rank: the expert of each policy and one at the centroid, no routers. Greedy, 48 new tokens, the
test prompts. Rewards as in `build_defaults.py`, from which the measuring is imported.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch.nn import functional as F
from transformers import AutoModelForCausalLM
from transformers.utils.logging import disable_progress_bar

import peft_hoe
from build_defaults import NEW_TOKENS, OBJECTIVES, Evaluator
from peft_hoe.experts.report import BuildReport

RANKS = (8, 16, 32, "full")


def load(path: Path | str) -> Any:
    """A model for inference."""
    return AutoModelForCausalLM.from_pretrained(path).eval()


@contextmanager
def adapted(base: Path, policies: Mapping[str, Path], **options: Any) -> Iterator[tuple[Any, BuildReport]]:
    """The base with an adapter that is built for this block, and the report of the build."""
    with tempfile.TemporaryDirectory() as folder:
        report = peft_hoe.build_adapter(str(base), policies, Path(folder) / "adapter", progress=False, **options)
        yield PeftModel.from_pretrained(load(base), Path(folder) / "adapter").eval(), report


def measure_fronts(base: Path, policies: Mapping[str, Path], evaluator: Evaluator) -> dict[str, Any]:
    """Mean rewards by set of objectives and rank, at the preferences of `preference_grid`."""
    fronts: dict[str, Any] = {}
    for names in (*itertools.combinations(OBJECTIVES, 2), OBJECTIVES):
        grid = peft_hoe.preference_grid(len(names)).tolist()
        columns = [OBJECTIVES.index(name) for name in names]
        front: dict[str, Any] = {"objectives": list(names), "preferences": grid, "rewards": {}}
        for rank in RANKS:
            with adapted(base, {name: policies[name] for name in names}, r=rank) as (model, _):
                means = evaluator.rewards(model, grid).mean(1)
            front["rewards"][str(rank)] = means[:, columns].tolist()
            print(f"{' x '.join(names)}, rank {rank}: done", file=sys.stderr, flush=True)
        fronts[" x ".join(names)] = front
    return fronts


# -- the gap between an expert and its policy --------------------------------------------------------------------------


@torch.inference_mode()
def completion_batch(model: Any, evaluator: Evaluator) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Test prompts with the model's own greedy completions, and which of the tokens (P, T) are completion."""
    batch = evaluator.tokenizer(evaluator.prompts, return_tensors="pt", padding=True)
    ids = model.generate(**batch, do_sample=False, max_new_tokens=NEW_TOKENS, max_length=None)
    width = batch["input_ids"].shape[1]
    new = ids[:, width:] != evaluator.tokenizer.pad_token_id
    mask = torch.cat([batch["attention_mask"], new.long()], 1)
    return {"input_ids": ids, "attention_mask": mask}, torch.cat([torch.zeros_like(ids[:, :width]).bool(), new], 1)


@torch.inference_mode()
def logits(model: Any, batch: Mapping[str, torch.Tensor], completion: torch.Tensor, **steering: Any) -> torch.Tensor:
    """Logits (M, vocabulary) of the positions that predict the M completion tokens."""
    found: torch.Tensor = model(**batch, **steering).logits[:, :-1][completion[:, 1:]]
    return found.float()


def measure_gaps(base: Path, policies: Mapping[str, Path], evaluator: Evaluator) -> dict[str, Any]:
    """One-hot experts at full rank, unpruned and not rescaled, against what they came from."""
    gaps: dict[str, Any] = {}
    with adapted(base, policies, r="full", pruning=None, rescale=None, svd="exact") as (model, report):
        corners = torch.eye(len(policies)).tolist()
        expert_rewards = evaluator.rewards(model, corners).mean(1)
        for i, (name, path) in enumerate(policies.items()):
            policy, substituted = load(path), load(base)
            weights = policy.state_dict()
            substituted.load_state_dict(
                {f"{module}.weight": weights[f"{module}.weight"] for module in report.modules}, strict=False
            )
            batch, completion = completion_batch(policy, evaluator)
            expert = logits(model, batch, completion, preference=corners[i])
            full, part = logits(policy, batch, completion), logits(substituted, batch, completion)
            nats = F.kl_div(F.log_softmax(expert, -1), F.log_softmax(full, -1), log_target=True, reduction="none").sum(
                -1
            )
            gaps[name] = {
                "tokens": len(expert),
                "substituted_max_logit": float((expert - part).abs().max()),
                "policy_max_logit": float((expert - full).abs().max()),
                "policy_mean_kl": float(nats.mean()),
                "expert_rewards": expert_rewards[i].tolist(),
                "substituted_rewards": evaluator.rewards(substituted)[0].mean(0).tolist(),
                "policy_rewards": evaluator.rewards(policy)[0].mean(0).tolist(),
            }
    return gaps


# -- tables ------------------------------------------------------------------------------------------------------------


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table."""
    lines = ["| " + " | ".join(cells) + " |" for cells in (header, *rows)]
    return "\n".join([lines[0], "|" + "---|" * len(header), *lines[1:]])


def cell(values: Sequence[float]) -> str:
    """Rewards of one model."""
    return " / ".join(f"{value:.2f}" for value in values)


def tables(result: Mapping[str, Any]) -> str:
    """Everything that was measured, as markdown."""
    parts = []
    for name, front in result["fronts"].items():
        header = ["preference", *(f"rank {rank}" for rank in front["rewards"])]
        rows = [
            [", ".join(f"{weight:.2g}" for weight in preference), *(cell(r[k]) for r in front["rewards"].values())]
            for k, preference in enumerate(front["preferences"])
        ]
        parts.append(f"### {name.replace(' x ', ' × ')}\n\n{markdown(header, rows)}")
    single = [[name, *(f"{value:.2f}" for value in means)] for name, means in result["references"].items()]
    parts.append(f"### base and policies\n\n{markdown(['model', *OBJECTIVES], single)}")
    header = [
        "expert", "max logit difference to substituted base", "to full policy", "mean KL, nats/token",
        "rewards of expert", "of full policy",
    ]  # fmt: skip
    rows = [
        [
            name, f"{gap['substituted_max_logit']:.1e}", f"{gap['policy_max_logit']:.2f}", f"{gap['policy_mean_kl']:.3f}",
            cell(gap["expert_rewards"]), cell(gap["policy_rewards"]),
        ]
        for name, gap in result["gaps"].items()
    ]  # fmt: skip
    parts.append(f"### expert at full rank and its policy\n\n{markdown(header, rows)}")
    return "\n\n".join(parts)


def main() -> None:
    """Measure, write JSON, print markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shared", type=Path, required=True, help="folder with models/ and data/")
    parser.add_argument("--output", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--limit", type=int, help="use the first prompts only")
    args = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    disable_progress_bar()
    started = time.monotonic()
    prompts = json.loads((args.shared / "data/stories/prompts.json").read_text(encoding="utf-8"))["test"][: args.limit]
    base = args.shared / "models/stories260k"
    policies = {name: args.shared / "models/policies" / f"stories260k-{name}" for name in OBJECTIVES}
    evaluator = Evaluator(base, prompts)
    result: dict[str, Any] = {"prompts": len(prompts), "new_tokens": NEW_TOKENS, "objectives": list(OBJECTIVES)}
    result["references"] = {
        name: evaluator.rewards(load(path))[0].mean(0).tolist() for name, path in {"base": base, **policies}.items()
    }
    result["gaps"] = measure_gaps(base, policies, evaluator)
    result["fronts"] = measure_fronts(base, policies, evaluator)
    result["seconds"] = round(time.monotonic() - started)
    args.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(tables(result))


if __name__ == "__main__":
    main()
