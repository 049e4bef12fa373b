from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest
import torch

from peft_hoe import HoEError
from peft_hoe.generation.prompt_rows import check_prompts, drawn_rows, rows_of_all, split_rows
from peft_hoe.generation.prompts import PromptBatch, PromptCollator, as_prompt_batch

CHAT = [{"role": "user", "content": "w1"}]
BAD = [
    ({"text": "w1"}, r"no prompts: its columns are \['text'\]"),
    ({"prompt": None}, "no prompts"),
    ({"prompt": 7}, r"`prompt` 7 \(int\)"),
    ({"prompt": ["w1", "w2"]}, r"`prompt` \['w1', 'w2'\] \(list\)"),
    ({"prompt": []}, r"`prompt` \[\]"),
    ({"prompt": [{"content": "w1"}]}, "`prompt`"),
    ({"input_ids": []}, r"`input_ids` \[\]"),
    ({"input_ids": "w1"}, "`input_ids` 'w1'"),
    ({"input_ids": [[3, 4]]}, "`input_ids`"),
    ("w1", "rows are mappings"),
]


@pytest.mark.parametrize(("row", "match"), BAD)
def test_a_bad_row_is_named(toys: ModuleType, row: Any, match: str) -> None:
    rows = [{"prompt": "w1"}, {"prompt": "w2"}, row]
    with pytest.raises(HoEError, match=f"row 2 of the training dataset .*{match}"):
        check_prompts(rows, toys.make_tokenizer())
    with pytest.raises(HoEError, match=f"row 2 of the batch .*{match}"):
        PromptCollator(toys.make_tokenizer())(rows)


def test_good_rows(toys: ModuleType) -> None:
    rows = [{"prompt": "w1"}, {"prompt": CHAT}, {"input_ids": torch.tensor([3])}]
    check_prompts(rows, toys.make_tokenizer())
    batch = PromptCollator(toys.make_tokenizer())([rows[0], rows[2]])  # this tokenizer has no chat template
    assert batch["input_ids"][1, -1] == 3
    assert batch["attention_mask"].any(dim=1).all()


def test_rows_of_a_dataset(toys: ModuleType) -> None:
    """Missing values are found column-wise, in the order of the rows that were selected."""
    datasets = pytest.importorskip("datasets")
    rows = [{"prompt": "w1"}, {"prompt": None}, {"prompt": "w3"}]
    dataset = datasets.Dataset.from_list(rows)
    with pytest.raises(HoEError, match="row 1 of the training dataset holds no prompts"):
        check_prompts(dataset, toys.make_tokenizer())
    with pytest.raises(HoEError, match="row 2 of the training dataset holds no prompts"):
        check_prompts(dataset.select([2, 0, 1]), toys.make_tokenizer())
    check_prompts(dataset.select([2, 0]), toys.make_tokenizer())
    check_prompts(dataset.add_column("input_ids", [None, [5], None]), toys.make_tokenizer())
    chats = datasets.Dataset.from_list([{"prompt": CHAT}, {"prompt": []}])
    with pytest.raises(HoEError, match=r"row 1 of the training dataset has the `prompt` \[\]"):
        check_prompts(chats, toys.make_tokenizer())
    made = datasets.Dataset.from_list([{"question": "w1"}]).with_transform(
        lambda batch: {"prompt": [f"w2 {text}" for text in batch["question"]]}
    )
    check_prompts(made, toys.make_tokenizer())


def test_rows_that_are_read_late_are_named_by_the_trainer(make_trainer: Any, toys: ModuleType) -> None:
    class Lazy:
        def __len__(self) -> int:
            return 4

        def __getitem__(self, row: int) -> dict[str, Any]:
            return {"prompt": "w1" if row != 3 else None}

    trainer = make_trainer(constructor={"train_dataset": Lazy()})
    with pytest.raises(HoEError, match="row 3 of the dataset holds no prompts"):
        trainer.train()


