"""A tiny HoE Llama whose experts prefer different tokens, and rewards that count them."""

from __future__ import annotations

import dataclasses
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from peft import PeftModel, get_peft_model
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, TrainerCallback, TrainingArguments

from peft_hoe import HoEConfig, HoELayer
from peft_hoe.errors import RewardError

_FIELDS = {field.name for field in dataclasses.fields(TrainingArguments)}
# transformers 5.23 renamed it.
CHECKPOINTING = [name for name in ("activation_checkpointing", "gradient_checkpointing") if name in _FIELDS]

WORDS = ["<pad>", "<s>", "</s>", "<unk>", *(f"w{i}" for i in range(28))]


def checkpointing(*, reentrant: bool = False) -> dict[str, Any]:
    """The settings of gradient checkpointing."""
    settings: dict[str, Any] = dict.fromkeys(CHECKPOINTING, True)
    return settings | {f"{name}_kwargs": {"use_reentrant": reentrant} for name in CHECKPOINTING}


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A word is a token; 32 of them."""
    core = Tokenizer(WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    core.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


def make_padded_tokenizer() -> PreTrainedTokenizerFast:
    """The same with a padding token, 32, that was added to it and not to the model, as TRL's scripts do."""
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    assert tokenizer.pad_token_id == 32
    return tokenizer


def save_with_base(model: Any, folder: Path) -> None:
    """Into `folder`: `hoe`, the adapter of a model, and `base` with its tokenizer, which the adapter names."""
    make_base().save_pretrained(folder / "base")
    make_tokenizer().save_pretrained(folder / "base")
    model.peft_config["default"].base_model_name_or_path = str(folder / "base")
    model.save_pretrained(folder / "hoe")


def make_base(seed: int = 0, *, tied: bool = False) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(WORDS),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        initializer_range=0.3,
        tie_word_embeddings=tied,
    )
    return LlamaForCausalLM(config).eval()


def make_policy(
    *,
    objectives: Sequence[str] = ("low", "high"),
    routers: Sequence[Any] = ([0.25, 0.75], [0.75, 0.25]),
    seed: int = 0,
    tied: bool = False,
    **changes: Any,
) -> PeftModel:
    """Experts with random weights, so that each has tastes of its own; routers as they start."""
    config = HoEConfig(
        objectives=list(objectives),
        routers=list(routers),
        r=4,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
        **changes,
    )
    model = get_peft_model(make_base(seed, tied=tied), config)
    generator = torch.Generator().manual_seed(seed + 1)
    for name, parameter in model.named_parameters():
        if "hoe_A" in name or "hoe_B" in name or "hoe_norm" in name:
            parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


def low(prompts: Sequence[str], completions: Sequence[str], **columns: Any) -> list[float]:
    """Share of the words w0 to w13."""
    return [_share(text, range(14)) for text in completions]


def high(prompts: Sequence[str], completions: Sequence[str], **columns: Any) -> list[float]:
    """Share of the words w10 to w27: some words please both."""
    return [_share(text, range(10, 28)) for text in completions]


def _share(text: str, wanted: range) -> float:
    words = text.split()
    return sum(word in {f"w{i}" for i in wanted} for word in words) / max(len(words), 1)


def hangs(prompts: Sequence[str], completions: Sequence[str], **columns: Any) -> list[float]:
    time.sleep(600)
    return low(prompts, completions)


CALLS = {"made": 0, "fails at": 0}


def flaky(prompts: Sequence[str], completions: Sequence[str], **columns: Any) -> list[float]:
    """As `low`, but for the call with the number that `CALLS` says."""
    CALLS["made"] += 1
    if CALLS["made"] == CALLS["fails at"]:
        raise RuntimeError("out of order")
    return low(prompts, completions)


REWARDS = {"low": low, "high": high}
PROMPTS = [{"prompt": f"w{i} w{(7 * i) % 28} w{(3 * i) % 28}"[: None if i % 2 else -3].strip()} for i in range(24)]


class Raise(TrainerCallback):
    """Fails after some updates."""

    def __init__(self, after: int) -> None:
        self.after = after

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.after:
            raise RuntimeError("stop here")


class Press(TrainerCallback):
    """Ctrl-C in the second update."""

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 1:
            signal.raise_signal(signal.SIGINT)


