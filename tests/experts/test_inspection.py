"""What an adapter's directory says about itself."""

from __future__ import annotations

import json

import pytest

from peft_hoe import CheckpointError, ExpertSpec, build_adapter
from peft_hoe.cli import main
from peft_hoe.experts import inspect_adapter
from peft_hoe.experts.inspection import placement

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


@pytest.fixture
def adapter(llama, policies, tmp_path):
    experts = [[0.5, 0.5], ExpertSpec([0.25, 0.75], name="shy", r=12)]
    build_adapter(llama, policies, tmp_path / "out", r=3, experts=experts, routers=[[0.75, 0.25]], progress=False)
    return tmp_path / "out"


def test_experts_routers_placement_sizes_and_report(adapter, llama, tiny, capsys):
    assert main(["inspect", str(adapter)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"HoE adapter {adapter} for {llama}"
    rows = [line.split() for line in lines]
    assert ["A", "kind", "1", "0", "3"] in rows
    assert ["D", "shy", "0.25", "0.75", "8", "to", "12"] in rows  # key and value are narrower
    assert any(row[:4] == ["a", "r0", "0.75", "0.25"] and row[-1] == "no" for row in rows)
    assert "kind A-----------a-----------C-----------D-----------B brief" in lines
    tensors = tiny.tensors(adapter)
    experts = sum(tensor.numel() for name, tensor in tensors.items() if ".hoe_A." in name or ".hoe_B." in name)
    found = inspect_adapter(adapter)
    assert found.numbers["experts"] == experts
    assert sum(found.numbers.values()) == sum(tensor.numel() for tensor in tensors.values())
    assert found.modules == 7
    assert any(line.startswith("is r enough for the energy?") for line in lines)


def test_a_report_of_another_kind_is_left_out(adapter):
    (adapter / "build_report.json").write_text(json.dumps({"policies": {}}))
    assert inspect_adapter(adapter).report is None
    (adapter / "build_report.json").unlink()
    assert "is r enough" not in inspect_adapter(adapter).text()


def test_three_objectives_are_a_triangle():
    corners = [[1, 0, 0], [0, 1, 0], [0, 0, 1]]
    lines = placement(["up", "left", "right"], [*corners, [1 / 3] * 3], [[0, 0.5, 0.5]])
    assert lines[0].strip() == "up"
    top = lines[1].index("A")
    assert (lines[-1][5], lines[-1][-7]) == ("B", "C")
    assert lines[-1].index("a") == top  # halfway along the base, below the top
    assert lines[9].index("D") == top
    assert placement(list("abcd"), [], []) == ["a placement among 4 objectives has no picture"]


def test_other_directories_are_refused(tmp_path, adapter):
    with pytest.raises(CheckpointError, match=r"holds no adapter: there is no adapter_config\.json"):
        inspect_adapter(tmp_path)
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    with pytest.raises(CheckpointError, match="holds an adapter of type 'LORA', not 'HOE'"):
        inspect_adapter(tmp_path)
    (adapter / "adapter_model.safetensors").write_bytes(b"x")
    with pytest.raises(CheckpointError, match="truncated or not a safetensors file"):
        inspect_adapter(adapter)
