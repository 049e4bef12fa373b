"""`peft-hoe policy`: one policy for each reward, for those who have none to build from yet."""

from __future__ import annotations

import argparse
import gc
import shlex
from pathlib import Path
from typing import Any

from ..errors import HoEError
from ..inputs import read_prompts
from .arguments import add_reports, add_stop, read_pairs, read_reports, read_stop

# Of Adam, times the hidden size: an entry of a wide model's update adds to more others. A LoRA factor takes larger steps.
_LORA_RATE, _FULL_RATE = 0.2, 0.02


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments; most are settings of TRL's GRPOTrainer."""
    add = parser.add_argument
    add("base", metavar="BASE", help="directory or Hub id of the model to train from")
    add(
        "--reward", action="append", required=True, metavar="NAME=SOURCE",
        help="NAME=module:function, NAME=hub:ID[#output][:-] or NAME=url:...; once for each objective",
    )  # fmt: skip
    add(
        "--prompts", required=True, metavar="FILE",
        help="text (a prompt a line), JSON (a list) or JSON lines (`prompt`); chat messages go through the chat template",
    )  # fmt: skip
    add(
        "--output", required=True, metavar="DIR", help="where the policies go, each in a folder of its objective's name"
    )
    add("--rank", type=int, help="of the LoRA adapter on all linear layers (default 16)")
    add("--full", action="store_true", help="train every weight in place of a LoRA adapter")
    add("--updates", type=int, default=120, help="number of updates of each policy (default 120)")
    add("--batch-size", type=int, default=128, help="responses in an update, on each process (default 128)")
    add("--micro-batch-size", type=int, help="responses in a forward; default the batch")
    add("--group-size", type=int, default=16, help="responses to a prompt (default 16)")
    add("--max-new-tokens", type=int, default=64, help="length of a response (default 64)")
    add("--temperature", type=float, default=1.0, help="of sampling (default 1)")
    add_stop(parser)
    add(
        "--learning-rate", type=float,
        help=f"default {_LORA_RATE} / hidden size, and {_FULL_RATE} / hidden size for every weight",
    )  # fmt: skip
    add("--kl-coef", type=float, default=0.2, help="weight of the divergence from the base (default 0.2)")
    add(
        "--reward-timeout",
        type=float,
        metavar="SECONDS",
        help="a reward may take so long for a batch; default for ever",
    )
    add("--seed", type=int, default=0, help="of prompts and sampling (default 0)")
    add("--resume", action="store_true", help="keep the policies that are in --output and train the others")
    add("--bf16", action="store_true", help="train in bfloat16 autocast")
    add("--cpu", action="store_true", help="use no accelerator")
    add_reports(parser)
    add("--quiet", action="store_true", help="print the results only")


def run(arguments: argparse.Namespace) -> int:
    """Train the policies one after the other, and print the command that builds from them.

    Raises:
        HoEError: an argument, a file or a reward is not what it should be, or TRL is missing.
    """
    try:
        from ..policies import train_policy
    except ImportError as error:
        raise HoEError(str(error)) from None
    from ..rewards.command_line import parse_reward, parse_rewards
    from ..rewards.sources import Rewards

    _check(arguments)
    reports = read_reports(arguments)
    texts = {
        name: f"{name}={source}" for name, source in read_pairs(arguments.reward, "--reward", "NAME=SOURCE").items()
    }
    for text in texts.values():  # all can be read before the first policy is trained
        parse_reward(text)
    folders = _folders(arguments, list(texts))
    prompts = read_prompts(arguments.prompts)
    rate = arguments.learning_rate or (_FULL_RATE if arguments.full else _LORA_RATE) / _hidden_size(arguments.base)
    for name, folder in folders.items():
        if folder.is_dir() and any(folder.iterdir()):
            print(f"{name}: kept {folder}")
            continue
        log = train_policy(
            arguments.base,
            _configuration(arguments, folder, rate, reports),
            rewards=Rewards(parse_rewards([texts[name]]), [name], timeout=arguments.reward_timeout),
            preference=[1.0],
            train_dataset=prompts,
            peft_config=None if arguments.full else _lora(arguments.rank or 16),
            stop_strings=read_stop(arguments),
            say=(lambda line: None) if arguments.quiet else print,
        )
        print(f"{name}: {_progress(log, _logging_steps(arguments))}; saved in {folder}")
        gc.collect()  # of the model, before the next one is loaded
    _farewell(arguments, folders)
    return 0


