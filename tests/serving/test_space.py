from __future__ import annotations

import ast

import pytest
from huggingface_hub import RepoCard

from peft_hoe import HoEError
from peft_hoe.cli import main


def test_the_folder_has_all_that_a_space_needs(toys, tmp_path, capsys, make_sweep):
    toys.make_policy().save_pretrained(tmp_path / "hoe")
    make_sweep([[1, 0], [0, 1]], objectives=("low", "high"), normalizer=None).save(tmp_path / "front")
    command = ["space", str(tmp_path / "out"), "--adapter", str(tmp_path / "hoe"), "--base", "owner/base"]
    assert main([*command, "--sweep", str(tmp_path / "front"), "--title", "Mine: # 1"]) == 0
    assert "python app.py" in capsys.readouterr().out
    out = tmp_path / "out"
    names = {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()}
    assert {"app.py", "requirements.txt", "README.md", "adapter/adapter_config.json", "sweep/sweep.json"} <= names
    call = ast.parse((out / "app.py").read_text()).body[-1].value
    assert [argument.value for argument in call.args] == ["adapter", "owner/base"]
    assert {word.arg: word.value.value for word in call.keywords} == {"sweep": "sweep", "title": "Mine: # 1"}
    assert (out / "requirements.txt").read_text().startswith("peft-hoe[page]==")
    card = RepoCard.load(out / "README.md", ignore_metadata_errors=False).data.to_dict()
    assert (card["title"], card["sdk"], card["app_file"]) == ("Mine: # 1", "gradio", "app.py")  # a title is no YAML


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


def test_what_the_space_would_not_find_is_refused_before_it_is_written(toys, tmp_path, capsys, make_sweep):
    toys.make_policy().save_pretrained(tmp_path / "hoe")
    (tmp_path / "empty").mkdir()
    make_sweep([[1, 0], [0, 1]]).save(tmp_path / "other")
    adapter, base = ["--adapter", str(tmp_path / "hoe")], ["--base", "owner/base"]
    for options, said in (
        (["--adapter", str(tmp_path / "nothere"), *base], "there is no folder"),
        (["--adapter", str(tmp_path / "empty"), *base], "there is no adapter_config.json"),
        ([*adapter, "--base", "./nothere"], "loads it from the Hub"),
        ([*adapter, *base, "--sweep", str(tmp_path / "nothere")], "cannot read a sweep"),
        (
            [*adapter, *base, "--sweep", str(tmp_path / "other")],
            "has objectives ['a', 'b'], the adapter ['low', 'high']",
        ),
    ):
        assert main(["space", str(tmp_path / "out"), *options]) == 2
        assert said in capsys.readouterr().err
        assert not (tmp_path / "out").exists()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "app.py").touch()
    assert main(["space", str(tmp_path / "out"), *adapter, *base]) == 2
    error = capsys.readouterr().err
    assert "is not empty; give a new or an empty one" in error
    assert "--overwrite" not in error  # which the command does not have
