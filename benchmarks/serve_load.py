"""The server under load: many clients, random preferences, invalid requests and clients that hang up.

    OMP_NUM_THREADS=1 python benchmarks/serve_load.py [--adapter DIR --base DIR] [--requests 500] [--output FILE]

On 127.0.0.1 in this process. Greedy answers are compared with `generate` on the same prompt alone; where one differs, the gap
between the two likeliest tokens at the first difference is told. Without --adapter, the embedded demonstration with two routers
of random weights, which vote by the input. Needs `pip install "peft-hoe[serve]" openai`.

`memory_mb` is what the process holds (server and clients) while no request is under way: after `--warm-up` requests, after half
of the others, and at the end. Every request has another preference, and the model keeps what belongs to the last thousand:
before they have come, memory grows.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import openai
import psutil
import torch
import uvicorn

from peft_hoe import demo
from peft_hoe.inputs import load_adapter
from peft_hoe.serving.server.app import create_app
from peft_hoe.serving.server.engine import Engine

LENGTHS = (8, 16, 32)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adapter")
    parser.add_argument("--base")
    parser.add_argument("--requests", type=int, default=500)
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--warm-up", type=int, default=1500, help="requests before memory is read (default 1500)")
    parser.add_argument("--max-batch", type=int, default=16)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    model, tokenizer = loaded(arguments)
    together = run(model, tokenizer, arguments, mixed=True)
    checked = check(model, together["texts"])
    apart = run(model, tokenizer, arguments, mixed=False)
    record = {
        "requests": arguments.requests,
        "clients": arguments.clients,
        "max_batch": arguments.max_batch,
        **{
            name: together[name]
            for name in ("answers", "refused", "cut_off", "preferences_exact", "latency", "memory_mb")
        },
        **checked,
        "tokens_per_second": {"together": together["speed"], "one preference at a time": apart["speed"]},
    }
    print(json.dumps(record, indent=1))
    if arguments.output:
        arguments.output.write_text(json.dumps(record, indent=1) + "\n")


def loaded(arguments: argparse.Namespace) -> tuple[Any, Any]:
    """A model whose routers vote, and its tokenizer."""
    if arguments.adapter:
        model, tokenizer = load_adapter(arguments.adapter, arguments.base)
        return model.eval(), tokenizer
    model, tokenizer = demo.load_demo_adapter(routers=[[0.75, 0.25], [0.25, 0.75]]), demo.load_tokenizer()
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if "hoe_router" in name:
            parameter.data = 0.5 * torch.randn(parameter.shape, generator=generator)
    model.mark_trained()
    return model, tokenizer


@dataclass(frozen=True)
class Written:
    """What is kept of a text that the server wrote."""

    prompt: list[int]
    preference: list[float]
    max_new_tokens: int
    stop_tokens: list[int]
    ids: list[int]


class Served:
    """The server in a thread of this process, and what it was asked to write.

    Args:
        engine: what writes.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine, self.texts, self.written = engine, [], []
        submit = engine.submit
        engine.submit = lambda some: (self.texts.extend(some), submit(some))  # type: ignore[assignment, method-assign]
        config = uvicorn.Config(create_app(engine, "served"), host="127.0.0.1", port=0, log_level="error")
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run)

    def __enter__(self) -> openai.OpenAI:
        self._thread.start()
        while not self._server.started:
            time.sleep(0.01)
        port = self._server.servers[0].sockets[0].getsockname()[1]
        return openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0, timeout=600)

    def __exit__(self, *error: Any) -> None:
        self._server.should_exit = True
        self._thread.join()

    def rest(self) -> float:
        """Wait until nothing is under way, keep of finished texts what `check` reads, and give the memory held in MB."""
        while any(not (text.over or text.cancelled) for text in self.texts):
            time.sleep(0.01)
        self.written += [
            Written(list(t.prompt), t.preference.tolist(), t.max_new_tokens, list(t.stop_tokens), list(t.stream.ids))
            for t in self.texts
            if t.over
        ]
        self.texts.clear()
        gc.collect()
        return round(psutil.Process().memory_info().rss / 2**20, 1)


