"""Plans: what the paper and recipes fill in, which prompts are used for what, and rewards in TRL's form."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from peft_hoe import Decoding
from peft_hoe.errors import HoEError, RewardError
from peft_hoe.generation.prompt_rows import drawn_rows
from peft_hoe.reproduce import Plan
from peft_hoe.reproduce.inputs import load_prompts, load_rewards
from peft_hoe.reproduce.training import ppo_settings

HHH = {"humor": "c", "helpful": "a", "harmless": "b"}


def short(prompts: Any, completions: Any, **columns: Any) -> list[float]:
    return [-float(len(text)) for text in completions]


def test_a_recipe_fills_in_what_is_not_given():
    plan = Plan.of("helpful-assistant", base="base", policies=HHH, output_dir="out")
    assert list(plan.policies.items()) == [("helpful", "a"), ("harmless", "b"), ("humor", "c")]
    np.testing.assert_allclose(plan.experts, [[1 / 3] * 3])
    assert plan.routers == [[0.5, 0.25, 0.25], [0.25, 0.5, 0.25], [0.25, 0.25, 0.5]]
    assert (len(plan.preferences), plan.decoding) == (13, Decoding(128))
    two = Plan.of("helpful-assistant", base="base", policies={"humor": "c", "helpful": "a"}, output_dir="out")
    assert (two.objectives, two.routers, len(two.preferences)) == (
        ("helpful", "humor"),
        [[0.75, 0.25], [0.25, 0.75]],
        11,
    )
    rated = ("helpfulness", "correctness", "coherence", "complexity", "verbosity")
    five = Plan.of("helpsteer", base="base", policies=dict.fromkeys(rated, "a"), output_dir="out")
    np.testing.assert_allclose(five.experts, [[0.2] * 5])
    np.testing.assert_allclose(five.routers, np.full((5, 5), 0.125) + 0.375 * np.eye(5))
    assert Plan.of("helpsteer2", policies=HHH, output_dir="out").base == "princeton-nlp/Llama-3-Base-8B-SFT"


def test_published_policies_and_an_objective_of_ones_own():
    plan = Plan.of("math", policies={"short": "s"}, rewards={"short": short}, output_dir="out")
    assert plan.policies == {"math": "meta-math/MetaMath-7B-V1.0", "short": "s"}
    assert plan.base == "meta-llama/Llama-2-7b-hf"
    table = load_rewards(plan, "cpu")(["q"] * 2, ["#### 4", "5"], {"answer": ["#### 4"] * 2})
    np.testing.assert_array_equal(table, [[1, -6], [0, -1]])
    assert json.loads(json.dumps(plan.settings()))["rewards"]["short"].endswith(":short")


@pytest.mark.parametrize(
    ("task", "options", "message"),
    [
        ("helpful-assistant", {"policies": HHH}, "several bases"),
        ("helpful-assistant", {"base": "b"}, "there are policies for \\[\\], and a front needs two"),
        ("helpful-assistant", {"base": "b", "policies": HHH | {"brief": "d"}}, "missing for \\['brief'\\]"),
        ("helpful-assistant", {"base": "b", "policies": HHH, "rewards": {"brief": short}}, "given for \\['brief'\\]"),
        ("own", {"base": "b", "policies": HHH, "rewards": dict.fromkeys(HHH, short)}, "has no prompts"),
        ("own", {"policies": HHH}, "base model is missing"),
        ("poetry", {"policies": HHH}, "there is no recipe 'poetry'"),
    ],
)
def test_what_is_missing_is_named(task, options, message):
    with pytest.raises(HoEError, match=message):
        Plan.of(task, output_dir="out", **options)


def own(prompts: Any, **changes: Any) -> Plan:
    rewards = {"a": short, "b": short}
    options = {"base": "base", "policies": {"a": "1", "b": "2"}, "rewards": rewards, "output_dir": "out"} | changes
    return Plan.of("own", prompts=prompts, **options)


def test_training_may_find_its_own_end():
    plan = own("prompts.json", updates="auto")
    assert (plan.trains, plan.most_updates) == (True, 240)
    assert own("prompts.json", updates="auto", max_updates=80).most_updates == 80
    assert ppo_settings(plan, progress=False)["auto_stop"]
    for changes, message in (
        ({"updates": "many"}, "updates is 'many'"),
        ({"updates": -1}, "updates is -1"),
        ({"updates": "auto", "trainer": "distill"}, "updates is auto, which follows the worst gap"),
        ({"max_updates": 80}, "max_updates is 80 with updates=60"),
        ({"updates": "auto", "max_updates": 0}, "max_updates is 0"),
    ):
        with pytest.raises(HoEError, match=message):
            own("prompts.json", **changes)


def test_prompts_are_held_out_for_the_scale():
    rows = [{"prompt": f"p{i}", "label": i} for i in range(12)]
    found = load_prompts(own({"train": rows, "test": ["p3", "x", "y"]}, limit=2))
    assert [row["prompt"] for row in found.test] == ["p3", "y"]  # drawn
    left = [0, 1, 2, 4, 5, 6, 7, 8, 9, 10, 11]  # a test prompt is not trained on
    held_out = [row["label"] for row in found.validation]
    assert held_out == [left[i] for i in drawn_rows(11, 2, seed=0)]  # of 11, a fifth, which is 2; drawn, not the last
    assert [row["label"] for row in found.train] == [label for label in left if label not in held_out]
    given = load_prompts(own({"train": rows, "validation": ["v"], "test": ["x"]}))
    assert (len(given.train), [row["prompt"] for row in given.validation]) == (12, ["v"])
    only = load_prompts(own({"test": ["x"]}, updates=0))
    assert (only.train, only.validation) == ([], [])
    with pytest.raises(HoEError, match=r"no prompts for \['train'\].*--updates 0"):
        load_prompts(own({"test": ["x"]}))
    with pytest.raises(HoEError, match="the splits are"):
        load_prompts(own({"eval": ["x"]}))


def test_a_file_of_splits_or_of_test_prompts(tmp_path):
    (tmp_path / "all.json").write_text(json.dumps({"train": ["a", "b", "c", "d", "e"], "test": ["x"]}))
    found = load_prompts(own(str(tmp_path / "all.json")))
    assert sorted(row["prompt"] for row in [*found.train, *found.validation]) == ["a", "b", "c", "d", "e"]
    assert len(found.validation) == 1
    (tmp_path / "test.txt").write_text("x\ny\n")
    assert len(load_prompts(own(str(tmp_path / "test.txt"), updates=0)).test) == 2


def test_a_recipe_reads_local_data(tmp_path):
    for split, count in (("train", 20), ("test", 5)):
        rows = [{"chosen": f"\n\nHuman: {split} {i}?\n\nAssistant: A", "rejected": ""} for i in range(count)]
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    plan = Plan.of("helpful-assistant", base="b", policies=HHH, output_dir="out", data=str(tmp_path), limit=3)
    found = load_prompts(plan)
    assert [len(rows) for rows in (found.train, found.validation, found.test)] == [17, 3, 3]
    assert {row["prompt"].split()[1] for row in found.test} == {"test"}
    assert found.test[0]["prompt"].startswith("\n\nHuman: test")
    replaced = Plan.of(
        "helpful-assistant", base="b", policies=HHH, output_dir="out", data=str(tmp_path), prompts={"test": ["mine"]}
    )
    assert load_prompts(replaced).test == [{"prompt": "mine"}]


def test_two_rewards_for_one_objective_are_refused():
    with pytest.raises(RewardError, match="have no policy"):
        own({"test": ["x"]}, rewards={"a": short, "b": short, "c": short})
