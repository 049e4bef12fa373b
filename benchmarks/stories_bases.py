"""The two bases of stories: how prompts end, where texts stop, and openings that no choice has read."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from figures_setting import Setting

FURTHER = 840  # openings besides the 120 of a split


@dataclass(frozen=True)
class StoriesBase:
    """How a base is used.

    Attributes:
        name: of its folder in `DIR/models`, and of its policies.
        ending: of every prompt, for a base whose tokens hold the blank that follows a word.
        stop_strings: where texts end besides at the stop tokens.
    """

    name: str
    ending: str = ""
    stop_strings: tuple[str, ...] = ()

    def until_its_end(self, text: str) -> str:
        """A text up to where it stops."""
        for stop in self.stop_strings:
            text = text.split(stop)[0]
        return text


BASES = {
    base.name: base for base in (StoriesBase("stories260k"), StoriesBase("tinystories-656k", " ", ("<|end_story|>",)))
}  # fmt: skip
OWN_POLICIES = ("stories260k",)  # bases whose policies lie in `DIR/models/policies`


class StoriesSetting(Setting):
    """One set of objectives on one of these bases; 840 openings join the validation prompts, and 840 others the test prompts.

    Args:
        shared: folder with models/ and data/.
        output: directory for everything that is kept.
        objectives: names of rewards; each needs a policy.
        policies: folder with further policies.
        limit: use the first prompts and the first openings only.
        base: one of `BASES`.
    """

    def __init__(
        self, shared: Path, output: Path, objectives: Sequence[str], policies: Path | None, limit: int | None, base: str
    ) -> None:
        self.stories = BASES[base]
        super().__init__(
            shared, output, objectives, policies, limit,
            base=base, ending=self.stories.ending, stop_strings=self.stories.stop_strings,
        )  # fmt: skip
        scale, fronts = ([text + self.stories.ending for text in texts[:limit]] for texts in further_openings())
        self.validation = [*self.validation, *scale]
        self.openings = [*self.test, *fronts]


def further_openings() -> tuple[list[str], list[str]]:
    """Openings that no choice has read, for the payoff table and for the fronts; none is in both.

    They are the prompts' own sentences with other names, animals, places and things.
    """
    names = "Ruby Oscar Ivy Hugo Nora Felix Clara Emil Rosa Arlo Daisy Otto Greta Paul Lena Theo Alma Carl Edith Noah".split()
    animals = "fox goat owl pony mouse bear hen wolf turtle squirrel lamb crow".split()
    places = "hill garden lake barn street castle river shop field pond tower library".split()
    things = "lamp drum shell ladder basket spoon bell rope crown blanket candle bucket".split()
    moods = "quiet proud hungry gentle curious tired lonely clever calm nervous merry lazy".split()
    sentences = (
        "Once upon a time, there was a {mood} {animal} named {name}. {name} went to the {place}",
        "There was a {mood} {animal} who lived near the {place}.",
        "One day, {name} found a {mood} {thing} in the {place}.",
        "{name} wanted a new {thing}, but",
        "{name} and {other} were playing in the {place}.",
        "It was a {mood} day at the {place}. {name}",
        "{name} lost the {thing} at the {place} and",
        'In the {place}, a {mood} {animal} saw a {thing}. "Look at that {thing}!" said {name}.',
    )
    generator = np.random.default_rng(656)

    def one(sentence: str) -> str:
        name, other = generator.choice(names, 2, replace=False)
        drawn = {key: generator.choice(of) for key, of in
                 (("animal", animals), ("place", places), ("thing", things), ("mood", moods))}  # fmt: skip
        return sentence.format(name=name, other=other, **drawn)

    found: dict[str, None] = {}
    for sentence in itertools.cycle(sentences):
        found.setdefault(one(sentence))
        if len(found) == 2 * FURTHER:
            break
    texts = list(found)
    return texts[:FURTHER], texts[FURTHER:]