def run(model: Any, tokenizer: Any, arguments: argparse.Namespace, *, mixed: bool) -> dict[str, Any]:
    """All requests once, over HTTP."""
    engine = Engine(model, tokenizer, max_batch=arguments.max_batch, max_waiting=arguments.requests)
    engine.mixed = engine.mixed and mixed
    warm_up = arguments.warm_up if mixed else 0
    total, clients = arguments.requests + warm_up, arguments.clients
    points = np.random.default_rng(0).dirichlet([1.0] * len(engine.objectives), total)
    served = Served(engine)
    with served as client, ThreadPoolExecutor(clients) as pool:

        def ask(numbers: range) -> list[tuple[str, float, bool]]:
            return list(pool.map(lambda number: one(client, number, points[number].tolist()), numbers))

        ask(range(arguments.requests, total))
        memory = {"start": served.rest()}
        served.written.clear()
        half, seconds, heard = arguments.requests // 2, 0.0, []
        for name, numbers in (("middle", range(half)), ("end", range(half, arguments.requests))):
            begin = time.perf_counter()
            heard += ask(numbers)
            seconds += time.perf_counter() - begin
            memory[name] = served.rest()
    latency = sorted(duration for kind, duration, _ in heard if kind == "answer")
    centiles = statistics.quantiles(latency, n=100)
    return {
        "texts": served.written,
        "answers": len(latency),
        "refused": sum(kind == "refused" for kind, _, _ in heard),
        "cut_off": sum(kind == "cut off" for kind, _, _ in heard),
        "preferences_exact": sum(exact for kind, _, exact in heard if kind == "answer"),
        "latency": {f"p{p}": round(centiles[p - 1], 3) for p in (50, 90, 99)},
        "memory_mb": memory,
        "speed": round(sum(len(text.ids) for text in served.written) / seconds, 1),
    }


def one(client: openai.OpenAI, number: int, point: list[float]) -> tuple[str, float, bool]:
    """A request: what became of it, seconds, and whether the answer told its preference exactly."""
    prompts = demo.load_prompts()
    how = {
        "model": "served", "prompt": prompts[number % len(prompts)], "temperature": 0,
        "max_tokens": LENGTHS[number % len(LENGTHS)],
    }  # fmt: skip
    start = time.perf_counter()
    if number % 20 == 7:
        try:
            client.completions.create(**how, extra_body={"preference": [weight + 0.1 for weight in point]})
        except openai.UnprocessableEntityError:
            return "refused", 0.0, True
        return "not refused", 0.0, False
    if number % 20 == 13:
        stream = client.completions.create(**how, stream=True, extra_body={"preference": point})
        next(iter(stream))
        stream.close()
        return "cut off", 0.0, True
    answer = client.completions.create(**how, extra_body={"preference": point})
    told = list(answer.choices[0].preference.values())  # type: ignore[attr-defined]
    return "answer", time.perf_counter() - start, bool(np.allclose(told, point, rtol=0, atol=1e-12))


@torch.inference_mode()
def check(model: Any, texts: list[Written]) -> dict[str, Any]:
    """Every finished text against the one that is written alone."""
    same, gaps = 0, []
    for text in texts:
        prompt = torch.tensor([text.prompt])
        output = model.generate(
            input_ids=prompt, max_new_tokens=text.max_new_tokens, do_sample=False, preference=text.preference,
            eos_token_id=text.stop_tokens or None, pad_token_id=0,
        )[0, prompt.shape[1] :].tolist()  # fmt: skip
        wanted = [token for token in output if token not in text.stop_tokens]
        if text.ids == wanted:
            same += 1
            continue
        first = next((i for i, (a, b) in enumerate(zip(text.ids, wanted, strict=False)) if a != b), len(wanted))
        ids = torch.tensor([[*text.prompt, *wanted[:first]]])
        likeliest = model(input_ids=ids, preference=text.preference).logits[0, -1].topk(2).values
        gaps.append(float(likeliest[0] - likeliest[1]))
    return {"compared": len(texts), "same_tokens": same, "gaps_where_they_differ": gaps}


if __name__ == "__main__":
    main()
