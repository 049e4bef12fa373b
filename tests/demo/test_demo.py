"""`peft-hoe demo` in-process on the embedded models, and its rewards, pictures and errors."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from peft_hoe.cli import main
from peft_hoe.demo import drawing, embedded
from peft_hoe.demo.rewards import cheerful, vivid
from peft_hoe.demo.steering import shown_preferences


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output directory of a run on a few prompts."""
    folder = tmp_path_factory.mktemp("demo")
    prompts = folder / "prompts.json"
    prompts.write_text(json.dumps(embedded.load_prompts()[:8]))
    assert main(["demo", "--output", str(folder / "out"), "--prompts", str(prompts), "--preference", "vivid=1"]) == 0
    return folder / "out"


@pytest.mark.slow
def test_five_texts_and_the_extra_one(demo: Path) -> None:
    texts = json.loads((demo / "front.json").read_text())["texts"]
    assert [entry["preference"] for entry in texts[:5]] == [[1, 0], [0.75, 0.25], [0.5, 0.5], [0.25, 0.75], [0, 1]]
    assert texts[5] == texts[4]
    assert len({entry["text"] for entry in texts}) >= 3


def test_front_has_eleven_rows_and_ordered_corners(demo: Path) -> None:
    front = json.loads((demo / "front.json").read_text())
    rewards = np.asarray(front["rewards"])
    assert rewards.shape == (11, 2)
    assert rewards[10, 0] > rewards[0, 0] + 1
    assert rewards[0, 1] > rewards[10, 1] + 1
    references = front["references"]
    assert list(references) == ["base", "policy cheerful", "policy vivid"]
    for i, name in enumerate(references, start=-1):
        if name == "base":
            continue
        corner, base, policy = rewards[10 - 10 * i, i], references["base"][i], references[name][i]
        assert corner >= base + 0.5 * (policy - base)


def test_picture_is_a_png(demo: Path) -> None:
    assert (demo / "front.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")


def test_adapter_loads_as_the_demo_says(demo: Path) -> None:
    import peft

    model = peft.AutoPeftModelForCausalLM.from_pretrained(str(demo / "adapter"))
    ids = torch.tensor([[1, 5, 6]])
    assert not torch.equal(model(ids, preference=[1, 0]).logits, model(ids, preference=[0, 1]).logits)


