"""The text that the embedded models learn from: little stories drawn from a grammar written for this project."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence

SEED = 0

NAMES = "Mia Tom Ada Ben Lia Sam Eva Max Zoe Finn".split()
NOUNS = {
    "animal": "fox bear mouse rabbit goat cat dog frog".split(),
    "place": "forest garden river hill village meadow market lake".split(),
    "thing": "ball hat stone leaf basket lamp boat kite bell box".split(),
}
WORDS = {  # slot: {kind: words}
    "quality": {
        "plain": "round new small big young quiet".split(),
        "cheerful": "happy merry jolly glad".split(),
        "gloomy": "sad lonely grumpy weary".split(),
    },
    "look": {
        "plain": [""],
        "vivid": "red golden blue green silver purple shiny fluffy crunchy velvet".split(),
    },
    "action": {
        "plain": "walked waited stopped rested looked listened".split(),
        "cheerful": "smiled laughed sang danced giggled cheered".split(),
        "gloomy": "cried sighed wept groaned".split(),
    },
    "scenery": {
        "plain": "moved changed".split(),
        "vivid": "sparkled glowed shimmered blazed rustled hummed".split(),
    },
    "feeling": {
        "plain": "food water".split(),
        "cheerful": "joy fun".split(),
        "gloomy": "sorrow trouble".split(),
        "vivid": "light thunder".split(),
    },
}
OPENINGS = [
    "One day, {name} the {animal} went to the [place].",
    "Once there was a {animal} named {name} who lived near the [place].",
    "{name} the {animal} wanted a [thing].",
]
SENTENCES = [  # [noun] takes adjectives
    "{name} saw a [thing].",
    "{name} found a [thing] near the [place].",
    "{name} {action}.",
    "{name} {action} and {action}.",
    "The [thing] {scenery}.",
    "The [place] {scenery} and {scenery}.",
    "Then {name} met a [animal].",
    "{name} and the [animal] {action} together.",
    "It was a [place] full of {feeling}.",
    "{name} gave the [thing] to the [animal].",
]


def draw(rng: random.Random, mood: dict[str, float], slot: str) -> str:
    """One word: first its kind by the mood of the story, then a word of that kind."""
    kinds = WORDS[slot]
    return rng.choice(kinds[rng.choices(list(kinds), [mood[kind] for kind in kinds])[0]])


def noun(rng: random.Random, mood: dict[str, float], word: str) -> str:
    """The noun, often with a quality, sometimes with a look."""
    quality = draw(rng, mood, "quality") if rng.random() < 0.6 else ""
    return " ".join(part for part in (quality, draw(rng, mood, "look"), word) if part)


def any_mood(rng: random.Random) -> dict[str, float]:
    """How likely each kind of word is in one story."""
    return {"plain": 5.0, **{kind: rng.choice([0.1, 1.0, 12.0]) for kind in ("cheerful", "gloomy", "vivid")}}


def story(rng: random.Random, mood: dict[str, float]) -> list[str]:
    """Five to eight sentences about somebody with a name."""
    name = rng.choice(NAMES)

    def fill(match: re.Match[str]) -> str:
        slot = match[0][1:-1]
        if slot in WORDS:
            return draw(rng, mood, slot)
        word = name if slot == "name" else rng.choice(NOUNS[slot])
        return noun(rng, mood, word) if match[0].startswith("[") else word

    templates = [rng.choice(OPENINGS), *rng.sample(SENTENCES, rng.randint(4, 7))]
    return [re.sub(r"\{\w+\}|\[\w+\]", fill, template) for template in templates]


def openings(count: int, seed: int, without: Sequence[str] = ()) -> list[str]:
    """The first two sentences of `count` stories in any mood, all different and none of those in `without`."""
    rng = random.Random(seed)
    found: dict[str, None] = {}
    while len(found) < count:
        text = " ".join(story(rng, any_mood(rng))[:2])
        if text not in without:
            found[text] = None
    return list(found)


def held_out() -> list[str]:
    """The openings that policies are measured on and not trained on."""
    return openings(40, SEED + 2)
