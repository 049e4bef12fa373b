"""What a request asks for: JSON, checked before anything runs. Every field is used or refused by name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ...errors import HoEError, PreferenceError
from ...preference import FloatArray, parse_preference, read_preference
from .sampling import Sampling

MAX_TEXTS = 64  # of one request: prompts times n


class RequestError(HoEError):
    """A request cannot be served as it is.

    Attributes, besides HoEError's:

        status: of the HTTP answer.
    """

    def __init__(self, message: str, *, status: int = 422, **data: Any) -> None:
        super().__init__(message, **data)
        self.status = status


class _Request(BaseModel):
    """What completions and chat have in common."""

    model_config = ConfigDict(extra="forbid", strict=True)

    model: str
    preference: Any = None
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = Field(default=None, ge=-(2**62), le=2**62)
    n: int = Field(default=1, ge=1)
    stop: str | list[str] | None = None
    stream: bool = False
    stream_options: dict[str, bool] | None = None
    user: str | None = None  # OpenAI's clients may send it; it changes no text
    # Known to OpenAI's clients, not to this server: taken where they change nothing.
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    logit_bias: dict[str, float] | None = None


class CompletionRequest(_Request):
    """`POST /v1/completions`."""

    prompt: str | list[str] | list[int] | list[list[int]]
    max_tokens: int | None = Field(default=16, ge=1)
    echo: bool = False
    suffix: str | None = None
    logprobs: int | None = None
    best_of: int | None = None


class ChatRequest(_Request):
    """`POST /v1/chat/completions`."""

    messages: list[dict[str, Any]] = Field(min_length=1)
    max_tokens: int | None = Field(default=None, ge=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = None
    response_format: dict[str, Any] | None = None
    tools: list[Any] | None = None
    tool_choice: Any = None


@dataclass(frozen=True)
class Wanted:
    """A request as the engine needs it.

    Attributes:
        prompts: token ids of every prompt.
        preferences: of every prompt, `(N,)` each.
        choices: texts for each prompt.
        sampling: how tokens are chosen.
        max_new_tokens: of every prompt's texts.
        stop_strings: texts end before the first of them.
        stream: whether texts are sent as they grow.
        usage: whether a stream ends with the numbers of tokens.
    """

    prompts: list[list[int]]
    preferences: list[FloatArray]
    choices: int
    sampling: Sampling
    max_new_tokens: list[int]
    stop_strings: list[str]
    stream: bool
    usage: bool


class RequestReader:
    """Reads requests to one served model.

    Args:
        name: of the model.
        tokenizer: the model's.
        objectives: the N names.
        default: gives the preference in effect when a request brings none.
        max_length: tokens of a prompt and its text together.
        vocabulary: prompts hold tokens below this number.
    """

    def __init__(
        self,
        name: str,
        tokenizer: Any,
        objectives: Sequence[str],
        default: Mapping[str, float],
        max_length: int,
        vocabulary: int,
    ) -> None:
        self.name, self.tokenizer, self.objectives = name, tokenizer, list(objectives)
        self.default, self.max_length, self.vocabulary = dict(default), max_length, vocabulary

    def completion(self, body: Any) -> Wanted:
        """Read a completion.

        Raises:
            RequestError: something in it cannot be used.
        """
        request = _validated(CompletionRequest, body)
        _refuse(request, echo=False, suffix=None, logprobs=None, best_of=None)
        given: Any = request.prompt
        prompts = given if isinstance(given, list) and (not given or not isinstance(given[0], int)) else [given]
        return self._wanted(request, [self._tokens(prompt) for prompt in prompts], request.max_tokens)

    def chat(self, body: Any) -> Wanted:
        """Read a chat.

        Raises:
            RequestError: something in it cannot be used.
        """
        request = _validated(ChatRequest, body)
        _refuse(request, logprobs=(None, False), top_logprobs=(None, 0), tools=(None, []), tool_choice=(None, "none"))
        if request.response_format not in (None, {"type": "text"}):
            raise RequestError("response_format is not supported but as text", argument="response_format")
        if self.tokenizer.chat_template is None:
            raise RequestError("the model's tokenizer has no chat template; use /v1/completions", argument="messages")
        try:
            text = self.tokenizer.apply_chat_template(request.messages, tokenize=False, add_generation_prompt=True)
        except Exception as error:  # templates raise what they like
            raise RequestError(f"the chat template refuses the messages: {error}", argument="messages") from None
        ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return self._wanted(
            request, [self._checked(ids, "messages")], request.max_completion_tokens or request.max_tokens
        )

    def _wanted(self, request: _Request, prompts: list[list[int]], length: int | None) -> Wanted:
        _refuse(request, frequency_penalty=0, presence_penalty=0, logit_bias=(None, {}))
        if not 1 <= len(prompts) * request.n <= MAX_TEXTS:
            raise RequestError(
                f"{len(prompts)} prompts with n={request.n} are {len(prompts) * request.n} texts; a request may ask for 1 to "
                f"{MAX_TEXTS}",
                argument="n",
            )
        stop = [request.stop] if isinstance(request.stop, str) else request.stop or []
        if len(stop) > 16 or not all(stop):
            raise RequestError("stop must be at most 16 texts that are not empty", argument="stop", value=request.stop)
        try:
            sampling = Sampling(request.temperature, request.top_k, request.top_p, request.seed)
        except HoEError as error:
            raise RequestError(str(error), argument=error.argument) from None
        return Wanted(
            prompts=prompts,
            preferences=self._preferences(request, len(prompts)),
            choices=request.n,
            sampling=sampling,
            max_new_tokens=[self._length(len(ids), length) for ids in prompts],
            stop_strings=stop,
            stream=request.stream,
            usage=bool((request.stream_options or {}).get("include_usage")),
        )

    def _preferences(self, request: _Request, count: int) -> list[FloatArray]:
        """One preference for each prompt."""
        name, at, spelled = request.model.partition("@")
        if name != self.name:
            raise RequestError(
                f"there is no model {request.model!r}; this server has {self.name!r}, also with a preference as "
                f"'{self.name}@{','.join(f'{objective}=...' for objective in self.objectives)}'",
                status=404,
                argument="model",
                value=request.model,
            )
        if at and request.preference is not None:
            raise RequestError(
                "the model's name and `preference` both give a preference; give one", argument="preference"
            )
        try:
            given = read_preference(spelled) if at else request.preference
            given = read_preference(given) if isinstance(given, str) else given
            point = parse_preference(self.default if given is None else given, self.objectives, rows=True)
        except PreferenceError as error:
            raise RequestError(str(error), argument="preference", value=error.value) from None
        if point.ndim == 1:
            return [point] * count
        if len(point) != count:
            raise RequestError(
                f"preference has {len(point)} rows for {count} prompts; give one for each prompt, or one for all",
                argument="preference",
            )
        return list(point)

    def _tokens(self, prompt: str | list[int]) -> list[int]:
        if isinstance(prompt, str):
            ids: list[int] = self.tokenizer(prompt)["input_ids"]
            start = self.tokenizer.bos_token_id
            ids = ids or ([] if start is None else [start])
        else:
            ids = prompt
        if not ids:
            raise RequestError("the prompt has no token", argument="prompt", value=prompt)
        return self._checked(ids, "prompt")

    def _checked(self, ids: list[int], argument: str) -> list[int]:
        if not all(0 <= token < self.vocabulary for token in ids):
            raise RequestError(
                f"{argument}: there are tokens outside the vocabulary of {self.vocabulary}", argument=argument
            )
        return ids

    def _length(self, prompt: int, wanted: int | None) -> int:
        left = self.max_length - prompt
        if left < 1 or (wanted is not None and wanted > left):
            raise RequestError(
                f"the prompt has {prompt} tokens and max_tokens is {wanted}, but both together may be {self.max_length}",
                argument="max_tokens",
                value=wanted,
                allowed=f"at most {max(left, 0)}",
            )
        return left if wanted is None else wanted


def _validated(kind: Any, body: Any) -> Any:
    try:
        return kind.model_validate(body)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"] if not isinstance(part, int) or len(first["loc"]) < 3)
        raise RequestError(f"{where or 'the body'}: {first['msg']}", argument=where or None) from None


def _refuse(request: _Request, **harmless: Any) -> None:
    """Refuse fields that this server does not have, unless they say nothing."""
    for name, allowed in harmless.items():
        value = getattr(request, name)
        if value not in (allowed if isinstance(allowed, tuple) else (allowed,)):
            raise RequestError(
                f"{name} is {value!r}, but this server has no {name}; leave it out", argument=name, value=value
            )
