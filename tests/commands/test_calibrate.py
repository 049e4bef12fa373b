"""The command `peft-hoe calibrate`."""

import json

import pytest
from peft import PeftModel

from peft_hoe import Decoding, build_adapter, cli, demo, sweep


def swept(model, folder):
    found = sweep(
        model, demo.load_tokenizer(), demo.load_prompts()[:8], demo.REWARDS, [[1, 0], [0.7, 0.3], [0.3, 0.7], [0, 1]],
        decoding=Decoding(16), progress=False,
    )  # fmt: skip
    found.save(folder)


@pytest.fixture
def saved(tmp_path):
    model = demo.load_demo_adapter()
    model.save_pretrained(tmp_path / "adapter")
    swept(model, tmp_path / "sweep")
    return tmp_path


def test_it_writes_the_map_into_the_adapter(saved, capsys):
    weights = (saved / "adapter" / "adapter_model.safetensors").read_bytes()
    assert cli.main(["calibrate", str(saved / "adapter"), "--sweep", str(saved / "sweep"), "--replicates", "50"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("dial -> preference\n0, 1 -> 0, 1\n")
    assert "CV of the gaps: " in printed
    config = json.loads((saved / "adapter" / "adapter_config.json").read_text())
    assert len(config["calibration"]["positions"]) == 4
    assert (saved / "adapter" / "adapter_model.safetensors").read_bytes() == weights
    assert sorted(path.name for path in (saved / "adapter").iterdir()) == [
        "README.md", "adapter_config.json", "adapter_model.safetensors",
    ]  # fmt: skip
    model = PeftModel.from_pretrained(demo.load_base(), saved / "adapter")
    model.set_preference([0.5, 0.5], calibrated=True)


@pytest.mark.slow
def test_an_adapter_with_experts_of_embeddings_knows_its_own_sweep(tmp_path):
    adapter = tmp_path / "adapter"
    build_adapter(
        demo.BASE, demo.POLICIES, adapter, capture=["embeddings", "norms"], routers=[[0.75, 0.25]], progress=False
    )
    swept(PeftModel.from_pretrained(demo.load_base(), adapter), tmp_path / "sweep")
    assert cli.main(["calibrate", str(adapter), "--sweep", str(tmp_path / "sweep"), "--replicates", "20"]) == 0
    assert json.loads((adapter / "adapter_config.json").read_text())["calibration"] is not None


@pytest.mark.slow
@pytest.mark.parametrize(
    ("build", "said"),
    [
        ({"routers": [[0.75, 0.25]]}, "its experts or trained routers are not these"),
        ({"interpolation": "linear"}, "are averaged in another way"),
        ({"policies": {"cheerful": demo.POLICIES["vivid"], "vivid": demo.POLICIES["cheerful"]}}, "has other weights"),
    ],
)
def test_a_sweep_of_another_adapter_changes_nothing(saved, capsys, build, said):
    """Also of one that has its experts in the same places, of other policies."""
    other = saved / "other"
    build_adapter(demo.BASE, **{"policies": demo.POLICIES, **build}, output_dir=other, progress=False)
    before = (other / "adapter_config.json").read_text()
    assert cli.main(["calibrate", str(other), "--sweep", str(saved / "sweep")]) == 2
    assert said in capsys.readouterr().err
    assert (other / "adapter_config.json").read_text() == before


def test_no_adapter(saved, capsys):
    assert cli.main(["calibrate", str(saved / "sweep"), "--sweep", str(saved / "sweep")]) == 2
    assert "holds no adapter_config.json" in capsys.readouterr().err
