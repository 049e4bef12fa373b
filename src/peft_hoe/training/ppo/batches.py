"""The batch sizes and the number of updates that follow from a configuration."""

from __future__ import annotations

import math
from typing import Any

from accelerate import PartialState

from ...errors import HoEError


def check_countable(dataset: Any) -> None:
    """See that the rows of a dataset, or of several by name, can be counted and taken by their number.

    Raises:
        HoEError: it is a stream.
    """
    for rows in dataset.values() if isinstance(dataset, dict) else (dataset,):
        if rows is not None and not (hasattr(rows, "__len__") and hasattr(rows, "__getitem__")):
            raise HoEError(
                f"the dataset is a {type(rows).__name__}, a stream; an update takes its prompts by number, so that it can "
                "be resumed. Load it first: list(dataset), or datasets.Dataset.from_list(list(dataset))",
                argument="train_dataset",
                value=type(rows).__name__,
            )


def count_batches(args: Any, rows: int) -> None:
    """Fill in the fields of a HoERouterConfig that follow from others, as PPOTrainer does.

    Args:
        args: the configuration; written to.
        rows: of the training dataset.

    Raises:
        HoEError: a batch cannot be divided into its mini-batches.
    """
    _ = args.device  # starts the processes, where there are several
    args.world_size = PartialState().num_processes
    args.local_batch_size = args.per_device_train_batch_size * args.gradient_accumulation_steps
    args.micro_batch_size = args.per_device_train_batch_size * args.world_size
    args.batch_size = args.local_batch_size * args.world_size
    if args.num_mini_batches < 1 or args.local_batch_size % args.num_mini_batches:
        raise HoEError(
            f"num_mini_batches is {args.num_mini_batches}, but an update has {args.local_batch_size} responses on each process "
            "(per_device_train_batch_size x gradient_accumulation_steps); choose a number that divides them",
            argument="num_mini_batches",
            value=args.num_mini_batches,
            allowed=f"a divisor of {args.local_batch_size}",
        )
    if args.local_batch_size % args.num_generations:
        raise HoEError(
            f"num_generations is {args.num_generations}, but an update has {args.local_batch_size} responses on each process "
            "(per_device_train_batch_size x gradient_accumulation_steps); choose a number that divides them",
            argument="num_generations",
            value=args.num_generations,
            allowed=f"a divisor of {args.local_batch_size}",
        )
    args.local_mini_batch_size = args.local_batch_size // args.num_mini_batches
    args.mini_batch_size = args.batch_size // args.num_mini_batches
    if args.max_steps > 0:
        args.total_episodes = args.max_steps * args.batch_size
    elif args.total_episodes is None:
        args.total_episodes = int(args.num_train_epochs * rows)
    args.num_total_batches = math.ceil(args.total_episodes / args.batch_size)
