"""A build that was stopped goes on where it stopped, and gives the bytes of one that was not."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from peft_hoe import CheckpointError, ExpertSpec, HoEConfig
from peft_hoe.experts import build_adapter, module_builder, policy_statistics, stages
from peft_hoe.experts.journal import Journal
from peft_hoe.experts.module_work import ModuleWork
from peft_hoe.experts.processes import Processes
from peft_hoe.experts.weight_writer import WeightWriter
from peft_hoe.unfinished import InterruptedWork, Unfinished

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")
SETTINGS = {"r": 2, "routers": [[0.25, 0.75]], "progress": False}
KILLED = """
import os, signal, sys
import peft_hoe.experts as experts
from importlib import import_module
base, kind, brief, output, module, owner, method, calls = sys.argv[1:]
owner = getattr(import_module(module), owner)
real, made = getattr(owner, method), []
def kill(*arguments, **options):
    made.append(1)
    if len(made) > int(calls):
        os.kill(os.getpid(), signal.SIGKILL)
    return real(*arguments, **options)
setattr(owner, method, kill)
experts.build_adapter(base, {"kind": kind, "brief": brief}, output, r=2, routers=[[0.25, 0.75]], progress=False)
"""


def contents(folder: Path) -> dict[str, bytes]:
    """The files, the report without the place where it lies."""
    found = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    report = json.loads(found["build_report.json"])
    assert Path(report.pop("output_dir")) == folder
    return {**found, "build_report.json": json.dumps(report).encode()}


def hidden(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name.startswith("."))


@pytest.fixture
def whole(llama, policies, tmp_path):
    """What a build gives that was not stopped."""
    build_adapter(llama, policies, tmp_path / "whole", **SETTINGS)
    return contents(tmp_path / "whole")


def stop_after(monkeypatch, owner, method, calls):
    """Let a method raise KeyboardInterrupt after so many calls."""
    real, made = getattr(owner, method), []

    def interrupt(*arguments, **options):
        made.append(arguments)
        if len(made) > calls:
            raise KeyboardInterrupt
        return real(*arguments, **options)

    monkeypatch.setattr(owner, method, interrupt)


STOPS = [
    (Journal, "save_measurement", 0),
    (Journal, "save_measurement", 3),
    (stages.PolicyMeasurement, "end_pass", 0),
    (module_builder.ModuleBuilder, "build", 0),
    (module_builder.ModuleBuilder, "build", 4),
    (WeightWriter, "add", 9),  # in the middle of a module
    (Journal, "add", 3),  # written, but not recorded
    (WeightWriter, "finish", 0),
    (HoEConfig, "save_pretrained", 0),
    (Unfinished, "rename", 0),
]


@pytest.mark.parametrize(("owner", "method", "calls"), STOPS, ids=lambda value: str(getattr(value, "__name__", value)))
def test_an_interrupted_build_goes_on_and_gives_the_same_bytes(
    llama, policies, tmp_path, monkeypatch, whole, owner, method, calls
):
    monkeypatch.setattr(stages, "_CHUNK", 2)
    with monkeypatch.context() as patch:
        stop_after(patch, owner, method, calls)
        with pytest.raises(KeyboardInterrupt):
            build_adapter(llama, policies, tmp_path / "out", **SETTINGS)
    assert not (tmp_path / "out").exists()
    assert len(hidden(tmp_path)) == 1
    build_adapter(llama, policies, tmp_path / "out", **SETTINGS)
    assert contents(tmp_path / "out") == whole
    assert hidden(tmp_path) == []


@pytest.mark.parametrize("stop", [(WeightWriter, "finish", 0), (Journal, "add", 7)])
def test_what_is_captured_and_policies_of_single_experts_go_on_too(llama, policies, tmp_path, tiny, monkeypatch, stop):
    middle = ExpertSpec([0.5, 0.5], policy=tiny.rewrite(llama, tmp_path / "middle", tiny.noisy(5)))
    settings = {**SETTINGS, "experts": [middle], "capture": ["embeddings", "norms"]}
    build_adapter(llama, policies, tmp_path / "whole", **settings)
    with monkeypatch.context() as patch:
        stop_after(patch, *stop)
        with pytest.raises(KeyboardInterrupt):
            build_adapter(llama, policies, tmp_path / "out", **settings)
    build_adapter(llama, policies, tmp_path / "out", **settings)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert hidden(tmp_path) == []


def test_what_was_done_is_not_done_again(llama, policies, tmp_path, monkeypatch, whole):
    made, real = [], ModuleWork.make
    monkeypatch.setattr(ModuleWork, "make", lambda work, index, *rest: made.append(index) or real(work, index, *rest))
    with monkeypatch.context() as patch:
        stop_after(patch, Journal, "add", 4)
        with pytest.raises(KeyboardInterrupt):
            build_adapter(llama, policies, tmp_path / "out", **SETTINGS)
    counted = []
    monkeypatch.setattr(
        policy_statistics.PolicyMeasurement, "add_counted", lambda *arguments: counted.append(arguments)
    )
    build_adapter(llama, policies, tmp_path / "out", **SETTINGS)
    assert made == [0, 1, 2, 3, 4, 4, 5, 6]  # the fifth was made, but not recorded
    assert counted == []
    assert contents(tmp_path / "out") == whole


def test_a_second_look_at_a_threshold_is_gone_on_with(llama, policies, tmp_path, monkeypatch, whole):
    import torch

    monkeypatch.setattr(stages, "_CHUNK", 2)
    monkeypatch.setattr(policy_statistics, "_sample", lambda inputs, policy: torch.tensor([1e9]))
    with monkeypatch.context() as patch:
        stop_after(patch, Journal, "save_measurement", 7)  # 4 and the end of the first look, 2 of the second
        with pytest.raises(KeyboardInterrupt):
            build_adapter(llama, policies, tmp_path / "out", **SETTINGS)
    build_adapter(llama, policies, tmp_path / "out", **SETTINGS)
    assert contents(tmp_path / "out") == whole


@pytest.mark.parametrize("damage", ["journal", "weights", "measurement"])
def test_what_a_failing_machine_lost_is_made_again(llama, policies, tmp_path, monkeypatch, whole, damage):
    with monkeypatch.context() as patch:
        stop_after(patch, Journal, "add", 4)
        with pytest.raises(KeyboardInterrupt):
            build_adapter(llama, policies, tmp_path / "out", **SETTINGS)
    folder = tmp_path / hidden(tmp_path)[0]
    if damage == "journal":
        path = folder / "state" / "modules.jsonl"
        path.write_bytes(path.read_bytes()[:-40])
    elif damage == "measurement":
        (folder / "state" / "measurement.pt").write_bytes(b"PK")
    else:
        path = folder / "files" / "adapter_model.safetensors"
        path.write_bytes(path.read_bytes()[:-700] + bytes(700))
    build_adapter(llama, policies, tmp_path / "out", **SETTINGS)
    assert contents(tmp_path / "out") == whole


def test_other_settings_and_changed_files_start_anew_and_remove_what_was_left(llama, policies, tmp_path, monkeypatch):
    build_adapter(llama, policies, tmp_path / "whole", **{**SETTINGS, "r": 3})
    with monkeypatch.context() as patch:
        stop_after(patch, Journal, "add", 4)
        with pytest.raises(KeyboardInterrupt):
            build_adapter(llama, policies, tmp_path / "out", **SETTINGS)
        left = hidden(tmp_path)
        weights = policies["kind"] / "model.safetensors"
        weights.write_bytes(weights.read_bytes())  # the same, but who knows
        with pytest.raises(KeyboardInterrupt):
            build_adapter(llama, policies, tmp_path / "out", **SETTINGS)
    assert len(hidden(tmp_path)) == 1
    assert hidden(tmp_path) != left
    build_adapter(llama, policies, tmp_path / "out", **{**SETTINGS, "r": 3})
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert hidden(tmp_path) == []


def test_an_existing_adapter_stays_whole_through_a_kill_in_the_last_step(llama, policies, tmp_path, monkeypatch, whole):
    build_adapter(llama, policies, tmp_path / "out", **{**SETTINGS, "r": 3})
    before = contents(tmp_path / "out")
    real, calls = Path.rename, []

    def rename(path, target):
        calls.append(path)
        if len(calls) > 6:
            raise SystemExit  # what a kill cuts short is not put back by the process itself
        return real(path, target)

    with monkeypatch.context() as patch:
        patch.setattr("peft_hoe.unfinished._move_back", lambda *arguments: None)
        patch.setattr(Path, "rename", rename)
        with pytest.raises(SystemExit):
            build_adapter(llama, policies, tmp_path / "out", overwrite=True, **SETTINGS)
    assert not (tmp_path / "out" / "adapter_config.json").exists()
    with pytest.raises(CheckpointError, match="is not empty; give another path, or pass overwrite=True"):
        build_adapter(llama, policies, tmp_path / "out", **SETTINGS)
    assert contents(tmp_path / "out") == before
    build_adapter(llama, policies, tmp_path / "out", overwrite=True, **SETTINGS)
    assert contents(tmp_path / "out") == whole
    assert hidden(tmp_path / "out") == []


def test_a_process_of_several_that_is_killed_loses_nothing(llama, policies, tmp_path, monkeypatch, whole):
    # All that was done went with it, though the message said that the build would go on.
    real = Processes.map

    def broken(processes, method, tasks):
        for number, result in enumerate(real(processes, method, tasks)):
            if method == "make" and number == 4:
                raise InterruptedWork("killed")
            yield result

    with monkeypatch.context() as patch:
        patch.setattr(Processes, "map", broken)
        with pytest.raises(InterruptedWork, match="killed"):
            build_adapter(llama, policies, tmp_path / "out", **SETTINGS)
    made, make = [], ModuleWork.make
    monkeypatch.setattr(ModuleWork, "make", lambda work, index, *rest: made.append(index) or make(work, index, *rest))
    build_adapter(llama, policies, tmp_path / "out", **SETTINGS)
    assert made == [4, 5, 6]
    assert contents(tmp_path / "out") == whole


def test_two_processes_do_not_build_the_same_adapter_at_once(llama, policies, tmp_path, monkeypatch):
    def build_again(*arguments):
        build_adapter(llama, policies, tmp_path / "out", **SETTINGS)

    monkeypatch.setattr(ModuleWork, "make", build_again)
    with pytest.raises(CheckpointError, match="another process is building the same adapter, in "):
        build_adapter(llama, policies, tmp_path / "out", **SETTINGS)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="there is no SIGKILL")
@pytest.mark.parametrize(
    "point",
    [
        ("peft_hoe.experts.journal", "Journal", "save_measurement", "1"),
        ("peft_hoe.experts.module_builder", "ModuleBuilder", "build", "4"),
        ("peft_hoe.unfinished", "Unfinished", "rename", "0"),
    ],
    ids=["measuring", "making", "putting in place"],
)
def test_a_killed_build_goes_on_and_gives_the_same_bytes(llama, policies, tmp_path, whole, point):
    paths = [str(path) for path in (llama, *policies.values(), tmp_path / "out")]
    process = subprocess.run([sys.executable, "-c", KILLED, *paths, *point], capture_output=True, check=False)
    assert process.returncode == -signal.SIGKILL, process.stderr
    assert len(hidden(tmp_path)) == 1
    build_adapter(llama, policies, tmp_path / "out", **SETTINGS)
    assert contents(tmp_path / "out") == whole
    assert hidden(tmp_path) == []


@pytest.mark.slow
def test_several_processes_give_the_same_bytes(llama, policies, tmp_path, whole):
    build_adapter(llama, policies, tmp_path / "out", num_processes=2, **SETTINGS)
    assert contents(tmp_path / "out") == whole
