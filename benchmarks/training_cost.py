"""What an update costs, relative to TRL's PPOTrainer with LoRA in the same run.

    OMP_NUM_THREADS=1 python benchmarks/training_cost.py [--output FILE]

A random Llama in float32 on the CPU (gpu.py asks for another device and dtype); one process a variant; the same
prompts, lengths, batches, epochs and rewards. "TRL" is PPOTrainer with value model and reward model of the policy's
size, as its users have; in "TRL, callable" the reward costs nothing. "HoE" is HoERouterTrainer as it comes; "HoE, value
model" has the same critic as TRL. The rewards are the same two callables everywhere: two objectives for HoE, their mean
weighted by the router's preference for TRL. All get the same `--kl-coef`. With 0, HoE's default, HoERouterTrainer makes no
forward of the KL reference; PPOTrainer, whose own default is 0.05, makes it whatever the coefficient.

Step: median CPU seconds of one thread. Memory: peak resident memory minus that before the trainer was made, and minus that
before critic and reward model were made (`with critic`); the policy itself is in neither.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import psutil
import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch import nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
    TrainerCallback,
)

import peft_hoe

VARIANTS = ("TRL", "TRL, callable", "HoE", "HoE, value model")
PREFERENCE = (0.25, 0.75)
MIB = 2**20


def even(prompts: Sequence[str], completions: Sequence[str], **columns: Any) -> list[float]:
    """Share of words with an even number."""
    return [share(text, lambda number: number % 2 == 0) for text in completions]


def low(prompts: Sequence[str], completions: Sequence[str], **columns: Any) -> list[float]:
    """Share of words with a number below 8000."""
    return [share(text, lambda number: number < 8000) for text in completions]


def share(text: str, wanted: Any) -> float:
    numbers = [int(number) for number in re.findall(r"w(\d+)", text)]
    return sum(map(wanted, numbers)) / max(len(numbers), 1)


class CallableReward(nn.Module):
    """The callables in the form that TRL asks for: a backbone, and a score of its hidden states at every position."""

    base_model_prefix = "backbone"

    def __init__(self, backbone: nn.Module, tokenizer: Any, prompt_length: int) -> None:
        super().__init__()
        self.backbone = backbone
        self.tokenizer, self.prompt_length = tokenizer, prompt_length
        self.values = torch.empty(0)
        backbone.register_forward_pre_hook(self.read, with_kwargs=True)

    def read(self, module: nn.Module, inputs: Any, keywords: dict[str, Any]) -> None:
        texts = self.tokenizer.batch_decode(keywords["input_ids"][:, self.prompt_length :], skip_special_tokens=True)
        rewards = torch.tensor([even([], texts), low([], texts)])
        self.values = torch.tensor(PREFERENCE) @ rewards

    def score(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.values.to(hidden.device).view(-1, 1, 1).expand(*hidden.shape[:2], 1)


class Unused(nn.Module):
    """A backbone that costs nothing."""

    def forward(self, input_ids: torch.Tensor, **keywords: Any) -> Any:
        return argparse.Namespace(hidden_states=[torch.zeros(*input_ids.shape, 1, device=input_ids.device)])


class StepTimes(TrainerCallback):
    """CPU and wall seconds of each update."""

    def __init__(self) -> None:
        self.marks: list[tuple[float, float]] = []

    def on_train_begin(self, *args: Any, **keywords: Any) -> None:
        self.marks.append((time.process_time(), time.monotonic()))

    def on_step_end(self, *args: Any, **keywords: Any) -> None:
        self.marks.append((time.process_time(), time.monotonic()))

    def medians(self, warm_up: int) -> tuple[float, float]:
        pairs = list(zip(self.marks, self.marks[1:], strict=False))[warm_up:]
        cpu, wall = (statistics.median(after[i] - before[i] for before, after in pairs) for i in (0, 1))
        return cpu, wall


def make_tokenizer(words: int) -> PreTrainedTokenizerFast:
    special = ["<pad>", "<s>", "</s>", "<unk>"]
    vocabulary = {word: i for i, word in enumerate([*special, *(f"w{i}" for i in range(words - len(special)))])}
    core = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    core.pre_tokenizer = WhitespaceSplit()
    names = dict(zip(("pad_token", "bos_token", "eos_token", "unk_token"), special, strict=True))
    return PreTrainedTokenizerFast(tokenizer_object=core, padding_side="left", **names)


def llama(settings: argparse.Namespace, *, classifier: bool = False) -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=settings.vocabulary,
        hidden_size=settings.hidden,
        intermediate_size=settings.hidden * 8 // 3,
        num_hidden_layers=settings.layers,
        num_attention_heads=max(1, settings.hidden // 64),
        num_key_value_heads=max(1, settings.hidden // 64),
        max_position_embeddings=512,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        num_labels=1,
    )
    with torch.device(settings.device):
        return (LlamaForSequenceClassification if classifier else LlamaForCausalLM)(config).eval()


def trl_has_ppo() -> bool:
    """TRL 1.13 removed PPOTrainer."""
    return find_spec("trl.experimental.ppo") is not None


def on_gpu() -> bool:
    """Whether this process computes on a GPU, whose memory then counts."""
    return torch.cuda.is_available() and torch.cuda.memory_allocated() > 0


def resident() -> int:
    if on_gpu():
        return torch.cuda.memory_allocated()
    return int(psutil.Process().memory_info().rss)


def measure(variant: str, settings: argparse.Namespace, output_dir: str) -> dict[str, Any]:
    """One variant, in this process."""
    os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
    torch.set_num_threads(1)
    from peft_hoe.objectives import RewardNormalizer
    from peft_hoe.training import HoERouterConfig, HoERouterTrainer

    is_hoe = variant.startswith("HoE")
    if not is_hoe and not trl_has_ppo():
        raise SystemExit("TRL has no PPOTrainer since 1.13; to compare, install that of constraints/trl-1.12.txt")
    tokenizer = make_tokenizer(settings.vocabulary)
    adapter = {"r": settings.rank, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    hoe = peft_hoe.HoEConfig(objectives=["even", "low"], routers=[PREFERENCE], init_weights=False, **adapter)
    base = llama(settings).to(getattr(torch, settings.dtype))
    parameters = sum(parameter.numel() for parameter in base.parameters())
    policy = get_peft_model(base, hoe if is_hoe else LoraConfig(**adapter))
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(4, settings.vocabulary, (64, settings.prompt_length), generator=generator).tolist()
    times = StepTimes()
    batch = {
        "output_dir": output_dir,
        "per_device_train_batch_size": settings.micro_batch,
        "gradient_accumulation_steps": settings.batch // settings.micro_batch,
        "num_ppo_epochs": settings.epochs,
        "kl_coef": settings.kl_coef,
        "response_length": settings.response_length,
        "total_episodes": settings.batch * (settings.updates + 1),
        "learning_rate": 1e-4,
        "gradient_checkpointing": False,
        "bf16": False,
        "num_sample_generations": 0,
        "use_cpu": settings.device == "cpu",
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
    }
    common: dict[str, Any] = {
        "processing_class": tokenizer,
        "model": policy,
        "ref_model": None,
        "train_dataset": [{"input_ids": row} for row in rows],
        "callbacks": [times],
    }

    after_policy = resident()
    if on_gpu():
        torch.cuda.reset_peak_memory_stats()  # the policy was made in float32
    critic = None if variant == "HoE" else llama(settings, classifier=True)
    if is_hoe:
        before = resident()
        trainer: Any = HoERouterTrainer(
            args=HoERouterConfig(**batch),
            reward_model={"even": even, "low": low},
            value_model=critic,
            normalizer=RewardNormalizer([[1.0, 0.0], [0.0, 1.0]], ["even", "low"]),
            **common,
        )
    else:
        backbone = Unused() if variant == "TRL, callable" else llama(settings, classifier=True).model
        reward = CallableReward(backbone, tokenizer, settings.prompt_length)
        before = resident()
        from trl.experimental.ppo import PPOConfig, PPOTrainer

        trainer = PPOTrainer(args=PPOConfig(**batch), reward_model=reward, value_model=critic, **common)
    trainer.train()
    peak = torch.cuda.max_memory_allocated() if on_gpu() else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    cpu, wall = times.medians(warm_up=1)
    return {
        "cpu_seconds": cpu,
        "wall_seconds": wall,
        "memory_mib": (peak - before) / MIB,
        "memory_with_critic_mib": (peak - after_policy) / MIB,
        "trainable": sum(p.numel() for p in trainer.model.parameters() if p.requires_grad),
        "policy_parameters": parameters,
    }


def run(variant: str, arguments: list[str]) -> dict[str, Any]:
    """One variant, in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "result.json"
        command = [sys.executable, __file__, *arguments, "--variant", variant, "--output", str(result)]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        measured: dict[str, Any] = json.loads(result.read_text())
    return measured


