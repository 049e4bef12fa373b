"""JSON to a server and back, with patience. Standard library only."""

from __future__ import annotations

import http.client
import time
import urllib.error
import urllib.request
from collections.abc import Mapping

from ..errors import HoEError, RewardError

_SHOWN = 200  # characters of an answer that an error repeats


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
        HoEError: of the class `error`; no answer, or an HTTP error.
    """
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
            if failure.code != 429 and failure.code < 500:
                raise error(f"{url} {problem}; check the URL and what the server expects") from None
        except (OSError, http.client.HTTPException) as failure:  # URLError, TimeoutError, broken connections
            reason = getattr(failure, "reason", failure)
            timed_out = isinstance(reason, TimeoutError)
            problem = f"gave no answer within {timeout:g} s" if timed_out else f"cannot be reached: {reason}"
    raise error(f"{url} {problem} ({retries + 1} attempts); check that the server runs, or raise timeout= or retries=")


def shown(body: bytes) -> str:
    """The beginning of an answer, for errors."""
    text = body[:_SHOWN].decode(errors="replace")
    return repr(text) + ("..." if len(body) > _SHOWN else "")