def _check(arguments: argparse.Namespace) -> None:
    """Numbers in range, and options that go together.

    Raises:
        HoEError: they are not, or do not.
    """
    for name in ("rank", "updates", "batch_size", "micro_batch_size", "max_new_tokens"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            option = f"--{name.replace('_', '-')}"
            raise HoEError(
                f"{option} is {value}; it must be at least 1", argument=option, value=value, allowed="at least 1"
            )
    if arguments.full and arguments.rank is not None:
        raise HoEError(
            f"--rank {arguments.rank} is of a LoRA adapter, and --full trains none; leave one of them out",
            argument="--rank", value=arguments.rank,
        )  # fmt: skip
    if arguments.group_size < 2 or arguments.batch_size % arguments.group_size:
        raise HoEError(
            f"--batch-size is {arguments.batch_size} and --group-size {arguments.group_size}; a group has at least 2 "
            "responses, and the batch is a multiple of it",
            argument="--group-size", value=arguments.group_size, allowed=f"a divisor of {arguments.batch_size}, at least 2",
        )  # fmt: skip
    micro = arguments.micro_batch_size or arguments.batch_size
    if arguments.batch_size % micro:
        raise HoEError(
            f"--batch-size {arguments.batch_size} is no multiple of --micro-batch-size {micro}",
            argument="--micro-batch-size", value=micro, allowed=f"a divisor of {arguments.batch_size}",
        )  # fmt: skip
    for name in ("learning_rate", "temperature"):
        value = getattr(arguments, name)
        if value is not None and not value > 0:
            option = f"--{name.replace('_', '-')}"
            raise HoEError(f"{option} is {value}; it must be above 0", argument=option, value=value, allowed="above 0")


def _folders(arguments: argparse.Namespace, names: list[str]) -> dict[str, Path]:
    """Where each policy goes.

    Raises:
        HoEError: a name is none of a folder, or a folder is not empty.
    """
    folders = {name: Path(arguments.output) / name for name in names}
    for name, folder in folders.items():
        if folder.name != name or name.startswith("."):
            raise HoEError(
                f"the objective {name!r} cannot name a folder; choose a name without / and leading dots",
                argument="--reward", value=name, allowed="a name without / and leading dots",
            )  # fmt: skip
        if folder.is_dir() and any(folder.iterdir()):
            found = any((folder / file).is_file() for file in ("adapter_config.json", "config.json"))
            if not arguments.resume or not found:
                remedy = "keep it with --resume, or name" if found else "it holds no policy; name"
                raise HoEError(
                    f"{folder} exists and is not empty: {remedy} another --output",
                    argument="--output", value=str(folder),
                )  # fmt: skip
    return folders


def _hidden_size(base: str) -> int:
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(base)
    except (OSError, ValueError) as error:
        raise HoEError(f"cannot load the configuration of {base!r}: {error}", argument="BASE", value=base) from None
    size: int = config.get_text_config().hidden_size
    return size


def _configuration(arguments: argparse.Namespace, folder: Path, rate: float, reports: list[str]) -> Any:
    from ..policies import policy_gradient_config

    micro = arguments.micro_batch_size or arguments.batch_size
    return policy_gradient_config(
        folder,
        prompts=arguments.batch_size // arguments.group_size,
        samples=arguments.group_size,
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=arguments.batch_size // micro,
        max_steps=arguments.updates,
        max_completion_length=arguments.max_new_tokens,
        temperature=arguments.temperature,
        learning_rate=rate,
        beta=arguments.kl_coef,
        scale_rewards="batch",  # so that the divergence weighs the same beside rewards of every scale
        seed=arguments.seed,
        bf16=arguments.bf16,
        use_cpu=arguments.cpu,
        report_to=reports,
        run_name=folder.name,  # what reports call it
        logging_steps=_logging_steps(arguments),
    )


def _lora(rank: int) -> Any:
    from peft import LoraConfig

    return LoraConfig(r=rank, lora_alpha=rank, target_modules="all-linear", task_type="CAUSAL_LM")


def _logging_steps(arguments: argparse.Namespace) -> int:
    return max(1, int(arguments.updates) // 10)


def _progress(log: list[dict[str, Any]], steps: int) -> str:
    """The first and the last of the logged means."""
    means = [entry["reward"] for entry in log if "reward" in entry]
    span = f"{steps} updates" if steps > 1 else "update"
    return f"mean reward {means[0]:.3f} in the first {span}, {means[-1]:.3f} in the last"


def _farewell(arguments: argparse.Namespace, folders: dict[str, Path]) -> None:
    output = Path(arguments.output) / "adapter"
    policies = [word for name, folder in folders.items() for word in ("--policy", f"{name}={folder}")]
    print("\nAn adapter from them:\n")
    print("    " + shlex.join(["peft-hoe", "build", arguments.base, *policies, "--output", str(output)]))
