from __future__ import annotations

import ast

import pytest

from peft_hoe import HoEError
from peft_hoe.cli import main


def test_the_folder_has_all_that_a_space_needs(toys, tmp_path, capsys):
    toys.make_policy().save_pretrained(tmp_path / "hoe")
    (tmp_path / "front").mkdir()
    (tmp_path / "front" / "sweep.json").write_text("{}")
    command = ["space", str(tmp_path / "out"), "--adapter", str(tmp_path / "hoe"), "--base", "owner/base"]
    assert main([*command, "--sweep", str(tmp_path / "front"), "--title", "Mine"]) == 0
    assert "python app.py" in capsys.readouterr().out
    out = tmp_path / "out"
    names = {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()}
    assert {"app.py", "requirements.txt", "README.md", "adapter/adapter_config.json", "sweep/sweep.json"} <= names
    call = ast.parse((out / "app.py").read_text()).body[-1].value
    assert [argument.value for argument in call.args] == ["adapter", "owner/base"]
    assert {word.arg: word.value.value for word in call.keywords} == {"sweep": "sweep", "title": "Mine"}
    assert (out / "requirements.txt").read_text().startswith("peft-hoe[page]==")
    assert "sdk: gradio" in (out / "README.md").read_text()


def test_a_base_that_nobody_has_is_refused(toys, tmp_path, capsys):
    from peft_hoe.serving.space import write_space

    toys.make_policy().save_pretrained(tmp_path / "hoe")
    with pytest.raises(HoEError, match="loads it from the Hub"):
        write_space(str(tmp_path / "hoe"), tmp_path / "out")
    with pytest.raises(HoEError, match="loads it from the Hub"):
        write_space(str(tmp_path / "hoe"), tmp_path / "out", base=str(tmp_path))
    assert not (tmp_path / "out").exists()
    write_space("owner/adapter", tmp_path / "out")
    assert "launch('owner/adapter', None, sweep=None, title='adapter')" in (tmp_path / "out" / "app.py").read_text()
