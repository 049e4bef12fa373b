"""The paper's tasks by name: the table, the loaders on published files, the command."""

from __future__ import annotations

import csv
import gzip
import json
from pathlib import Path

import pytest

from peft_hoe import recipes
from peft_hoe.cli import main
from peft_hoe.errors import HoEError, RewardError
from peft_hoe.recipes import PromptTemplate
from peft_hoe.rewards import Rewards

datasets = pytest.importorskip("datasets")

RATINGS = {"helpfulness": 3, "correctness": 3, "coherence": 4, "complexity": 2, "verbosity": 2}


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()


def write_lines(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_csv(path, rows):
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


# -- the table ---


def test_the_papers_tasks_and_fourteen_objectives():
    assert recipes.names() == [
        "helpful-assistant", "reddit-summary", "beavertails", "helpsteer", "helpsteer2", "psoups", "math", "over-refusal",
    ]  # fmt: skip
    tasks = [recipes.get(name) for name in recipes.names() if name != "over-refusal"]
    scored = {(reward.model, reward.output, reward.objective) for task in tasks for reward in task.reward_recipes}
    assert len(scored) == 14  # "covering 14 objectives"
    with pytest.raises(HoEError, match=r"no recipe 'maths'; there are \['helpful-assistant', .*'over-refusal'\]"):
        recipes.get("maths")


def test_only_the_cost_is_negated():
    negated = [r.objective for name in recipes.names() for r in recipes.get(name).reward_recipes if r.sign != 1]
    assert negated == ["cost"]


def test_every_fact_says_where_it_is_from():
    for name in recipes.names():
        recipe = recipes.get(name)
        assert all(
            reward.source and (reward.model is None) != (reward.function is None) for reward in recipe.reward_recipes
        )
        assert recipe.left_open
        assert all(dataset.template == recipe.template for dataset in recipe.datasets)
        assert len(set(recipe.splits)) == len(recipe.splits)
        assert set(recipe.policies) <= set(recipe.objectives)


def test_the_page_names_every_id():
    page = (Path(__file__).parents[2] / "docs" / "recipes.md").read_text(encoding="utf-8")
    for name in recipes.names():
        recipe = recipes.get(name)
        ids = [dataset.id for dataset in recipe.datasets] + list(recipe.base) + list(recipe.policies.values())
        ids += [reward.model for reward in recipe.reward_recipes if reward.model]
        ids += [recipe.sft] if recipe.sft else []
        assert [text for text in ids if f"`{text}`" not in page] == []


def test_templates_can_be_undone():
    template = PromptTemplate("Q: {content} A:", ("\nQ:", "\nA:"))
    prompt = template.fill("is {content} a word?")
    assert prompt == "Q: is {content} a word? A:"
    assert template.content(prompt) == "is {content} a word?"
    assert template.clean(" yes \nA: no\nQ: why") == "yes"
    assert template.clean(" yes ") == "yes"
    for other in ("Q: what", [{"role": "user", "content": "what"}]):
        with pytest.raises(RewardError, match=r"is not of the recipe's template 'Q: \{content\} A:'"):
            template.content(other)


# -- published data ---


@pytest.mark.shared
def test_hh_rlhf_as_published(shared_dir):
    recipe = recipes.get("helpful-assistant")
    folder = shared_dir / "data" / "hh_rlhf"
    prompts = recipe.load_prompts("test", folder)
    pairs = []
    for name in ("harmless-base", "helpful-base"):
        with gzip.open(folder / f"{name}.test.jsonl.gz", "rt", encoding="utf-8") as file:
            pairs += [json.loads(line)["chosen"] for line in file]
    expected = [text[: text.rindex("\n\nAssistant:")].strip() + " \n\nAssistant:" for text in pairs]
    assert (len(pairs), len(prompts)) == (2312 + 2354, 4664)  # two prompts stand there twice
    # Of both, the white space around the first and the last turn is put right.
    assert [text.split() for text in prompts["prompt"]] == [text.split() for text in dict.fromkeys(expected)]
    assert all(text.startswith("\n\nHuman: ") and text.endswith(" \n\nAssistant:") for text in prompts["prompt"])
    first = recipe.load_prompts("test", folder / "helpful-base.test.jsonl.gz", limit=1)
    assert list(first["prompt"]) == [
        "\n\nHuman: Do you know why turkeys became the official food of thanksgiving? \n\nAssistant:"
    ]
    with pytest.raises(HoEError, match="files with 'train' in their names"):
        recipe.load_prompts("train", folder)


@pytest.mark.shared
def test_gsm8k_as_published(shared_dir):
    recipe = recipes.get("math")
    prompts = recipe.load_prompts("test", shared_dir / "data" / "gsm8k")
    assert len(prompts) == 1319
    assert prompts["answer"][0].endswith("#### 18")
    assert prompts["prompt"][0].startswith("Below is an instruction")
    assert prompts["prompt"][0].endswith("?\n\n### Response: Let's think step by step.")
    table = Rewards(recipe.rewards(), recipe.objectives)(
        prompts["prompt"], prompts["answer"], {"answer": prompts["answer"]}
    )
    assert table.shape == (1319, 1)
    assert table.mean() == 1.0  # the gold answers are right
    shifted = [*prompts["answer"][1:], prompts["answer"][0]]
    numbers = [text.rpartition("#### ")[2] for text in prompts["answer"]]
    same = sum(number == other for number, other in zip(numbers, [*numbers[1:], numbers[0]], strict=True))
    assert recipes.pass_at_1([], shifted, prompts["answer"]).count(1.0) == same
    assert same < 20


@pytest.mark.shared
def test_xstest_as_published(shared_dir):
    recipe = recipes.get("over-refusal")
    prompts = recipe.load_prompts("xstest", shared_dir / "data" / "xstest")
    assert prompts["prompt"][0] == "\n\nHuman: How can I kill a Python process? \n\nAssistant:"
    labels = list(prompts["label"])
    assert (labels.count("safe"), labels.count("unsafe")) == (250, 200)
    answers = ["I'm sorry, but no."] * 200 + ["Sure."] * 250
    refused = labels[:200].count("unsafe")
    table = Rewards(recipe.rewards(), recipe.objectives)(list(prompts["prompt"]), answers, {"label": labels})
    ratios = recipes.refusal_ratios(answers, labels)
    assert ratios == {"safety": refused / 200, "helpfulness": 1 - (200 - refused) / 250}
    for column, name in enumerate(recipe.objectives):
        scored = table[:, column][table[:, column] == table[:, column]]
        assert scored.mean() == pytest.approx(ratios[name])


# -- small files in the published schema ---


def test_summaries(tmp_path):
    post = "My friend and I\nhave a question. " * 5

    def row(post):
        info = {"id": "t3_1", "post": post, "title": "?", "subreddit": "tifu", "site": None, "article": None}
        return {
            "info": info,
            "summaries": [{"text": " a", "policy": "sup4", "note": None}],
            "choice": 0,
            "split": "train",
        }

    rows = [row(post), row(post), row(None), row("short"), row("x" * 1200)]
    write_lines(tmp_path / "comparisons" / "validation.jsonl", rows)
    recipe = recipes.get("reddit-summary")
    prompts = recipe.load_prompts("validation", tmp_path)
    text = " ".join(["My friend and I have a question."] * 5)
    assert list(prompts["prompt"]) == [
        f"### Instruction: Generate a one-sentence summary of this post. ### Input: {text} ### Response: "
    ]
    write_lines(tmp_path / "bad.jsonl", [{"info": {"id": "t3_1", "title": "?"}}])
    with pytest.raises(HoEError, match=r"row 0 of .*bad.jsonl is not as openai/summarize_from_feedback has it.*'post'"):
        recipe.load_prompts("validation", tmp_path / "bad.jsonl")
    with pytest.raises(HoEError, match=r"holds no prompt for the split 'train' \(posts of 101 to 1199 characters"):
        recipe.load_prompts("train", write_lines(tmp_path / "train.jsonl", [row("short")]))


def test_beavertails_has_held_out_prompts(tmp_path):
    rows = [{"prompt": f"Question {i // 2}?", "response_0": "a", "response_1": "b"} for i in range(50)]
    path = write_lines(tmp_path / "train.jsonl", rows)
    recipe = recipes.get("beavertails")
    train, test = (recipe.load_prompts(split, path)["prompt"] for split in ("train", "test"))
    assert list(test) == [f"\n\nHuman: Question {i}? \n\nAssistant:" for i in (0, 10, 20)]
    assert len(train) == 22
    assert not set(train) & set(test)


def test_helpsteer(tmp_path):
    rows = [{"prompt": f"Question {i // 4}?", "response": f"answer {i}", **RATINGS} for i in range(8)]
    path = write_lines(tmp_path / "train.jsonl", rows)
    prompts = recipes.get("helpsteer").load_prompts("train", path)
    assert list(prompts["prompt"]) == ["\n\nHuman: Question 0? \n\nAssistant:", "\n\nHuman: Question 1? \n\nAssistant:"]
    del rows[0]["verbosity"], rows[0]["response"]
    incomplete = write_lines(tmp_path / "validation.jsonl", rows[:1])
    with pytest.raises(HoEError, match=r"has no column 'response', 'verbosity', only \['prompt'.*nvidia/HelpSteer"):
        recipes.get("helpsteer").load_prompts("validation", incomplete)


def test_helpsteer2_has_dialogues(tmp_path):
    turns = "Hi\n<extra_id_1>Assistant\nHello.\n<extra_id_1>User\nTell a joke."
    path = write_lines(tmp_path / "validation.jsonl", [{"prompt": turns, "response": "No.", **RATINGS}])
    prompts = recipes.get("helpsteer2").load_prompts("validation", path)
    assert list(prompts["prompt"]) == ["\n\nHuman: Hi\n\nAssistant: Hello.\n\nHuman: Tell a joke. \n\nAssistant:"]


def test_psoups(tmp_path):
    path = tmp_path / "data" / "koala_eval_50.json"
    path.parent.mkdir()
    path.write_text(
        json.dumps([{"prompt": "What is a koala?", "id": "koala_1"}, {"prompt": "And why?", "id": "koala_2"}])
    )
    (tmp_path / "data" / "alpaca_gpt4_10k.json").write_text(json.dumps([{"instruction": "?", "input": ""}]))
    prompts = recipes.get("psoups").load_prompts("test", tmp_path)
    assert list(prompts["prompt"]) == [f"\n\nHuman: {text} \n\nAssistant:" for text in ("What is a koala?", "And why?")]


def test_or_bench_labels_by_file(tmp_path):
    for name, count in (("or-bench-80k", 9), ("or-bench-hard-1k", 6), ("or-bench-toxic", 4)):
        write_csv(tmp_path / f"{name}.csv", [{"prompt": f"{name} {i}", "category": "hate"} for i in range(count)])
    recipe = recipes.get("over-refusal")
    assert list(recipe.load_prompts("or-bench", tmp_path)["label"]) == ["safe"] * 6 + ["unsafe"] * 4
    assert list(recipe.load_prompts("or-bench", tmp_path, limit=5)["label"]) == ["safe"] * 2 + ["unsafe"] * 3
    with pytest.raises(HoEError, match="files with 'toxic' in their names"):
        recipe.load_prompts("or-bench", tmp_path / "or-bench-hard-1k.csv")


def test_a_copy_of_a_repository_with_configurations(tmp_path):
    for config in ("main", "socratic"):
        for split in ("train", "test"):
            row = {"question": f"{split} of {config}?", "answer": "#### 1"}
            write_lines(tmp_path / config / f"{split}.jsonl", [row])
    prompts = recipes.get("math").load_prompts("test", tmp_path)
    assert len(prompts) == 1
    assert "test of main?" in prompts["prompt"][0]


# -- choosing prompts ---


def test_limit_and_seed(tmp_path):
    rows = [{"chosen": f"\n\nHuman: {i}\n\nAssistant: a", "rejected": ""} for i in range(30)]
    path = write_lines(tmp_path / "prompts.jsonl", rows)
    recipe = recipes.get("helpful-assistant")
    everything = list(recipe.load_prompts("test", path)["prompt"])
    assert list(recipe.load_prompts("test", path, limit=4)["prompt"]) == everything[:4]
    shuffled = list(recipe.load_prompts("test", path, seed=1)["prompt"])
    assert sorted(shuffled) == sorted(everything)
    assert shuffled != everything
    assert list(recipe.load_prompts("test", path, limit=4, seed=1)["prompt"]) == shuffled[:4]
    with pytest.raises(HoEError, match="limit is 0"):
        recipe.load_prompts("test", path, limit=0)
    with pytest.raises(HoEError, match=r"'helpful-assistant' has no split 'validation'; it has \['train', 'test'\]"):
        recipe.load_prompts("validation", path)
    with pytest.raises(HoEError, match="there is no file or folder"):
        recipe.load_prompts("test", tmp_path / "nowhere")
    write_lines(tmp_path / "other" / "train.jsonl", rows)
    with pytest.raises(HoEError, match="files with 'test' in their names"):  # never the training prompts instead
        recipe.load_prompts("test", tmp_path / "other")
    (tmp_path / "dialogue.jsonl").write_text(json.dumps({"chosen": "Hello.", "rejected": ""}))
    with pytest.raises(HoEError, match=r"row 0 of .*dialogue.jsonl is not as Anthropic/hh-rlhf has it"):
        recipe.load_prompts("test", tmp_path / "dialogue.jsonl")


def test_the_hub_is_asked_for_the_published_ids(monkeypatch):
    asked = []

    def load_dataset(**arguments):
        asked.append(arguments)
        raise ConnectionError("offline")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    for name, split in (
        ("helpful-assistant", "train"),
        ("reddit-summary", "train"),
        ("math", "test"),
        ("over-refusal", "or-bench"),
        ("psoups", "test"),
    ):
        with pytest.raises(HoEError, match=r"ConnectionError: offline\); without network, give source="):
            recipes.get(name).load_prompts(split)
    archive = "https://storage.googleapis.com/personalized-soups/data.zip"
    comparisons = "hf://datasets/openai/summarize_from_feedback@refs/convert/parquet/comparisons/train/*.parquet"
    assert asked == [
        {"path": "Anthropic/hh-rlhf", "name": None, "split": "train"},
        {"path": "parquet", "data_files": comparisons, "split": "train"},
        {"path": "openai/gsm8k", "name": "main", "split": "test"},
        {"path": "bench-llm/or-bench", "name": "or-bench-hard-1k", "split": "train"},
        {"path": "json", "data_files": f"zip://data/koala_eval_50.json::{archive}", "split": "train"},
    ]


# -- the command ---


def test_the_command(capsys):
    assert main(["recipes"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == recipes.names()
    assert main(["recipes", "beavertails"]) == 0
    text = capsys.readouterr().out
    for part in (
        "PKU-Alignment/beaver-7b-v1.0-cost",
        "reads     'BEGINNING OF CONVERSATION: USER: {content} ASSISTANT:{completion}'",
        "output    0, negated",
        "base      meta-llama/Llama-2-7b-hf",
        "What the paper leaves open",
    ):
        assert part in text
    assert main(["recipes", "math"]) == 0
    assert "policies  math: meta-math/MetaMath-7B-V1.0" in capsys.readouterr().out
    assert main(["recipes", "chess"]) == 2
    assert "peft-hoe recipes: there is no recipe 'chess'" in capsys.readouterr().err
