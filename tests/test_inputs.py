"""What loading an adapter says where it cannot: which of adapter, base and tokenizer is at fault, and the remedy."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from peft_hoe import HoEError, demo
from peft_hoe.inputs import load_adapter

Edit = Callable[[Path, Path], tuple[Path, str | None]]


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> tuple[Path, Path]:
    """An adapter, and a base that may be spoilt."""
    root = tmp_path_factory.mktemp("inputs")
    demo.build_demo_adapter(root / "adapter")
    return root / "adapter", Path(demo.BASE)


def _renamed(adapter: Path, base: Path, name: str | None) -> tuple[Path, None]:
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": name}))
    return adapter, None


def _without(folder: Path, pattern: str) -> None:
    for file in folder.glob(pattern):
        file.unlink()


def _no_weights(adapter: Path, base: Path) -> tuple[Path, None]:
    _without(adapter, "adapter_model*")
    return adapter, None


def _cut_base(adapter: Path, base: Path) -> tuple[Path, str]:
    (base / "model.safetensors").write_bytes((base / "model.safetensors").read_bytes()[:1000])
    return adapter, str(base)


def _no_tokenizer(adapter: Path, base: Path) -> tuple[Path, str]:
    _without(base, "*token*")
    return adapter, str(base)


@pytest.mark.parametrize(
    ("spoil", "argument", "text"),
    [
        pytest.param(
            lambda adapter, base: _renamed(adapter, base, "/moved/base"), "base",
            r"there is no folder '/moved/base' for the base\. '.*adapter' names it; .* give --base", id="base has moved",
        ),
        pytest.param(
            lambda adapter, base: _renamed(adapter, base, None), "base", "does not name its base model; give --base",
            id="no base",
        ),
        pytest.param(
            lambda adapter, base: (adapter, "./elsewhere"), "base", r"there is no folder './elsewhere' for the base$",
            id="base of the caller",
        ),
        pytest.param(
            lambda adapter, base: (adapter, str(adapter)), "base", "is an adapter itself, no base model; give the model",
            id="an adapter as base",
        ),
        pytest.param(_cut_base, "base", "cannot load the base .*: SafetensorError: .*header", id="base is cut off"),
        pytest.param(_no_tokenizer, "base", r"holds no tokenizer; .* tokenizer\.save_pretrained", id="no tokenizer"),
        pytest.param(
            _no_weights, "adapter", r"cannot put the adapter .*: the folder holds no adapter_model\.safetensors, only",
            id="no weights",
        ),
        pytest.param(
            lambda adapter, base: (adapter / "nowhere", None), "adapter",
            "cannot read the configuration of the adapter .*: Can't find 'adapter_config.json'", id="no adapter",
        ),
    ],
)  # fmt: skip
def test_what_cannot_be_loaded_is_named(folders, tmp_path: Path, spoil: Edit, argument: str, text: str) -> None:
    """The base's own error was told as one of the adapter, which was all right."""
    copies = [Path(shutil.copytree(folder, tmp_path / folder.name)) for folder in folders]
    adapter, base = spoil(*copies)
    with pytest.raises(HoEError, match=text) as caught:
        load_adapter(str(adapter), base)
    assert caught.value.argument == argument
