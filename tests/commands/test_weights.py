from __future__ import annotations

import json

import pytest

from peft_hoe import HoELayer
from peft_hoe.cli import main


def test_the_lora_list_is_printed_and_what_it_loses(toys, tmp_path, capsys):
    model = toys.make_policy()
    model.save_pretrained(tmp_path / "linear")
    assert main(["weights", str(tmp_path / "linear"), "low=0.9,high=0.1"]) == 0
    out, err = capsys.readouterr()
    assert [entry["id"] for entry in json.loads(out)] == [0, 1, 2]
    assert [entry["scale"] for entry in json.loads(out)] == pytest.approx([0.8, 0, 0.2])
    assert err == ""
    model = toys.make_policy(interpolation="norm")
    for layer in model.modules():
        if isinstance(layer, HoELayer):
            layer.measure_lengths("default")
    model.save_pretrained(tmp_path / "norm")
    assert main(["weights", str(tmp_path / "norm"), "0.9,0.1"]) == 0
    assert "off by" in capsys.readouterr().err
    model.mark_trained("r0")
    model.save_pretrained(tmp_path / "trained")
    assert main(["weights", str(tmp_path / "trained"), "0.25,0.75", "--routers", "drop"]) == 0
    assert (
        "--preference 0.25,0.75 --routers drop is exact" in capsys.readouterr().err
    )  # without it, it would be refused
    assert main(["weights", str(tmp_path / "norm"), "0.9,0.2"]) == 2
    assert "sums to 1.1" in capsys.readouterr().err