def _settings(output_dir: Any) -> dict[str, Any]:
    """What the configurations of all toys have in common."""
    return {
        "output_dir": str(output_dir),
        "router": "r0",
        "use_cpu": True,
        "report_to": [],
        "disable_tqdm": True,
        "learning_rate": 0.05,
        "gradient_accumulation_steps": 1,
        "save_strategy": "no",
    }


def make_trainer(model: Any, output_dir: Any, constructor: dict[str, Any], *, kind: Any = None, **changes: Any) -> Any:
    """A HoERouterTrainer on the toy, or another class with its constructor."""
    from peft_hoe.objectives import RewardNormalizer
    from peft_hoe.training import HoERouterConfig, HoERouterTrainer

    settings: dict[str, Any] = {
        **_settings(output_dir),
        "num_sample_generations": 0,
        "verdict_texts": 0,
        "per_device_train_batch_size": 8,
        "max_steps": 2,
        "response_length": 6,
        "temperature": 1.0,
        "logging_strategy": "steps",
    }
    arguments: dict[str, Any] = {
        "args": HoERouterConfig(**{**settings, **changes}),
        "processing_class": make_tokenizer(),
        "model": make_policy() if model is None else model,
        "reward_model": REWARDS,
        "train_dataset": PROMPTS,
        "normalizer": RewardNormalizer([[0.65, 0.45], [0.45, 0.65]], ["low", "high"]),
    }
    return (kind or HoERouterTrainer)(**{**arguments, **constructor})


def make_grpo_trainer(model: Any, output_dir: Any, constructor: dict[str, Any], **changes: Any) -> Any:
    """The same with GRPO: 2 prompts with 4 completions each make an update."""
    from peft_hoe.objectives import RewardNormalizer
    from peft_hoe.training import HoEGRPOConfig, HoEGRPOTrainer

    settings: dict[str, Any] = {
        **_settings(output_dir),
        "per_device_train_batch_size": 8,
        "per_device_eval_batch_size": 8,
        "num_generations": 4,
        "verdict_texts": 0,
        "max_steps": 2,
        "max_completion_length": 6,
        "logging_strategy": "steps",
    }
    arguments: dict[str, Any] = {
        "model": make_policy() if model is None else model,
        "reward_funcs": REWARDS,
        "args": HoEGRPOConfig(**{**settings, **changes}),
        "train_dataset": PROMPTS,
        "processing_class": make_tokenizer(),
        "normalizer": RewardNormalizer([[0.65, 0.45], [0.45, 0.65]], ["low", "high"]),
    }
    return HoEGRPOTrainer(**{**arguments, **constructor})