def test_rows_of_a_batch_must_agree(toys: ModuleType) -> None:
    collate = PromptCollator(toys.make_tokenizer())
    with pytest.raises(HoEError, match="row 17 of the dataset has no column 'tag'"):
        collate([{"prompt": "w1", "tag": 1}, {"prompt": "w2"}], [4, 17])
    with pytest.raises(HoEError, match="row 9 of the dataset has no column 'tag'"):
        collate([{"prompt": "w2"}, {"prompt": "w1", "tag": 1}], [9, 4])
    with pytest.raises(HoEError, match="row 1 of the batch has a `prompt` without a single token"):
        collate([{"prompt": "w1"}, {"prompt": ""}])


def test_prompts_that_are_not_given_are_decoded(toys: ModuleType) -> None:
    """Also where only some rows have none."""
    tokenizer = toys.make_tokenizer()
    batch = PromptCollator(tokenizer)([{"prompt": CHAT, "input_ids": [5]}, {"input_ids": [1, 6, 7]}])
    prompts = as_prompt_batch(batch, tokenizer, torch.device("cpu"))
    assert prompts.texts == [CHAT, "w2 w3"]
    assert prompts.ids.tolist() == [[0, 0, 5], [1, 6, 7]]


def test_prompts_come_in_anything_that_can_be_gone_through():
    """A dataset, a stream, a generator, texts, chats: prompts, and the columns beside them."""
    import datasets

    rows = [{"prompt": "w3", "label": 1}, {"prompt": "w4", "label": None}]
    expected = ["w3", "w4"], {"label": [1, None]}
    dataset = datasets.Dataset.from_list(rows)
    for given in (rows, tuple(rows), iter(rows), dataset, dataset.to_iterable_dataset()):
        assert split_rows(given) == expected
    chat = [{"role": "user", "content": "w5"}]
    assert split_rows(["w3", chat]) == (["w3", chat], {})
    assert split_rows("w3") == (["w3"], {})
    assert split_rows(()) == ([], {})


def test_datasets_by_name_are_drawn_from_together() -> None:
    """Each may hold a task of its own; only the first was looked at."""
    rows = rows_of_all({"a": [{"prompt": "1"}, {"prompt": "2"}], "b": [{"prompt": "3"}]})
    assert [rows[number]["prompt"] for number in range(len(rows))] == ["1", "2", "3"]
    assert rows_of_all(["itself"]) == ["itself"]


def test_rows_to_measure_on_are_drawn_not_the_first():
    """A dataset that is sorted by task would be measured on one task."""
    drawn = drawn_rows(100, 20, seed=3)
    assert drawn == sorted(set(drawn))
    assert len(drawn) == 20
    assert drawn == drawn_rows(100, 20, seed=3) != drawn_rows(100, 20, seed=4)
    assert sum(row < 50 for row in drawn) == pytest.approx(10, abs=5)
    assert drawn_rows(5, 20, seed=3) == [0, 1, 2, 3, 4]


def test_a_stream_of_training_rows_is_named():
    import datasets

    rows = [{"prompt": "w3"}]
    for stream in (datasets.Dataset.from_list(rows).to_iterable_dataset(), iter(rows), {"train": rows}):
        with pytest.raises(
            HoEError, match=r"the training dataset is a \w+, whose rows cannot be read by number; give a list"
        ):
            check_prompts(stream, None)


def test_the_digest_of_a_batch_knows_its_prompts_and_their_order_not_their_padding():
    """A payoff table says by it which prompts it was measured on."""

    def digest(rows: list[list[int]]) -> str:
        ids = torch.tensor(rows)
        return PromptBatch(ids, ids != 0, [""] * len(rows), {}).digest

    assert digest([[0, 3], [4, 5]]) == digest([[0, 0, 3], [0, 4, 5]])
    assert len({digest(rows) for rows in ([[0, 3], [4, 5]], [[4, 5], [0, 3]], [[0, 3], [4, 6]], [[0, 3]])}) == 4
