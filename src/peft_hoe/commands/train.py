"""`peft-hoe train`: routers of an adapter learn their preferences."""

from __future__ import annotations

import argparse
import json
from typing import Any

from ..errors import HoEError
from ..inputs import load_adapter, read_prompts


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments; most are fields of `HoERouterConfig`."""
    add = parser.add_argument
    add("adapter", metavar="ADAPTER", help="directory or Hub id of a HoE adapter with routers")
    add("--base", help="directory or Hub id of its base model; default what the adapter names")
    add("--router", action="append", metavar="NAME", help="a router to train; once for each, default all")
    add(
        "--prompts",
        required=True,
        metavar="FILE",
        help="text (a prompt a line), JSON (a list) or JSON lines (`prompt`)",
    )
    add("--eval-prompts", metavar="FILE", help="prompts of the payoff table; default the training prompts")
    add(
        "--reward",
        action="append",
        required=True,
        metavar="NAME=SOURCE",
        help="NAME=module:function, NAME=hub:ID[#output][:-] or NAME=url:...; once for each objective",
    )
    add(
        "--reward-timeout",
        type=float,
        metavar="SECONDS",
        help="a reward may take so long for a batch; default for ever",
    )
    add("--output", required=True, metavar="DIR", help="where the trained adapter goes")
    add("--updates", type=int, default=100, help="number of updates (default 100)")
    add("--batch-size", type=int, default=128, help="responses in an update, on each process (default 128)")
    add("--micro-batch-size", type=int, help="responses in a forward; default the batch, and 64 in rollouts")
    add("--max-new-tokens", type=int, default=64, help="length of a response (default 64)")
    add("--temperature", type=float, default=1.0, help="of sampling (default 1)")
    add("--learning-rate", type=float, help="of the router; default 2 / hidden size")
    add("--kl-coef", type=float, help="weight of the divergence from the base")
    add("--mu", type=float, default=0.1, help="temperature of the weights of objectives (default 0.1)")
    add("--beta", type=float, default=0.1, help="how fast they forget (default 0.1)")
    add("--seed", type=int, default=0, help="of prompts and sampling (default 0)")
    add("--save-steps", type=int, help="a checkpoint every so many updates; default none")
    add("--resume", action="store_true", help="go on with the run in --output, with the same other arguments")
    add("--bf16", action="store_true", help="train in bfloat16 autocast")
    add("--cpu", action="store_true", help="use no accelerator")
    add("--quiet", action="store_true", help="no progress bar")


def run(arguments: argparse.Namespace) -> int:
    """Train and save.

    Raises:
        HoEError: an argument, a file or a reward is not what it should be.
    """
    from ..training.trl_versions import missing_ppo

    reason = missing_ppo()
    if reason:
        raise HoEError(reason)
    from ..training.policies import hidden_size
    from ..training.reward_sources import parse_rewards
    from ..training.train_routers import train_routers

    prompts = read_prompts(arguments.prompts)
    held_out = None if arguments.eval_prompts is None else read_prompts(arguments.eval_prompts)
    rewards = parse_rewards(arguments.reward)
    model, tokenizer = load_adapter(arguments.adapter, arguments.base)
    normalizer = train_routers(
        model,
        _configuration(arguments, 2 / hidden_size(model)),
        processing_class=tokenizer,
        reward_model=rewards,
        train_dataset=prompts,
        eval_dataset=held_out,
        routers=arguments.router,
        resume_from_checkpoint=arguments.resume,
    )
    table = "" if normalizer is None else f"; payoff table {json.dumps(normalizer.payoff.round(4).tolist())}"
    print(f"saved in {arguments.output}{table}")
    return 0


def _configuration(arguments: argparse.Namespace, learning_rate: float) -> Any:
    from ..training.router_config import HoERouterConfig

    for name in ("updates", "batch_size", "micro_batch_size", "max_new_tokens", "save_steps"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise HoEError(f"--{name.replace('_', '-')} is {value}; it must be at least 1")
    micro = arguments.micro_batch_size or arguments.batch_size
    if arguments.batch_size % micro:
        raise HoEError(f"batch size {arguments.batch_size} is no multiple of the micro-batch size {micro}")
    optional = {
        "kl_coef": arguments.kl_coef,
        "reward_timeout": arguments.reward_timeout,
        "save_steps": arguments.save_steps,
    }
    return HoERouterConfig(
        output_dir=arguments.output,
        learning_rate=learning_rate if arguments.learning_rate is None else arguments.learning_rate,
        max_steps=arguments.updates,
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=arguments.batch_size // micro,
        local_rollout_forward_batch_size=min(64, arguments.micro_batch_size or 64),
        response_length=arguments.max_new_tokens,
        temperature=arguments.temperature,
        stop_token="eos",
        mu=arguments.mu,
        beta=arguments.beta,
        seed=arguments.seed,
        save_strategy="no" if arguments.save_steps is None else "steps",
        bf16=arguments.bf16,
        use_cpu=arguments.cpu,
        disable_tqdm=arguments.quiet,
        logging_strategy="no" if arguments.quiet else "steps",
        report_to=[],
        num_sample_generations=0,
        **{name: value for name, value in optional.items() if value is not None},
    )