def snapshot(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def rows_of(model: Any, router: str) -> list[torch.Tensor]:
    """The rows of a router in every module, with their biases."""
    config = model.peft_config["default"]
    start = sum(len(votes) for votes in config.votes()[: config.router_names.index(router)])
    stop = start + len(config.votes()[config.router_names.index(router)])
    linears = [module.hoe_router["default"] for module in model.modules() if isinstance(module, HoELayer)]
    return [tensor[start:stop].detach().clone() for linear in linears for tensor in (linear.weight, linear.bias)]


def is_trained(model: Any, router: str = "r0") -> bool:
    return next(spec.trained for spec in model.peft_config["default"].routers if spec.name == router)


def two_updates(output: str, rows: int, **changes: Any) -> dict[str, Any]:
    """The router after one update on a given global batch of 8 responses, and after two whole updates, on this process."""
    from peft_hoe.training.ppo import rollouts
    from peft_hoe.training.run.steered_policy import steered

    trainer = make_trainer(
        make_policy().double(), output, {"eval_dataset": PROMPTS[:4]}, per_device_train_batch_size=rows, num_ppo_epochs=1,
        stop_token="eos", num_sample_generations=1, save_strategy="steps", save_steps=1, kl_coef=0.05, **changes,
    )  # fmt: skip
    rank = trainer.accelerator.process_index
    mine = slice(rank, None, trainer.accelerator.num_processes)
    with steered(trainer.policy_model, trainer.router):
        prompts = trainer.next_prompts()
        ids = torch.randint(3, len(WORDS), (8, 6), generator=torch.Generator().manual_seed(7))[mine]
        mask = (torch.arange(6) < (torch.arange(8) % 6 + 1).unsqueeze(1))[mine]
        texts = trainer.processing_class.batch_decode(ids)
        responses = rollouts.Responses(ids, mask, torch.zeros(len(ids), dtype=torch.bool), texts)
        trainer.model.eval()
        rollout = rollouts.evaluate_rollout(trainer.actor_critic, prompts, responses, 1.0, 8, trainer.ppo.reference)
        rewards = trainer.ppo.normalize(trainer.ppo.score(rollout))
        weights = trainer.ppo.weigh(rewards)
        trainer.ppo.update(rollout, trainer.ppo.advantages(rollout, rewards, weights))
    given = [parameter.detach().clone() for parameter in trainer.router.parameters()]
    trainer.train()
    trained = [parameter.detach().clone() for parameter in trainer.router.parameters()]
    trainer.save_model(f"{output}/adapter")
    return {
        "rank": rank,
        "given": given,
        "trained": trained,
        "weights": torch.tensor(weights),
        "written": tokens_written(trainer.policy_model, 2 + 3 * rank),
        "wrapped": sum(parameter.numel() for parameter in trainer.model.parameters()),
        "trains": sum(parameter.numel() for group in trainer.optimizer.param_groups for parameter in group["params"]),
        "held": sum(_share_of(parameter).numel() for parameter in base_parameters(trainer.policy_model)),
    }


def tokens_written(policy: Any, count: int) -> int:
    """How many tokens `generate` writes when it is asked for `count`."""
    prompt = torch.tensor([[5, 6, 7]])
    written = policy.generate(
        prompt, attention_mask=torch.ones_like(prompt), min_new_tokens=count, max_new_tokens=count
    )
    return int(written.shape[1]) - 3


def base_parameters(policy: Any) -> list[torch.nn.Parameter]:
    return [parameter for name, parameter in policy.named_parameters() if "hoe_" not in name]


def _share_of(parameter: torch.Tensor) -> torch.Tensor:
    """What this process holds of a parameter."""
    return parameter.to_local() if hasattr(parameter, "to_local") else parameter


def rewards_that_differ(output: str) -> dict[str, Any]:
    """What a process holds where each has rewards of its own, such as a judge that samples or a server that is down."""
    rank = PartialState().process_index
    rewards = {"low": lambda prompts, completions: [share + rank for share in low(prompts, completions)], "high": high}
    trainer = make_trainer(
        None, output, {"normalizer": None, "reward_model": rewards}, payoff_prompts=12, response_length=16
    )
    payoff = torch.from_numpy(trainer.measure_payoff().payoff)
    rewards["low"] = lambda prompts, completions: low(prompts, completions) if rank == 0 else [None] * len(completions)
    trainer = make_trainer(None, output, {"reward_model": rewards}, max_steps=1)
    trainer.train()
    partly = [parameter.detach().clone() for parameter in trainer.router.parameters()]
    reward = trainer.state.log_history[0]["reward/low"]
    nothing = dict.fromkeys(rewards, lambda prompts, completions: [None] * len(completions))
    try:
        make_trainer(None, output, {"reward_model": nothing}, max_steps=1).train()
    except RewardError as error:
        message = str(error)
    return {"payoff": payoff, "partly": partly, "reward": reward, "message": message}


def two_grpo_updates(output: str, rows: int) -> dict[str, Any]:
    """The router and the weights after two updates on completions that are given, and after two that are sampled."""
    states = []
    for sampled in (False, True):  # plain SGD: Adam would make a whole step of the rounding of a gradient of 0
        trainer = make_grpo_trainer(
            make_policy().double(),
            f"{output}-{sampled}",
            {},
            per_device_train_batch_size=rows,
            optim="sgd",
            beta=0.1,
            save_strategy="steps",
            save_steps=1,
        )
        if not sampled:
            trainer._generate_single_turn = _given
        trainer.train()
        states.append([parameter.detach().clone() for parameter in trainer.router.parameters()])
        weights = torch.tensor(trainer.weights.log_w)
    rank = trainer.accelerator.process_index
    given = torch.tensor(_read_log_w(f"{output}-False"))
    rewards = {"low": lambda completions, **columns: [share + rank for share in low([], completions)], "high": high}
    changes = {"normalizer": None, "reward_funcs": rewards}
    measured = make_grpo_trainer(None, output, changes, payoff_prompts=12, max_completion_length=16).measure_payoff()
    payoff = torch.from_numpy(measured.payoff)
    found = {"rank": rank, "given": states[0], "trained": states[1], "weights": weights, "given_weights": given}
    return found | {"payoff": payoff}


def _read_log_w(folder: str) -> list[float]:
    state = torch.load(f"{folder}/checkpoint-2/router_training.pt", weights_only=True)
    log_w: list[float] = state["weights"]["log_w"]
    return log_w


def _given(prompt_ids: list[list[int]], *args: Any, **others: Any) -> tuple[list[list[int]], None]:
    """Completions that follow from a prompt and how often it came before: the same on any number of processes."""
    seen: dict[tuple[int, ...], int] = {}
    completions = []
    for prompt in map(tuple, prompt_ids):
        seen[prompt] = seen.get(prompt, 0) + 1
        generator = torch.Generator().manual_seed(1000 * seen[prompt] + sum(prompt))
        completions.append(torch.randint(3, len(WORDS), (2 + seen[prompt],), generator=generator).tolist())
    return completions, None


def make_pairs(objective: str, rows: int = 12, seed: int = 0) -> list[dict[str, str]]:
    """Answers of 3 to 6 random words; more of the objective's words are better."""
    generator = torch.Generator().manual_seed(seed + (objective == "high"))
    pairs = []
    for i in range(rows):
        lengths = torch.randint(3, 7, (2,), generator=generator).tolist()
        answers = [" ".join(f"w{j}" for j in torch.randint(0, 28, (n,), generator=generator).tolist()) for n in lengths]
        better, worse = sorted(answers, key=lambda text: -REWARDS[objective]([], [text])[0])
        prompt = " ".join(f"w{(i + j) % 28}" for j in range(1 + i % 3)) + " "
        pairs.append({"prompt": prompt, "chosen": better, "rejected": worse})
    return pairs


def make_dpo_trainer(model: Any, output_dir: Any, constructor: dict[str, Any], **changes: Any) -> Any:
    """A HoEDPOTrainer on the toy."""
    from peft_hoe.training import HoEDPOConfig, HoEDPOTrainer

    settings: dict[str, Any] = {
        **_settings(output_dir),
        "per_device_train_batch_size": 4,
        "max_steps": 2,
        "beta": 0.5,
    }
    arguments: dict[str, Any] = {
        "args": HoEDPOConfig(**{**settings, **changes}),
        "processing_class": make_tokenizer(),
        "model": make_policy() if model is None else model,
        "train_dataset": {name: make_pairs(name) for name in REWARDS},
    }
    return HoEDPOTrainer(**{**arguments, **constructor})


def dpo_updates(output: str, rows: int) -> dict[str, Any]:
    """The router after two updates on a global batch of 4 pairs, and what this process logged."""
    trainer = make_dpo_trainer(make_policy().double(), output, {}, per_device_train_batch_size=rows)
    trainer.train()
    trained = [parameter.detach().clone() for parameter in trainer.router.parameters()]
    logs = [{name: torch.tensor(float(value)) for name, value in entry.items()} for entry in trainer.state.log_history]
    return {"rank": trainer.accelerator.process_index, "trained": trained, "logs": logs}


TEXTS = [{"text": " ".join(f"w{(i * j + i) % 28}" for j in range(8))} for i in range(24)]


def make_distillation_trainer(model: Any, output_dir: Any, constructor: dict[str, Any], **changes: Any) -> Any:
    """A HoEDistillationTrainer on the toy; no TRL and no rewards are involved."""
    from peft_hoe.training import HoEDistillationConfig, HoEDistillationTrainer

    settings: dict[str, Any] = {
        **_settings(output_dir),
        "per_device_train_batch_size": 8,
        "max_steps": 4,
        "max_new_tokens": 6,
    }
    arguments: dict[str, Any] = {
        "model": make_policy() if model is None else model,
        "args": HoEDistillationConfig(**{**settings, **changes}),
        "train_dataset": TEXTS,
        "processing_class": make_tokenizer(),
    }
    return HoEDistillationTrainer(**{**arguments, **constructor})


def distillation_updates(output: str, rows: int, **changes: Any) -> dict[str, Any]:
    """The router after two updates on a global batch of 8 texts of 2 to 9 words, and the losses."""
    texts = [{"text": " ".join(f"w{(i * j + i) % 28}" for j in range(2 + (5 * i) % 8))} for i in range(24)]
    trainer = make_distillation_trainer(
        make_policy().double(), output, {"train_dataset": texts}, per_device_train_batch_size=rows, max_steps=2, optim="sgd",
        learning_rate=10.0, logging_steps=1, **changes,
    )  # fmt: skip
    trainer.train()
    trained = [parameter.detach().clone() for parameter in trainer.router.parameters()]
    losses = torch.tensor([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    return {"rank": trainer.accelerator.process_index, "trained": trained, "losses": losses}


def two_updates_and_rewards(output: str, rows: int) -> dict[str, Any]:
    return two_updates(output, rows) | rewards_that_differ(output)


def two_updates_and_payoff(output: str, rows: int, **changes: Any) -> dict[str, Any]:
    """As `two_updates`, and the payoff table of a trainer that has none."""
    made = two_updates(output, rows, **changes)
    trainer = make_trainer(
        None, f"{output}-payoff", {"normalizer": None}, payoff_prompts=12, response_length=16, **changes
    )
    return made | {"payoff": torch.from_numpy(trainer.measure_payoff().payoff)}


def evaluated(output: str, rows: int) -> dict[str, Any]:
    """What `evaluate` finds, in the dataset and in one of two named ones; sampled so coldly that chance has no part.

    Args:
        output: the trainer's folder.
        rows: of the dataset, over all processes.
    """
    trainer = make_trainer(None, output, {"eval_dataset": PROMPTS[:rows]}, temperature=1e-4, response_length=12)
    found = trainer.evaluate()
    named = trainer.evaluate({"few": PROMPTS[:1], "more": PROMPTS[:rows]})
    return {"rank": trainer.accelerator.process_index, "found": found, "named": named}


def save_sharded(output: str, rows: int) -> dict[str, Any]:
    """Save a policy whose every tensor torch's fully_shard has shared out: as it is, and gathered.

    Args:
        output: the adapter's folder.
        rows: of the batch that goes through it before.
    """
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    from peft_hoe import CheckpointError

    policy, rank = make_policy(), torch.distributed.get_rank()
    mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
    for module in [*policy.get_base_model().model.layers, policy]:
        fully_shard(module, mesh=mesh)
    with torch.no_grad():
        logits = policy(torch.full((rows, 3), 5), preference=[0.25, 0.75]).logits
    try:
        policy.save_pretrained(output, is_main_process=rank == 0)
        message, tensor = "", None
    except CheckpointError as error:
        message, tensor = str(error), error.tensor
    state = get_model_state_dict(policy, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    policy.save_pretrained(output, state_dict=state, is_main_process=rank == 0)
    torch.distributed.barrier()
    return {"rank": rank, "message": message, "tensor": tensor, "logits": logits}


# -- several processes ---

_WORKER = """
import os, sys
import torch
torch.set_num_threads(1)
sys.path.insert(0, {folder!r})
import router_toys
for output, (updates, rows, changes) in {runs!r}.items():
    state = getattr(router_toys, updates)(output, rows, **changes)
    torch.save(state, output + "-" + str(state["rank"]) + ".pt")
sys.stdout.flush()
# Torch may abort where Python's exit tears gloo's threads down; destroying the group first hangs in old versions
os._exit(0)
"""


def launch(folder: Path, runs: Mapping[str, tuple[str, int, dict[str, Any]]]) -> dict[str, list[dict[str, Any]]]:
    """What functions of this module return on two processes on the CPU (gloo), which run one after the other.

    Args:
        folder: where the processes work; each run's output goes to the folder of its name.
        runs: (function, rows of each process, other keywords) by name.

    Returns:
        What the first and the second process have, by name.
    """
    script, outputs = folder / "worker.py", {str(folder / name): run for name, run in runs.items()}
    script.write_text(_WORKER.format(folder=str(Path(__file__).parent), runs=outputs), encoding="utf-8")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    shared |= {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    printed = [folder / f"printed-{rank}.txt" for rank in range(2)]
    children = []
    for rank, path in enumerate(printed):
        with path.open("wb") as output:
            children.append(
                subprocess.Popen(
                    [sys.executable, "-W", "ignore", str(script)],
                    env={**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                    stdout=output, stderr=subprocess.STDOUT,
                )
            )  # fmt: skip
    try:
        while any(child.poll() is None for child in children) and not any(child.returncode for child in children):
            time.sleep(0.1)
    finally:
        for child in children:  # one that waits for the other's collective would wait on
            child.kill()
    statuses = [child.wait() for child in children]
    assert statuses == [0, 0], "\n".join(path.read_text(errors="replace")[-3000:] for path in printed)
    return {name: [torch.load(folder / f"{name}-{rank}.pt") for rank in range(2)] for name in runs}
