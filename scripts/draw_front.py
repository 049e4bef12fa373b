"""Draw README's picture: the front of one adapter, and what it writes at three preferences.

    python scripts/draw_front.py                # writes docs/front.png; needs pip install "peft-hoe[eval]"

Everything in it comes from the models that the package brings.
"""

from __future__ import annotations

import argparse
import textwrap
from pathlib import Path

from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure

import peft_hoe
from peft_hoe import demo
from peft_hoe.demo.rewards import CHEERFUL, GLOOMY, VIVID

PICTURE = Path(__file__).resolve().parents[1] / "docs" / "front.png"
PROMPT = "Mia the dog wanted a kite."
SHOWN = [[1.0, 0.0], [0.5, 0.5], [0.0, 1.0]]
WARM, COOL, INK, FAINT = "#D55E00", "#0072B2", "#222222", "#767676"
COLUMNS, LINE = 62, 17.0  # characters in a line of text; points from one line to the next
CHARACTER = 0.602 * 9.5  # width of DejaVu Sans Mono at 9.5 points


def write(model, tokenizer) -> list[str]:
    """Whole sentences at each of the three preferences."""
    batch = tokenizer([PROMPT] * len(SHOWN), return_tensors="pt")
    ids = model.generate(**batch, preference=SHOWN, max_new_tokens=36, do_sample=False)
    texts = tokenizer.batch_decode(ids[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    return [text.rpartition(".")[0] + "." for text in texts]


def draw(found: peft_hoe.Sweep, texts: list[str]) -> Figure:
    """The front on the left, the texts on the right; a number names the point that wrote a text."""
    figure = Figure(figsize=(10.4, 4.2), dpi=110)
    colours = LinearSegmentedColormap.from_list("preference", [COOL, "#8a6a8a", WARM])
    front = figure.add_axes((0.06, 0.135, 0.36, 0.765))
    front.plot(*found.points.T, color="#bbbbbb", linewidth=1.5, zorder=1)
    front.scatter(*found.points.T, c=found.preferences[:, 0], cmap=colours, s=70, edgecolor="white", zorder=2)
    for number, wanted in enumerate(SHOWN, start=1):
        spot = found.points[[row.tolist() == wanted for row in found.preferences.round(9)].index(True)]
        front.annotate(
            str(number), spot, (-15, -11), textcoords="offset points", fontsize=11, fontweight="bold", color=INK
        )
    front.set_xlabel("cheerful words less gloomy ones, mean of a text", color=WARM)
    front.set_ylabel("vivid words, mean of a text", color=COOL)
    front.set_title(f"One adapter at {len(found.preferences)} preferences", fontsize=11, color=INK)
    front.margins(0.12)
    front.grid(alpha=0.25)
    front.spines[["top", "right"]].set_visible(False)
    page = figure.add_axes((0.46, 0.0, 0.54, 1.0), xlim=(0, 404), ylim=(302, 0))
    page.axis("off")
    top = 36.0
    page.text(0, top - 10, f"“{PROMPT} ...”", fontsize=9.5, family="monospace", color=FAINT)
    for number, (preference, text) in enumerate(zip(SHOWN, texts, strict=True), start=1):
        top += 20
        label = " + ".join(
            f"{weight:.0%} {name}" for weight, name in zip(preference, found.objectives, strict=True) if weight
        )
        page.text(0, top, f"{number}   {label}", fontsize=10.5, fontweight="bold", color=colours(preference[0]))
        for line in textwrap.wrap(text, COLUMNS):
            top += LINE
            column = 0
            for word in line.split(" "):
                page.text(22 + column * CHARACTER, top, word, fontsize=9.5, family="monospace", color=colour_of(word))
                column += len(word) + 1
        top += 12
    return figure


def colour_of(word: str) -> str:
    """Words that a reward counts have its colour."""
    bare = word.strip(".").lower()
    return WARM if bare in CHEERFUL | GLOOMY else COOL if bare in VIVID else INK


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=PICTURE)
    parser.add_argument("--prompts", type=int, default=40, help="how many the front is measured on (default 40)")
    arguments = parser.parse_args()
    model, tokenizer = demo.load_demo_adapter(), demo.load_tokenizer()
    prompts = demo.load_prompts()[: arguments.prompts]
    found = peft_hoe.sweep(model, tokenizer, prompts, demo.REWARDS, decoding=peft_hoe.Decoding(48), progress=False)
    draw(found, write(model, tokenizer)).savefig(arguments.output)
    print(f"{arguments.output}: {arguments.output.stat().st_size / 1024:.0f} KiB")


if __name__ == "__main__":
    main()
