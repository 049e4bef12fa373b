"""`peft-hoe demo`: build, save, load and steer, on embedded tiny models or on the user's own."""

from __future__ import annotations

import argparse
import json
import textwrap
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from peft import PeftModel

from ..demo import drawing
from ..demo.embedded import Reward
from ..demo.steering import (
    Alone,
    Task,
    calm,
    embedded_task,
    load_model,
    measure_alone,
    measure_front,
    shown_preferences,
    texts_at,
)
from ..errors import HoEError
from ..evaluation import Sweep
from ..experts import build_adapter
from ..generation import Decoding
from ..inputs import load_tokenizer, read_prompts
from ..preference import FloatArray, parse_preference, read_preference, written
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
    preferences = _preferences(arguments.preference, task)
    adapter = arguments.output / "adapter"
    with calm():
        report = build_adapter(
            task.base, dict(task.policies), adapter, r=read_number(arguments.rank, int), seed=arguments.seed,
            overwrite=True, progress=False,
        )  # fmt: skip
        print(f"1. An adapter from {len(task.policies)} policies\n\n{report.table()}\n")
        tokenizer, model = load_tokenizer(task.base), load_model(task.base)
        base = Alone("base", model, tokenizer, task)
        base_text = base([task.prompts[0]], preferences)[0]
        alone = [measure_alone(task, base)] if task.rewards else []  # before the adapter is put into the model
        model = PeftModel.from_pretrained(model, str(adapter)).eval()
        texts = texts_at(task, model, tokenizer, preferences)
        _show_texts(task, base_text, preferences, texts)
        files = [adapter]
        if task.rewards:
            front = measure_front(task, model, tokenizer)
            for name, source in task.policies.items():
                alone.append(measure_alone(task, Alone(f"policy {name}", load_model(source), tokenizer, task)))
            _show_front(task, front, alone)
            files += _write_front(task, front, alone, _texts(preferences, texts), arguments.output)
    _farewell(task, adapter, files, time.monotonic() - started)
    return 0


# -- what the user wrote -----------------------------------------------------------------------------------------------


def _task(arguments: argparse.Namespace) -> Task:
    """The embedded models, or the user's.

    Raises:
        HoEError: options that do not go together.
    """
    decoding = Decoding(arguments.max_new_tokens)
    policies = read_pairs(arguments.policy, "--policy", "NAME=MODEL")
    functions = read_pairs(arguments.reward, "--reward", "NAME=MODULE:FUNCTION")
    prompts = _read_prompts(arguments.prompts) if arguments.prompts else None
    if arguments.base is None and not policies:
        if functions:
            raise HoEError(
                "--reward needs --base and --policy; the embedded models have rewards of their own",
                argument="--reward", value=arguments.reward,
            )  # fmt: skip
        task = embedded_task(decoding)
        return task if prompts is None else Task(task.base, task.policies, task.rewards, prompts, decoding)
    if arguments.base is None or len(policies) < 2:
        raise HoEError(
            "models of your own need --base and at least two --policy NAME=MODEL",
            argument="--base" if arguments.base is None else "--policy",
        )
    if prompts is None:
        raise HoEError("models of your own need --prompts FILE", argument="--prompts")
    if functions and set(functions) != set(policies):
        raise HoEError(
            f"rewards are given for {sorted(functions)}, policies for {sorted(policies)}; names must match",
            argument="--reward", value=sorted(functions), allowed=sorted(policies),
        )  # fmt: skip
    rewards = {name: _load_reward(functions[name]) for name in policies if functions}
    return Task(arguments.base, policies, rewards, prompts, decoding)


def _read_prompts(path: str) -> list[str]:
    prompts = [row["prompt"] for row in read_prompts(path)]
    for prompt in prompts:
        if not isinstance(prompt, str):
            raise HoEError(
                f"{path} holds the prompt {prompt!r}; the demo continues texts, write one on each line",
                argument="--prompts", value=prompt, allowed="a text",
            )  # fmt: skip
    return prompts


def _load_reward(path: str) -> Reward:
    """The function `module:function`, from the working directory or installed."""
    from ..rewards.command_line import load_function

    module, _, name = path.partition(":")
    if not module or not name:
        raise HoEError(
            f"cannot load the reward {path!r}, write module:function",
            argument="--reward", value=path, allowed="module:function",
        )  # fmt: skip
    try:
        return load_function(module, name)
    except HoEError as error:
        raise HoEError(
            f"cannot load the reward {path!r}, write module:function ({error})",
            argument="--reward", value=path, allowed="module:function",
        ) from None  # fmt: skip


def _preferences(extra: str | None, task: Task) -> FloatArray:
    """The preferences to show a text at, (K, N), the user's own last."""
    shown = shown_preferences(len(task.objectives))
    return shown if extra is None else np.vstack([shown, parse_preference(read_preference(extra), task.objectives)])


# -- what the user reads -----------------------------------------------------------------------------------------------


def _show_texts(task: Task, base_text: str, preferences: FloatArray, texts: Sequence[str]) -> None:
    """One prompt, continued by the base and at several preferences."""
    print(f"2. One prompt, one batch, {len(preferences)} preferences for {', '.join(task.objectives)}\n")
    print(f"{task.prompts[0]} ...\n")
    for label, text in [("base", base_text), *zip(map(written, preferences), texts, strict=True)]:
        lines = textwrap.wrap(text, 88) or [""]
        print("\n".join(f"{'' if i else label:<22} {line}" for i, line in enumerate(lines)) + "\n")


def _show_front(task: Task, front: Sweep, alone: Sequence[Sweep]) -> None:
    counts = f"{len(front.preferences)} preferences for {', '.join(task.objectives)}, {len(task.prompts)} prompts"
    print(f"3. Mean rewards at {counts}, greedy, {task.decoding.max_new_tokens} new tokens\n")
    print(drawing.table(front, alone) + "\n")
    for x, y in drawing.pairs(front):
        print(drawing.draw_text(front, alone, x, y) + "\n")


def _texts(preferences: FloatArray, texts: Sequence[str]) -> list[dict[str, Any]]:
    rows = preferences.round(12).tolist()
    return [{"preference": row, "text": text} for row, text in zip(rows, texts, strict=True)]


def _write_front(task: Task, front: Sweep, alone: Sequence[Sweep], texts: list[Any], output: Path) -> list[Path]:
    """The front as JSON and, where the extra `eval` is installed, as a picture."""
    numbers, picture = output / "front.json", output / "front.png"
    content = {
        "objectives": task.objectives,
        "preferences": front.preferences.round(12).tolist(),
        "rewards": front.points.tolist(),
        "references": {sweep.name: sweep.points[0].tolist() for sweep in alone},
        "prompt": task.prompts[0],
        "texts": texts,
    }
    numbers.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    try:
        front.plot(picture, others=alone)
    except (HoEError, ImportError):
        print('A picture of the front needs pip install "peft-hoe[eval]".\n')
        return [numbers]
    return [numbers, picture]


def _farewell(task: Task, adapter: Path, files: Sequence[Path], seconds: float) -> None:
    weights = [1.0] + [0.0] * (len(task.objectives) - 1)
    weights[:2] = [0.7, 0.3]
    print(f"Done in {seconds:.0f} s. Written: {', '.join(map(str, files))}")
    print("\nThe adapter is yours:\n")
    print("    import peft, peft_hoe")
    print(f"    model = peft.AutoPeftModelForCausalLM.from_pretrained({str(adapter)!r})")
    print(f"\nand model.generate(**batch, preference={weights}) steers it.")
