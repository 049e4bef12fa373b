"""A judge of pairs behind an OpenAI-compatible URL."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ...errors import HoEError
from ...rewards.url import post, shown

INSTRUCTION = """You compare two replies to the same prompt. Decide which one is better{criterion}. Their order means nothing.
Answer with one word: A, B or tie.

[Prompt]
{prompt}

[Reply A]
{first}

[Reply B]
{second}"""


@dataclass
class URLJudge:
    """Asks a model behind an OpenAI-compatible server, `{url}/chat/completions`, at temperature 0.

    Args:
        url: such as "http://localhost:8000/v1".
        model: the server's name of it.
        criterion: what better means, such as "more helpful"; default left to the model.
        instruction: the question, with {prompt}, {first}, {second} and perhaps {criterion}.
        headers: more HTTP headers, such as `{"Authorization": "Bearer ..."}`.
        timeout: seconds that the server may stay silent.
        retries: how often a question is sent again after a timeout, a broken connection, or status 429 or 5xx.
        backoff: seconds before the first retry; doubled before each further one.
        max_tokens: length of the answer; its last line that is a verdict counts.
        workers: questions under way at once.

    Raises:
        HoEError: the URL is not http, a number is out of range, or the instruction cannot be filled in.

    >>> from peft_hoe.evaluation import URLJudge
    >>> judge = URLJudge("http://127.0.0.1:8000/v1", model="judge")
    """

    url: str
    model: str
    criterion: str = ""
    instruction: str = INSTRUCTION
    headers: Mapping[str, str] = field(default_factory=dict, repr=False)
    timeout: float = 60.0
    retries: int = 2
    backoff: float = 0.5
    max_tokens: int = 16
    workers: int = 4

    def __post_init__(self) -> None:
        if not self.url.startswith(("http://", "https://")):
            raise HoEError(
                f"the judge's URL {self.url!r} must begin with http:// or https://", argument="url", value=self.url
            )
        wrong = {
            "timeout": self.timeout <= 0, "retries": self.retries < 0, "backoff": self.backoff < 0,
            "max_tokens": self.max_tokens < 1, "workers": self.workers < 1,
        }  # fmt: skip
        for name, is_wrong in wrong.items():
            if is_wrong:
                allowed = {"timeout": "above 0", "retries": "at least 0", "backoff": "at least 0"}.get(
                    name, "at least 1"
                )
                value = getattr(self, name)
                raise HoEError(
                    f"the judge's {name} is {value}; it must be {allowed}", argument=name, value=value, allowed=allowed
                )
        try:
            self.instruction.format(prompt="", first="", second="", criterion="")
        except (KeyError, IndexError, ValueError) as error:
            raise HoEError(
                f"the judge's instruction cannot be filled in ({type(error).__name__}: {error}); it may hold {{prompt}}, "
                "{first}, {second} and {criterion}, and other braces doubled",
                argument="instruction", value=self.instruction, allowed=("prompt", "first", "second", "criterion"),
            ) from None  # fmt: skip

    def __call__(self, prompt: Any, first: str, second: str) -> str:
        """The server's answer.

        Raises:
            HoEError: no answer, an HTTP error, or an answer of another form.
        """
        criterion = f": {self.criterion}" if self.criterion else ""
        question = self.instruction.format(prompt=_as_text(prompt), first=first, second=second, criterion=criterion)
        body = {
            "model": self.model,
            "messages": [{"role": "user", "content": question}],
            "temperature": 0,
            "max_tokens": self.max_tokens,
        }
        address = self.url.rstrip("/").removesuffix("/chat/completions") + "/chat/completions"
        answer = post(
            address, json.dumps(body).encode(), timeout=self.timeout, retries=self.retries, backoff=self.backoff,
            headers=self.headers, error=HoEError,
        )  # fmt: skip
        try:
            return str(json.loads(answer)["choices"][0]["message"]["content"] or "")
        except (ValueError, KeyError, IndexError, TypeError):
            raise HoEError(
                f"{address} answered {shown(answer)}; expected an OpenAI chat completion",
                argument=address, value=answer,
            ) from None  # fmt: skip


def _as_text(prompt: Any) -> str:
    if isinstance(prompt, str):
        return prompt
    return "\n".join(f"{turn['role']}: {turn['content']}" for turn in prompt)
