from __future__ import annotations

import ast
import re

import numpy as np
from huggingface_hub import ModelCard
from peft import get_peft_model
from torch import nn

from peft_hoe import HoEConfig, parse_preference


class Tiny(nn.Module):
    def __init__(self):
        super().__init__()
        self.lin = nn.Linear(2, 2)

    def forward(self, x):
        return self.lin(x)


def saved(folder, **changes):
    settings = {"objectives": ["helpful", "harmless"], "routers": [[0.25, 0.75]], "target_modules": ["lin"], "r": 1}
    model = get_peft_model(Tiny(), HoEConfig(**{**settings, **changes}))
    model.save_pretrained(folder)
    return model


def test_the_card_says_how_to_load_and_steer(tmp_path):
    saved(tmp_path)
    text = (tmp_path / "README.md").read_text()
    for line in (
        "import peft_hoe",
        "KeyError: 'HOE'",
        "model.set_preference({'helpful': 0.5, 'harmless': 0.5})",
        "| centroid | 0.5 | 0.5 | 1 |",
        "| r0 | 0.25 | 0.75 | harmless, centroid | no |",
    ):
        assert line in text
    assert "peft_hoe" in ModelCard.load(tmp_path / "README.md").data.tags


def test_the_shown_preference_is_one(tmp_path):
    for n in (3, 7, 8, 12):
        names = [f"o{i}" for i in range(n)]
        saved(tmp_path / str(n), objectives=names, routers=None)
        shown = re.search(r"set_preference\((.*)\)", (tmp_path / str(n) / "README.md").read_text()).group(1)
        np.testing.assert_allclose(parse_preference(ast.literal_eval(shown), names), 1 / n)


def test_saving_again_replaces_the_block_and_keeps_the_rest(tmp_path):
    model = saved(tmp_path)
    path = tmp_path / "README.md"
    path.write_text(path.read_text() + "\nMy own words.\n")
    model.save_pretrained(tmp_path)
    once = path.read_text()
    model.save_pretrained(tmp_path)
    assert path.read_text() == once
    assert once.count("peft_hoe: begin") == 1
    assert "My own words." in once
    model.set_preference([0.7, 0.3])
    model.save_pretrained(tmp_path)
    assert "Default preference: [0.7, 0.3]" in path.read_text()


def test_a_named_adapters_folder_gets_a_card_of_its_own(tmp_path):
    model = get_peft_model(Tiny(), HoEConfig(objectives=["x", "y"], target_modules=["lin"], r=1), adapter_name="mine")
    model.save_pretrained(tmp_path)
    assert "objectives: x, y" in (tmp_path / "mine" / "README.md").read_text()


def test_a_config_alone_writes_no_card(tmp_path):
    HoEConfig(objectives=["x", "y"]).save_pretrained(tmp_path)
    assert not (tmp_path / "README.md").exists()
