"""`peft-hoe demo`: build, save, load and steer, on embedded tiny models or on the user's own."""

from __future__ import annotations

import argparse
import textwrap
import time
from pathlib import Path
from typing import Any

import numpy as np
from peft import PeftModel

from ..demo import drawing
from ..demo.embedded import Reward
from ..demo.steering import (
    Front,
    Task,
    calm,
    complete,
    embedded_task,
    load_model,
    load_tokenizer,
    mean_rewards,
    measure_front,
    measure_reference,
    shown_preferences,
)
from ..errors import HoEError
from ..experts import build_adapter
from ..inputs import read_prompts
from ..preference import parse_preference, read_preference
from .arguments import read_number, read_pairs


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    add = parser.add_argument
    add("--base", metavar="MODEL", help="directory or Hub id of your own base; default: the embedded tiny models")
    add("--policy", action="append", metavar="NAME=MODEL", help="a policy of that base; give two or more")
    add(
        "--reward",
        action="append",
        metavar="NAME=MODULE:FUNCTION",
        help="takes (prompts, completions), returns a list of numbers; without rewards only texts are shown",
    )
    add("--prompts", metavar="FILE", help="a JSON list of texts, or a text file with one on each line")
    add("--output", type=Path, default=Path("peft-hoe-demo"), metavar="DIR", help="default ./peft-hoe-demo")
    add("--max-new-tokens", type=int, default=48, metavar="N", help="length of a completion (default 48)")
    add("--rank", default="auto", metavar="R", help="rank of the experts: a number, full, or auto (default)")
    add("--seed", type=int, default=0, metavar="N", help="seed of the build; generation is greedy (default 0)")
    add("--preference", help="one more preference to show a text at, such as 0.7,0.3 or cheerful=0.7,vivid=0.3")


def run(arguments: argparse.Namespace) -> int:
    """Do the whole job and say where the results are."""
    started = time.monotonic()
    task = _task(arguments)
    extra = _extra_preference(arguments.preference, task)
    adapter = arguments.output / "adapter"
    with calm():
        report = build_adapter(
            task.base, dict(task.policies), adapter, r=read_number(arguments.rank, int), seed=arguments.seed,
            overwrite=True, progress=False,
        )  # fmt: skip
        print(f"1. An adapter from {len(task.policies)} policies\n\n{report.table()}\n")
        tokenizer, model = load_tokenizer(task.base), load_model(task.base)
        base_texts = complete(model, tokenizer, task.prompts, task.max_new_tokens)
        model = PeftModel.from_pretrained(model, str(adapter)).eval()
        texts = _show_texts(task, model, tokenizer, base_texts[0], extra)
        written = [adapter]
        if task.rewards:
            front = measure_front(task, model, tokenizer)
            front.references["base"] = mean_rewards(task, base_texts)
            for name, source in task.policies.items():
                front.references[name] = measure_reference(task, source, tokenizer)
            written += _show_front(task, front, texts, arguments.output)
    _farewell(task, adapter, written, time.monotonic() - started)
    return 0


# -- what the user wrote -----------------------------------------------------------------------------------------------


def _task(arguments: argparse.Namespace) -> Task:
    """The embedded models, or the user's.

    Raises:
        HoEError: options that do not go together.
    """
    if arguments.max_new_tokens < 1:
        raise HoEError(f"--max-new-tokens is {arguments.max_new_tokens}; it must be at least 1")
    policies = read_pairs(arguments.policy, "--policy", "NAME=MODEL")
    functions = read_pairs(arguments.reward, "--reward", "NAME=MODULE:FUNCTION")
    prompts = _read_prompts(arguments.prompts) if arguments.prompts else None
    if arguments.base is None and not policies:
        if functions:
            raise HoEError("--reward needs --base and --policy; the embedded models have rewards of their own")
        task = embedded_task(arguments.max_new_tokens)
        return task if prompts is None else Task(task.base, task.policies, task.rewards, prompts, task.max_new_tokens)
    if arguments.base is None or len(policies) < 2:
        raise HoEError("models of your own need --base and at least two --policy NAME=MODEL")
    if prompts is None:
        raise HoEError("models of your own need --prompts FILE")
    if functions and set(functions) != set(policies):
        raise HoEError(f"rewards are given for {sorted(functions)}, policies for {sorted(policies)}; names must match")
    rewards = {name: _load_reward(functions[name]) for name in policies if functions}
    return Task(arguments.base, policies, rewards, prompts, arguments.max_new_tokens)


def _read_prompts(path: str) -> list[str]:
    prompts = [row["prompt"] for row in read_prompts(path)]
    for prompt in prompts:
        if not isinstance(prompt, str):
            raise HoEError(f"{path} holds the prompt {prompt!r}; the demo continues texts, write one on each line")
    return prompts


def _load_reward(path: str) -> Reward:
    """The function `module:function`, from the working directory or installed."""
    from ..rewards.command_line import load_function

    module, _, name = path.partition(":")
    if not module or not name:
        raise HoEError(f"cannot load the reward {path!r}, write module:function")
    try:
        return load_function(module, name)
    except HoEError as error:
        raise HoEError(f"cannot load the reward {path!r}, write module:function ({error})") from None


def _extra_preference(text: str | None, task: Task) -> list[list[float]]:
    return [] if text is None else [parse_preference(read_preference(text), task.objectives).tolist()]


# -- what the user reads -----------------------------------------------------------------------------------------------


def _show_texts(task: Task, model: Any, tokenizer: Any, base_text: str, extra: list[list[float]]) -> list[Any]:
    """One prompt at several preferences; returns what is written beside the front."""
    preferences = np.asarray([*shown_preferences(len(task.objectives)), *extra])
    prompt = task.prompts[0]
    texts = complete(model, tokenizer, [prompt] * len(preferences), task.max_new_tokens, preferences)
    print(f"2. One prompt, one batch, {len(preferences)} preferences for {task.objectives}\n\n{prompt} ...\n")
    for label, text in [("base", base_text), *zip(map(drawing.written, preferences), texts, strict=True)]:
        lines = textwrap.wrap(text, 88) or [""]
        print("\n".join(f"{'' if i else label:<22} {line}" for i, line in enumerate(lines)) + "\n")
    return [{"preference": row.tolist(), "text": text} for row, text in zip(preferences, texts, strict=True)]


def _show_front(task: Task, front: Front, texts: list[Any], output: Path) -> list[Path]:
    """Print the front, write it as JSON and, where matplotlib is there, as a picture."""
    count = f"{len(front.preferences)} preferences, {len(task.prompts)} prompts"
    print(f"3. Mean rewards at {count}, greedy, {task.max_new_tokens} new tokens\n\n{drawing.table(front)}\n")
    for x, y in drawing.pairs(front):
        print(drawing.draw_text(front, x, y) + "\n")
    numbers, picture = output / "front.json", output / "front.png"
    front.save(numbers, prompt=task.prompts[0], texts=texts)
    try:
        drawing.draw_png(front, picture)
    except HoEError as error:
        print(f"{error}\n")
        return [numbers]
    return [numbers, picture]


def _farewell(task: Task, adapter: Path, written: list[Path], seconds: float) -> None:
    weights = [1.0] + [0.0] * (len(task.objectives) - 1)
    weights[:2] = [0.7, 0.3]
    print(f"Done in {seconds:.0f} s. Written: {', '.join(str(path) for path in written)}")
    print("\nThe adapter is yours:\n")
    print("    import peft, peft_hoe")
    print(f"    model = peft.AutoPeftModelForCausalLM.from_pretrained({str(adapter)!r})")
    print(f"\nand model.generate(**batch, preference={weights}) steers it.")
