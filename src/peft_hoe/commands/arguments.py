"""What several commands do with their arguments."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from typing import Any

from ..errors import HoEError
from ..preference import read_preference
from ..router_recipe import MOST_UPDATES, UPDATES
from ..specs import ExpertSpec

_WEIGHT = r"([^=,]+=)?[-+.\deE]+"  # one of a preference, with or without the objective's name
_EXPERT = re.compile(rf"(?P<preference>{_WEIGHT}(,{_WEIGHT})*)(=(?P<policy>.*))?")


def read_pairs(items: Sequence[str] | None, option: str, form: str) -> dict[str, str]:
    """Options of the form NAME=VALUE, each name once; blanks around a name are not part of it.

    Raises:
        HoEError: an item of another form, or a name twice.
    """
    pairs: dict[str, str] = {}
    for item in items or []:
        name, equals, value = (part.strip() for part in item.partition("="))
        name = name.strip()
        if not (name and equals and value):
            raise HoEError(f"{option} is {item!r}; write {form}", argument=option, value=item, allowed=form)
        if name in pairs:
            raise HoEError(f"{option} names {name!r} twice; give each name once", argument=option, value=name)
        pairs[name] = value
    return pairs


def read_number(text: str, kind: type[int] | type[float]) -> Any:
    """A number where the text is one; else the text, such as "auto", which whoever gets it checks."""
    try:
        return kind(text)
    except ValueError:
        return text


def add_updates(parser: argparse.ArgumentParser, more: str = "") -> None:
    """Declare how long routers train, for `read_updates`."""
    parser.add_argument(
        "--updates",
        default=str(UPDATES),
        metavar="N",
        help=f"of each router{more} (default {UPDATES}); auto ends when the worst gap has stopped falling beyond its error",
    )
    parser.add_argument(
        "--max-updates", type=int, metavar="N", help=f"bound of --updates auto (default {MOST_UPDATES})"
    )


def read_updates(arguments: argparse.Namespace) -> int | str:
    """A number or "auto".

    Raises:
        HoEError: it is neither; or there is a bound, and no "auto".
    """
    updates = read_number(arguments.updates, int)
    if isinstance(updates, str) and updates != "auto":
        raise HoEError(
            f"--updates is {updates!r}; give a number, or auto", argument="--updates", value=updates, allowed=["auto"]
        )
    if arguments.max_updates is not None and updates != "auto":
        raise HoEError(
            f"--max-updates is {arguments.max_updates}, which bounds --updates auto, but --updates is {updates}; leave one of "
            "them out",
            argument="--max-updates",
            value=arguments.max_updates,
        )
    found: int | str = updates
    return found


def add_reports(parser: argparse.ArgumentParser) -> None:
    """Declare where the metrics of training go, for `read_reports`."""
    parser.add_argument(
        "--report-to",
        action="append",
        metavar="NAME",
        help="send the metrics of training there too, such as tensorboard or trackio; may be given several times",
    )


def read_reports(arguments: argparse.Namespace) -> list[str]:
    """The names that were given; "none" is none.

    Raises:
        HoEError: metrics cannot be reported there.
    """
    from ..training.run.reports import check_reports

    names = [name for name in arguments.report_to or [] if name != "none"]
    check_reports(names)
    return names


def add_decoding(parser: argparse.ArgumentParser, length: str = "default 64") -> None:
    """Declare how texts are written, for `read_decoding`."""
    parser.add_argument("--sample", action="store_true", help="sample, which the next three imply; default greedy")
    add_sampling(parser, length)


def add_sampling(parser: argparse.ArgumentParser, length: str = "default 64") -> None:
    """Declare how texts are sampled, for `read_decoding`."""
    add = parser.add_argument
    add("--max-new-tokens", type=int, metavar="N", help=f"length of a completion ({length})")
    add("--temperature", type=float, metavar="T", help="of sampling (default 1)")
    add("--top-k", type=int, metavar="K", help="sample from so many tokens; default all")
    add("--top-p", type=float, metavar="P", help="sample from the tokens of so much probability; default all")
    add_stop(parser)
    add(
        "--chat-template-kwargs",
        metavar="JSON",
        help='arguments of the chat template, such as {"enable_thinking": false}',
    )


def add_stop(parser: argparse.ArgumentParser) -> None:
    """Declare the texts that end a completion, for `read_stop`."""
    parser.add_argument(
        "--stop",
        action="append",
        metavar="TEXT",
        help="a completion ends before it; may be given several times. \\n is the end of a line",
    )


def read_stop(arguments: argparse.Namespace) -> list[str]:
    """The stop strings that were given."""
    return [text.replace("\\n", "\n") for text in arguments.stop or []]


def read_decoding(arguments: argparse.Namespace) -> dict[str, Any]:
    """What `Decoding.of` takes, of what was given."""
    given = {name: getattr(arguments, name) for name in ("max_new_tokens", "temperature", "top_k", "top_p")}
    found = {name: value for name, value in given.items() if value is not None}
    if getattr(arguments, "sample", False) or found.keys() & {"temperature", "top_k", "top_p"}:
        found["do_sample"] = True
    if arguments.stop:
        found["stop_strings"] = read_stop(arguments)
    if arguments.chat_template_kwargs:
        found["chat_template_kwargs"] = arguments.chat_template_kwargs
    return found


def read_expert(text: str) -> ExpertSpec:
    """An expert from `PREFERENCE` or `PREFERENCE=PATH`, the policy that it is made of.

    Raises:
        PreferenceError: it does not begin with a preference.
        HoEError: nothing follows its last `=`.
    """
    match = _EXPERT.fullmatch(text)
    if match is None:
        return ExpertSpec(read_preference(text))  # JSON, or refused there
    if match["policy"] == "":
        raise HoEError(
            f"--expert is {text!r}, with no policy after the last '='; write PREFERENCE=PATH, or PREFERENCE for a merge",
            argument="--expert", value=text, allowed=["PREFERENCE", "PREFERENCE=PATH"],
        )  # fmt: skip
    return ExpertSpec(read_preference(match["preference"]), policy=match["policy"])
