"""A reward behind a URL: batches of JSON there, numbers back. Standard library only."""

from __future__ import annotations

import http.client
import json
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..errors import HoEError, RewardError

_SHOWN = 200  # characters of an answer that an error repeats


@dataclass
class URLReward:
    """Posts `{"prompts": [...], "completions": [...], "columns": {...}}` and reads `{"rewards": [...]}`, or the bare list.

    The answer holds one number or null for each completion, in order, or a list of numbers where it covers several objectives.

    Args:
        url: http or https.
        timeout: seconds that the server may stay silent, while connecting or answering.
        retries: how often a batch is sent again after a timeout, a broken connection, or status 429 or 5xx.
        batch_size: completions in one request.
        backoff: seconds before the first retry; doubled before each further one.
        columns: which of the data set's other columns are sent; None for all.
        headers: more HTTP headers, such as an authorisation.

    Raises:
        RewardError: the URL is not http, or an option is out of range.

    >>> from peft_hoe.rewards import URLReward
    >>> URLReward("http://127.0.0.1:8000/score", timeout=5.0, columns=["answer"]).batch_size
    64
    """

    url: str
    timeout: float = 30.0
    retries: int = 2
    batch_size: int = 64
    backoff: float = 0.5
    columns: Sequence[str] | None = None
    headers: Mapping[str, str] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        if not self.url.startswith(("http://", "https://")):
            raise RewardError(
                f"the reward URL {self.url!r} must begin with http:// or https://", argument="url", value=self.url
            )
        wrong = {
            "timeout": self.timeout <= 0, "batch_size": self.batch_size < 1, "retries": self.retries < 0,
            "backoff": self.backoff < 0,
        }  # fmt: skip
        if any(wrong.values()):
            name = next(name for name, is_wrong in wrong.items() if is_wrong)
            raise RewardError(
                f"timeout is {self.timeout}, batch_size {self.batch_size}, retries {self.retries}, backoff {self.backoff}; "
                "timeout and batch_size must be above 0, the others at least 0",
                argument=name, value=getattr(self, name),
                allowed="above 0" if name in ("timeout", "batch_size") else "at least 0",
            )  # fmt: skip

    def __call__(self, prompts: Sequence[Any], completions: Sequence[str], **columns: Sequence[Any]) -> list[Any]:
        """Rewards of B completions, a list of B.

        Raises:
            RewardError: no answer, an HTTP error, or an answer of another form.
        """
        wanted = columns if self.columns is None else {name: columns[name] for name in self.columns if name in columns}
        rewards: list[Any] = []
        for start in range(0, len(completions), self.batch_size):
            rows = slice(start, start + self.batch_size)
            batch = {
                "prompts": list(prompts[rows]),
                "completions": list(completions[rows]),
                "columns": {name: list(column[rows]) for name, column in wanted.items()},
            }
            rewards += _read_answer(self._post(self._encode(batch)), len(batch["completions"]), self.url)
        return rewards

    def _encode(self, batch: dict[str, Any]) -> bytes:
        try:
            return json.dumps(batch).encode()
        except (TypeError, ValueError) as error:
            raise RewardError(
                f"the columns {list(batch['columns'])} cannot all be written as JSON for {self.url} ({error}); say which to "
                "send with URLReward(columns=[...])",
                argument="columns",
                value=list(batch["columns"]),
            ) from None

    def _post(self, body: bytes) -> bytes:
        """The answer's body; tries again where that may help."""
        return post(
            self.url, body, timeout=self.timeout, retries=self.retries, backoff=self.backoff, headers=self.headers
        )


def _read_answer(body: bytes, count: int, url: str) -> list[Any]:
    expected = f'expected {{"rewards": [...]}} with {count} numbers or nulls, one for each completion'
    try:
        answer = json.loads(body)
    except ValueError:
        raise RewardError(
            f"{url} answered {shown(body)}, which is not JSON; {expected}", argument=url, value=body
        ) from None
    rewards = answer.get("rewards") if isinstance(answer, dict) else answer
    if not isinstance(rewards, list):
        raise RewardError(f"{url} answered {shown(body)}; {expected}", argument=url, value=body)
    if len(rewards) != count:
        raise RewardError(f"{url} answered with {len(rewards)} rewards; {expected}", argument=url, value=len(rewards))
    return rewards


def post(
    url: str,
    body: bytes,
    *,
    timeout: float,
    retries: int,
    backoff: float,
    headers: Mapping[str, str],
    error: type[HoEError] = RewardError,
) -> bytes:
    """The body of the answer to a POST.

    Args:
        url: http or https.
        body: JSON.
        timeout: seconds that the server may stay silent, while connecting or answering.
        retries: how often it is sent again after a timeout, a broken connection, or status 429 or 5xx.
        backoff: seconds before the first retry; doubled before each further one.
        headers: more HTTP headers.
        error: what to raise.

    Raises:
        HoEError: of the class `error`; no answer, or an HTTP error. Its `argument` is the URL, its `value` the HTTP status of
            the last answer, or None where there was none.
    """
    status: int | None = None
    everything = {"Content-Type": "application/json", **headers}
    for attempt in range(retries + 1):
        if attempt:
            time.sleep(backoff * 2 ** (attempt - 1))
        try:
            request = urllib.request.Request(url, data=body, headers=everything, method="POST")
            with urllib.request.urlopen(request, timeout=timeout) as answer:
                content: bytes = answer.read()
            return content
        except urllib.error.HTTPError as failure:
            with failure:
                problem = f"answered with HTTP {failure.code} {failure.reason}: {shown(failure.read(_SHOWN))}"
            status = failure.code
            if status != 429 and status < 500:
                raise error(
                    f"{url} {problem}; check the URL and what the server expects", argument=url, value=status
                ) from None
        except (OSError, http.client.HTTPException) as failure:  # URLError, TimeoutError, broken connections
            reason = getattr(failure, "reason", failure)
            timed_out = isinstance(reason, TimeoutError)
            status = None
            problem = f"gave no answer within {timeout:g} s" if timed_out else f"cannot be reached: {reason}"
    raise error(
        f"{url} {problem} ({retries + 1} attempts); check that the server runs, or raise timeout= or retries=",
        argument=url,
        value=status,
    )


def shown(body: bytes) -> str:
    """The beginning of an answer, for errors."""
    text = body[:_SHOWN].decode(errors="replace")
    return repr(text) + ("..." if len(body) > _SHOWN else "")
