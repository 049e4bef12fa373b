from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch

from peft_hoe import CheckpointError, HoEError, PreferenceError, StaticMergeError
from peft_hoe.serving import atlas
from peft_hoe.serving.atlas import export_atlas
from peft_hoe.serving.export_report import size


def test_every_point_of_the_grid_has_its_lora_and_the_size_is_told_first(steerable, as_lora, ids, tmp_path):
    model = steerable()
    told: list[str] = []
    reports = export_atlas(
        model, 0.25, tmp_path / "atlas", tell=lambda line: told.append(f"{line} {(tmp_path / 'atlas').exists()}")
    )
    total = sum(report.bytes for report in reports)
    assert told == [f"5 LoRAs, {size(total / 5)} each on average, {size(total)} in all False"]
    index = json.loads((tmp_path / "atlas" / "atlas.json").read_text())
    assert list(index["adapters"]) == ["1,0", "0.75,0.25", "0.5,0.5", "0.25,0.75", "0,1"]
    assert index["objectives"] == ["low", "high"]
    for name, entry in index["adapters"].items():
        with torch.no_grad():
            expected = model(input_ids=ids, preference=entry["preference"]).logits
        torch.testing.assert_close(as_lora(tmp_path / "atlas" / name, ids), expected, atol=1e-11, rtol=0)


def test_sizes_are_known_without_writing(steerable, tokenizer, tmp_path):
    model = steerable(trained=("r0",))
    told: list[str] = []
    options = {"rank": 5, "dtype": "bfloat16", "prompts": ["w1 w2"], "tokenizer": tokenizer}
    assert export_atlas(model, 0.25, tmp_path / "dry", tell=told.append, dry_run=True, **options) == []
    assert not (tmp_path / "dry").exists()
    reports = export_atlas(model, 0.25, tmp_path / "atlas", **options)
    assert told[0].endswith(f"{size(sum(report.bytes for report in reports))} in all")


def test_no_room_and_no_empty_folder_are_found_before_writing(steerable, tmp_path, monkeypatch):
    model = steerable()
    with pytest.raises(PreferenceError, match="step of the grid"):
        export_atlas(model, 0.3, tmp_path / "atlas")
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(CheckpointError, match="not empty"):
        export_atlas(model, 0.5, tmp_path)
    monkeypatch.setattr(atlas.shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(HoEError, match=r"3 LoRAs.*1 kB left"):
        export_atlas(model, 0.5, tmp_path / "atlas")
    assert not (tmp_path / "atlas").exists()


def test_a_voting_router_is_refused_before_the_first_folder(toys, tmp_path):
    """The corners came first, were written, and stood in the way of the next try."""
    model = toys.make_policy()
    model.mark_trained("r0")
    with pytest.raises(StaticMergeError, match="prompts"):
        export_atlas(model, 0.25, tmp_path / "atlas")
    assert not (tmp_path / "atlas").exists()
