"""Sharded weights on the Hub: one file of each repository at a time is on this disk."""

from __future__ import annotations

import itertools
import json
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub import constants, file_download, hf_hub_download
from huggingface_hub.utils import _http
from safetensors.torch import load_file, save_file

from peft_hoe import CheckpointError, Loading, Pruning
from peft_hoe.experts import build_adapter, build_inputs, plan_build, policy_statistics, stages
from peft_hoe.experts.hub_shards import HubShards
from peft_hoe.experts.module_work import ModuleWork
from peft_hoe.unfinished import InterruptedWork

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::FutureWarning")]
SETTINGS = {"r": 2, "progress": False}
LAYERS = 4


def forget_sessions() -> None:
    """Hub clients before 1.0 decide once for a thread whether they are offline."""
    getattr(_http, "reset_sessions", lambda: None)()


@pytest.fixture(autouse=True)
def offline_again() -> Iterator[None]:
    yield
    forget_sessions()


def place(name: str) -> list[object]:
    """A key that sorts names as transformers does."""
    parts = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    ends = {"model.embed_tokens.weight": 0, "model.norm.weight": 2}
    return [ends.get(name, 1), name.split(".")[2], *(f".{part}." not in name for part in parts)]


def split(folder: Path, cuts: list[str]) -> Path:
    """Cut a checkpoint into shards, each beginning with a tensor."""
    tensors = load_file(folder / "model.safetensors")
    names = sorted(tensors, key=place)
    starts = [0, *(names.index(cut) for cut in cuts), len(names)]
    weight_map = {}
    for i, (start, stop) in enumerate(itertools.pairwise(starts), 1):
        shard = f"model-{i:05d}-of-{len(cuts) + 1:05d}.safetensors"
        save_file({name: tensors[name] for name in names[start:stop]}, folder / shard, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(names[start:stop], shard)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (folder / "model.safetensors").unlink()
    return folder


@pytest.fixture
def hub(tmp_path, tiny, stand_in_hub, monkeypatch):
    """Base and policies of four layers, cut in different places, in folders and on a server.

    `watched` holds how many shards of each repository were on this disk when another was asked for.
    """
    torch.manual_seed(0)
    tiny.llama(num_hidden_layers=LAYERS).save_pretrained(tmp_path / "base")
    for seed, name in enumerate(("kind", "brief"), 1):
        tiny.rewrite(tmp_path / "base", tmp_path / name, tiny.noisy(seed))
    middle = "mlp.up_proj.weight"
    split(tmp_path / "base", [f"model.layers.1.{middle}", f"model.layers.3.{middle}", "model.norm.weight"])
    split(tmp_path / "kind", [f"model.layers.{i}.{middle}" for i in range(1, LAYERS)])
    split(tmp_path / "brief", [f"model.layers.2.{middle}"])
    names = ("base", "kind", "brief")
    server = stand_in_hub({f"us/{name}": tmp_path / name for name in names})
    monkeypatch.setattr(constants, "ENDPOINT", server.address)
    template = server.address + "/{repo_id}/resolve/{revision}/{filename}"
    for module in (constants, file_download):  # the lowest version that is supported has a copy
        monkeypatch.setattr(module, "HUGGINGFACE_CO_URL_TEMPLATE", template, raising=False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(policy_statistics, "_GUESSED_OF_FEW", 32)  # 64 take longer than all else here
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    forget_sessions()
    watched = []

    def on_disk():
        """How many files, or parts of one, of each repository there are."""
        return [len(list(folder.iterdir())) for folder in (tmp_path / "work").rglob("blobs")]

    def before(repository, file):
        if file.startswith("model-"):
            watched.append(on_disk())

    server.before = before
    (tmp_path / "work").mkdir()

    def fetched(repository):
        """How often each of its shards was sent whole."""
        shards = [path.name for path in (tmp_path / repository).glob("model-*")]
        return {shard: server.sent.count((f"us/{repository}", shard)) for shard in shards}

    return SimpleNamespace(
        base="us/base", policies={"kind": "us/kind", "brief": "us/brief"}, out=tmp_path / "work" / "out", server=server,
        watched=watched, fetched=fetched, on_disk=on_disk, cache=tmp_path / "cache",
        folders={name: tmp_path / name for name in names},
    )  # fmt: skip


def local(hub, output, **settings):
    """The same build from folders."""
    policies = {name: hub.folders[name] for name in hub.policies}
    return build_adapter(hub.folders["base"], policies, output, **{**SETTINGS, **settings})


def weights(folder):
    return (folder / "adapter_model.safetensors").read_bytes()


WAYS = [
    pytest.param({}, 2, id="one threshold for all"),
    pytest.param({"pruning": 0.7}, 3, id="its guess is wrong"),
    pytest.param({"pruning": None}, 1, id="nothing pruned"),
    pytest.param({"pruning": 0.3, "capture": ["norms"], "routers": [[0.25, 0.75]]}, 2, id="norms"),
]


@pytest.mark.parametrize(("settings", "passes"), WAYS)
def test_one_shard_at_a_time_gives_the_bytes_of_folders(hub, tmp_path, monkeypatch, settings, passes):
    if passes == 3:
        monkeypatch.setattr(policy_statistics, "_GUESSED_OF_FEW", 1)
    report = build_adapter(hub.base, hub.policies, hub.out, **{**SETTINGS, **settings})
    expected = local(hub, tmp_path / "local", **settings)
    assert weights(hub.out) == weights(tmp_path / "local")
    assert report.modules == expected.modules
    assert report.pairs == expected.pairs
    for name in hub.policies:
        assert report.policies[name].not_captured == expected.policies[name].not_captured
        assert report.policies[name].prune_threshold == expected.policies[name].prune_threshold
        assert report.sources["policies"][name]["hash"] == expected.sources["policies"][name]["hash"]
    configs = [json.loads((folder / "adapter_config.json").read_text()) for folder in (hub.out, tmp_path / "local")]
    assert configs[0]["base_sample"] == configs[1]["base_sample"]
    assert hub.watched
    assert all(count <= 1 for counts in hub.watched for count in counts)
    for repository in hub.folders:
        assert max(hub.fetched(repository).values()) == passes
        assert min(hub.fetched(repository).values()) >= 1
    assert list(hub.cache.rglob("model-*.safetensors")) == []
    assert sorted(path.name for path in hub.out.parent.iterdir()) == ["out"]


def test_a_guess_is_made_of_rows_alone(hub, monkeypatch):
    """Before the first file is fetched; where the server sends no rows, of the first files."""
    found = []
    real = policy_statistics.ThresholdSearch
    monkeypatch.setattr(policy_statistics, "ThresholdSearch", lambda *given: found.append(given[1]) or real(*given))
    inputs = build_inputs.open_inputs(
        hub.base, hub.policies, target_modules="all-linear", exclude_modules=None, loading=Loading()
    )
    inputs.put_shards_in(hub.out.parent)
    policy_statistics.PolicyMeasurement(inputs, Pruning())
    assert all(not any(hub.fetched(name).values()) for name in hub.folders)
    changes = [
        load_file(next(path for path in hub.folders[name].glob("model-*") if tensor in load_file(path)))[tensor][8:24]
        for tensor in ["model.layers.0.self_attn.q_proj.weight"]
        for name in ("base", "kind")
    ]
    assert torch.equal(found[0][: 8 * 16].reshape(8, 16), changes[1] - changes[0])
    hub.server.parts = False
    policy_statistics.PolicyMeasurement(inputs, Pruning())
    assert [len(sample) < len(whole) for sample, whole in zip(found[2:], found[:2], strict=True)] == [True, True]


def test_a_server_that_sends_whole_files_only_will_do(hub, tmp_path):
    hub.server.parts = False
    build_adapter(hub.base, hub.policies, hub.out, **SETTINGS)
    local(hub, tmp_path / "local")
    assert weights(hub.out) == weights(tmp_path / "local")


def test_a_shard_that_vanished_is_our_error_and_leaves_nothing(hub):
    real, headers = hub.server.before, 4 + 4 + 2

    def before(repository, file):
        real(repository, file)
        if len(hub.watched) > headers:
            (hub.folders["kind"] / "model-00003-of-00004.safetensors").unlink(missing_ok=True)

    hub.server.before = before
    with pytest.raises(
        CheckpointError, match=r"policy 'kind': model-00003-of-00004.safetensors is missing in 'us/kind'"
    ):
        build_adapter(hub.base, hub.policies, hub.out, **SETTINGS)
    assert list(hub.out.parent.iterdir()) == []


def test_a_shard_that_was_never_there_is_refused_before_anything_is_fetched(hub):
    (hub.folders["brief"] / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(
        CheckpointError, match=r"policy 'brief': model-00002-of-00002.safetensors is missing in 'us/brief'"
    ):
        build_adapter(hub.base, hub.policies, hub.out, **SETTINGS)
    assert all(not any(hub.fetched(name).values()) for name in hub.folders)


@pytest.mark.parametrize("stop", [("count", 2), ("make", 3), ("make", 20), ("bring", 7)], ids=str)
def test_a_build_that_was_stopped_goes_on_with_the_shards_it_needs(hub, tmp_path, monkeypatch, stop):
    method, calls = stop
    monkeypatch.setattr(stages, "_CHUNK", 2)
    owner = HubShards if method == "bring" else ModuleWork
    real, made = getattr(owner, method), []

    def interrupt(*arguments):
        made.append(arguments)
        if len(made) > calls:
            raise KeyboardInterrupt
        return real(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(owner, method, interrupt)
        with pytest.raises(KeyboardInterrupt):
            build_adapter(hub.base, hub.policies, hub.out, **SETTINGS)
    assert not hub.out.exists()
    report = build_adapter(hub.base, hub.policies, hub.out, **SETTINGS)
    expected = local(hub, tmp_path / "local")
    assert weights(hub.out) == weights(tmp_path / "local")
    assert report.sources["policies"]["kind"]["hash"] == expected.sources["policies"]["kind"]["hash"]
    assert all(count <= 1 for counts in hub.watched for count in counts)
    assert sorted(path.name for path in hub.out.parent.iterdir()) == ["out"]


@pytest.mark.skipif(sys.platform == "win32", reason="there is no SIGKILL")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")  # Python 3.12 says so where there are threads
@pytest.mark.parametrize("asked", [3, 11], ids=["measuring", "making"])
def test_a_build_that_was_killed_while_a_shard_came_goes_on(hub, tmp_path, monkeypatch, asked):
    child = os.fork()
    if child == 0:  # of which the half of a file that had come stays
        calls = []

        def half(name, shard, *, cache_dir, **options):
            calls.append(shard)
            if len(calls) > asked:
                blobs = Path(cache_dir) / f"models--{name.replace('/', '--')}" / "blobs"
                blobs.mkdir(parents=True)
                (blobs / "half.incomplete").write_bytes(b"half")
                os.kill(os.getpid(), signal.SIGKILL)
            return hf_hub_download(name, shard, cache_dir=cache_dir, **options)

        monkeypatch.setattr("peft_hoe.experts.hub_shards.hf_hub_download", half)
        try:
            build_adapter(hub.base, hub.policies, hub.out, **SETTINGS)
        finally:
            os._exit(1)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    assert len(list(hub.out.parent.rglob("half.incomplete"))) == 1
    build_adapter(hub.base, hub.policies, hub.out, **SETTINGS)
    local(hub, tmp_path / "local")
    assert weights(hub.out) == weights(tmp_path / "local")
    assert all(count <= 1 for counts in hub.watched for count in counts)
    assert sorted(path.name for path in hub.out.parent.iterdir()) == ["out"]


def test_a_broken_connection_stops_a_build_that_goes_on_later(hub, tmp_path, monkeypatch):
    def broken(*_, **__):
        raise ConnectionError("reset by peer")

    with monkeypatch.context() as patch:
        patch.setattr("peft_hoe.experts.hub_shards.hf_hub_download", broken)
        with pytest.raises(
            InterruptedWork, match=r"could not be fetched .ConnectionError: reset by peer.; the same command goes on"
        ) as stopped:
            build_adapter(hub.base, hub.policies, hub.out, **SETTINGS)
        assert stopped.value.argument == "the base"
        assert stopped.value.value.endswith(".safetensors")
    build_adapter(hub.base, hub.policies, hub.out, **SETTINGS)
    local(hub, tmp_path / "local")
    assert weights(hub.out) == weights(tmp_path / "local")


def test_a_shard_that_comes_damaged_is_told(hub, monkeypatch):
    def cut(*arguments, **options):
        path = Path(hf_hub_download(*arguments, **options)).resolve()
        path.write_bytes(path.read_bytes()[:-10])

    monkeypatch.setattr("peft_hoe.experts.hub_shards.hf_hub_download", cut)
    with pytest.raises(
        CheckpointError, match=r"the base: model-00001-of-00004.safetensors as it was fetched .* is damaged"
    ):
        build_adapter(hub.base, hub.policies, hub.out, **SETTINGS)


def test_shards_are_kept_when_told_to_and_used_from_the_cache(hub, tmp_path):
    build_adapter(hub.base, hub.policies, hub.out, loading=Loading(keep_shards=True), **SETTINGS)
    assert len({path.name for path in hub.cache.rglob("model-*.safetensors")}) > 4
    for repository in hub.folders:
        assert set(hub.fetched(repository).values()) == {1}
    before = len(hub.server.sent)
    build_adapter(hub.base, hub.policies, hub.out.parent / "again", **SETTINGS)
    assert [sent for sent in hub.server.sent[before:] if sent[1].startswith("model-")] == []
    assert weights(hub.out) == weights(hub.out.parent / "again")


def test_the_plan_counts_one_shard_of_each_model(hub):
    total = sum(tensor.nbytes for path in hub.folders["base"].glob("model-*") for tensor in load_file(path).values())
    plan = plan_build(hub.base, hub.policies)
    assert plan.fetch_bytes == 2 * 3 * total
    assert plan.disk_bytes == plan.adapter_bytes + total // 4 + total // 4 + total // 2  # four, four and two shards
    kept = plan_build(hub.base, hub.policies, loading=Loading(keep_shards=True))
    assert (kept.fetch_bytes, kept.disk_bytes) == (3 * total, kept.adapter_bytes + 3 * total)
    assert all(not any(hub.fetched(name).values()) for name in hub.folders)


@pytest.mark.slow
def test_several_processes_share_the_shard_that_is_here(hub, tmp_path):
    build_adapter(hub.base, hub.policies, hub.out, num_processes=2, **SETTINGS)
    local(hub, tmp_path / "local")
    assert weights(hub.out) == weights(tmp_path / "local")
    assert all(count <= 1 for counts in hub.watched for count in counts)
    for repository in hub.folders:
        assert set(hub.fetched(repository).values()) <= {1, 2}