COLUMNS = {
    "cpu_seconds": ("step", "{:.1f} s", "{:.2f}"),
    "memory_mib": ("memory", "{:.0f} MiB", "{:.2f}"),
    "memory_with_critic_mib": ("with critic", "{:.0f} MiB", "{:.2f}"),
    "trainable": ("trainable", "{:,}", "{:.4f}"),
}


def table(rows: dict[str, dict[str, Any]]) -> str:
    titles = [title for name, _, _ in COLUMNS.values() for title in (name, "/ TRL")]
    lines = ["| variant | " + " | ".join(titles) + " |", "|---|" + "---:|" * len(titles)]
    for name, row in rows.items():
        cells = [name]
        for key, (_, value, ratio) in COLUMNS.items():
            cells += [value.format(row[key]), ratio.format(row[key] / rows["TRL"][key])]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=768)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--vocabulary", type=int, default=16000)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--micro-batch", type=int, default=8)
    parser.add_argument("--prompt-length", type=int, default=8)
    parser.add_argument("--response-length", type=int, default=16)
    parser.add_argument("--epochs", type=int, default=4, help="PPO epochs; 4 is TRL's default")
    parser.add_argument("--kl-coef", type=float, default=0.0, help="coefficient of the KL divergence, of all variants")
    parser.add_argument("--updates", type=int, default=3, help="timed ones, after one that warms up")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", default="float32", help="of the policy")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--variant", choices=VARIANTS, help="measure one, in this process")
    settings = parser.parse_args()
    if settings.variant:
        with tempfile.TemporaryDirectory() as folder:
            rows = measure(settings.variant, settings, folder)
    else:
        given = {k: v for k, v in vars(settings).items() if k not in ("output", "variant")}
        arguments = [item for key, value in given.items() for item in (f"--{key.replace('_', '-')}", str(value))]
        rows = {variant: run(variant, arguments) for variant in VARIANTS}
        print(f"policy: {rows['TRL']['policy_parameters']:,} parameters\n\n{table(rows)}")
        rows = {"settings": given, "rows": rows}
    if settings.output:
        settings.output.write_text(json.dumps(rows, indent=2))


if __name__ == "__main__":
    main()