def test_prints_where_things_are_and_how_to_load(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Also: two lines of text as prompts, and few tokens."""
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("One day, Mia the fox went to the forest.\n\nTom the bear wanted a hat.\n")
    out = tmp_path / "out"
    threads = torch.get_num_threads()
    assert main(["demo", "--output", str(out), "--prompts", str(prompts), "--max-new-tokens", "4", "--rank", "2"]) == 0
    printed = capsys.readouterr().out
    assert f"from_pretrained({str(out / 'adapter')!r})" in printed
    assert "import peft, peft_hoe" in printed
    assert str(out / "front.png") in printed
    assert torch.get_num_threads() == threads


@pytest.mark.slow
def test_own_models_without_rewards_show_texts_only(tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("One day, Mia the fox went to the forest.\n")
    policies = [f"--policy={name}={folder}" for name, folder in embedded.POLICIES.items()]
    arguments = ["demo", "--base", embedded.BASE, *policies, "--prompts", str(prompts), "--max-new-tokens", "4"]
    assert main([*arguments, "--output", str(tmp_path / "out")]) == 0
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["adapter"]
    rewards = [f"--reward={name}=peft_hoe.demo.rewards:{name}" for name in ("cheerful", "vivid")]
    assert main([*arguments, *rewards, "--output", str(tmp_path / "out")]) == 0
    assert (tmp_path / "out" / "front.json").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--base", "b"], "at least two --policy"),
        (["--policy", "a=x", "--policy", "b=y"], "need --base"),
        (["--policy", "a=x", "--policy", "a=y"], "names 'a' twice"),
        (["--base", "b", "--policy", "a=x", "--policy", "b=y"], "need --prompts"),
        (["--reward", "a=m:f"], "--reward needs --base"),
        (["--prompts", "missing.txt"], "cannot read the prompts"),
        (["--max-new-tokens", "0"], "at least 1"),
        (["--preference", "0.7,0.7"], "sums to 1.4"),
        (["--rank", "0"], "r is 0"),
    ],
)
def test_errors_are_one_line(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_the_demo_continues_texts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prompts = tmp_path / "prompts.json"
    prompts.write_text('["a", {"prompt": [{"role": "user", "content": "b"}]}]')
    assert main(["demo", "--prompts", str(prompts)]) == 2
    assert "holds the prompt [{'role': 'user', 'content': 'b'}]" in capsys.readouterr().err


def test_reward_that_cannot_be_loaded_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prompts = tmp_path / "prompts.json"
    prompts.write_text('["a"]')
    own = ["--base", "b", "--policy", "a=x", "--policy", "b=y", "--prompts", str(prompts)]
    assert main(["demo", *own, "--reward", "a=math:nothing", "--reward", "b=math:pi"]) == 2
    assert "'math:nothing'" in capsys.readouterr().err
    assert main(["demo", *own, "--reward", "a=math:pi"]) == 2
    assert "names must match" in capsys.readouterr().err


def test_rewards_count_different_words() -> None:
    texts = ["Mia sang. Mia sang and smiled.", "The merry bear cried.", "", "Red, RED and golden light!"]
    assert cheerful([""] * 4, texts) == [2, 0, 0, 0]
    assert vivid([""] * 4, texts) == [0, 0, 0, 3]


@pytest.mark.parametrize(("n", "rows"), [(2, 5), (3, 5), (4, 5), (5, 6)])
def test_shown_preferences_are_points_of_the_simplex(n: int, rows: int) -> None:
    shown = shown_preferences(n)
    assert shown.shape == (rows, n)
    np.testing.assert_allclose(shown.sum(1), 1)


def test_text_front_places_every_mark(make_sweep: Any) -> None:
    preferences = [[i / 10, 1 - i / 10] for i in range(11)]
    front = make_sweep([[float(i), 10.0 - i] for i in range(11)], preferences=preferences)
    points = {"base": [0.0, 0.0], "policy a": [10.0, 0.0], "policy b": [0.0, 10.0]}
    alone = [make_sweep([point], name=name, preferences=[[0.5, 0.5]]) for name, point in points.items()]
    drawn = drawing.draw_text(front, alone, 0, 1)
    plane = drawn.split("+")[0]
    assert all(mark in plane for mark in "0123456789XABC")
    first, last = plane.splitlines()[1], plane.splitlines()[-2]
    assert first.split("|")[1].startswith("C")
    assert last.split("|")[1].startswith("A")
    assert drawn.endswith("A base, B policy a, C policy b")


def test_table_rounds_preferences(make_sweep: Any) -> None:
    front = make_sweep([[1.0, 2.0]], preferences=[[0.1 + 0.2, 0.7]])
    assert drawing.table(front, []).splitlines()[1].split() == ["0.3,", "0.7", "1.000", "2.000"]


def test_pairs_of_three_objectives(make_sweep: Any) -> None:
    assert list(drawing.pairs(make_sweep(np.eye(3)))) == [(0, 1), (0, 2), (1, 2)]


@pytest.mark.slow
def test_it_needs_no_extra(tmp_path: Path) -> None:
    """All but the picture, in a process where moocore, matplotlib, trl and datasets cannot be imported."""
    (tmp_path / "prompts.txt").write_text("One day, Mia the fox went to the forest.\n")
    code = (
        "import sys; sys.modules.update(dict.fromkeys(['moocore', 'matplotlib', 'evaluate', 'trl', 'datasets']));"
        "from peft_hoe.cli import main; sys.exit(main(sys.argv[1:]))"
    )
    command = ["demo", "--output", "out", "--prompts", "prompts.txt", "--max-new-tokens", "4"]
    found = subprocess.run(
        [sys.executable, "-c", code, *command], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert found.returncode == 0, found.stderr
    assert 'A picture of the front needs pip install "peft-hoe[eval]".' in found.stdout
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["adapter", "front.json"]
    assert found.stderr == ""  # no library's warnings, no bars
