"""Where modules are computed.

There need be no GPU: a stand-in device keeps its numbers on the CPU, but gives them out to nobody who does not ask for a
transfer, and refuses operations that mix it with the CPU, as a GPU does.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_map_only
from transformers import AutoModelForCausalLM

from peft_hoe import ExpertError, ExpertSpec
from peft_hoe.cli import main
from peft_hoe.experts import (
    add_expert,
    add_objective,
    build_adapter,
    build_inputs,
    module_builder,
    module_work,
    options,
    plan,
)
from peft_hoe.experts.architecture import read_architecture
from peft_hoe.experts.devices import check_device
from peft_hoe.experts.merging import METHODS, check_merge, merge
from peft_hoe.experts.pruning import ThresholdSearch

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")
STAND_IN = torch.device("meta")  # the one device besides the CPU that every torch knows
aten = torch.ops.aten
TRANSFERS = (aten._to_copy.default, aten.copy_.default, aten._local_scalar_dense.default)


class Far(torch.Tensor):
    """A tensor on the stand-in device."""

    @staticmethod
    def __new__(cls, near: torch.Tensor) -> Far:
        found = torch.Tensor._make_wrapper_subclass(
            cls, near.shape, strides=near.stride(), storage_offset=near.storage_offset(), dtype=near.dtype, device=STAND_IN
        )  # fmt: skip
        found.near = near
        return found

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(function, args, kwargs or {})


class StandIn(TorchDispatchMode):
    """While it is entered, what is made on the stand-in device is made there. Counts the operations on it."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(kind, Far) for kind in types):
            self.operations.append(function.name())
        return run(function, args, kwargs or {})


def run(function: Any, args: Any, kwargs: Any) -> Any:
    kwargs = dict(kwargs)
    given: list[torch.Tensor] = []
    tree_map_only(torch.Tensor, given.append, (args, kwargs))
    far = [tensor for tensor in given if isinstance(tensor, Far)]
    if far and function not in TRANSFERS:
        near = [tuple(tensor.shape) for tensor in given if not isinstance(tensor, Far) and tensor.ndim]
        assert not near, f"{function} mixes the device with tensors of the CPU of shapes {near}"
    device = kwargs.get("device")
    there = bool(far) if device is None else torch.device(device) == STAND_IN
    if function is aten.copy_.default:
        there = isinstance(args[0], Far)
    if device is not None:
        kwargs["device"] = "cpu"
    known = {id(tensor.near): tensor for tensor in far}
    near_args, near_kwargs = tree_map_only(Far, lambda tensor: tensor.near, (args, kwargs))
    found = function(*near_args, **near_kwargs)
    if not there:
        return found
    return tree_map_only(torch.Tensor, lambda tensor: known[id(tensor)] if id(tensor) in known else Far(tensor), found)


@pytest.fixture
def stand_in(monkeypatch):
    """The device, which `device="meta"` now means; but an architecture is read without weights, on the real one."""
    monkeypatch.setattr(options, "check_device", torch.device)

    def read(*arguments, **options):
        with _disable_current_modes():
            return read_architecture(*arguments, **options)

    monkeypatch.setattr(build_inputs, "read_architecture", read)
    monkeypatch.setattr(plan, "read_architecture", read)
    with StandIn() as mode:
        yield mode


def test_the_stand_in_device_refuses_what_a_gpu_refuses(stand_in):
    far = torch.ones(2, 2).to(STAND_IN)
    assert far.sum().item() == 4
    with pytest.raises(AssertionError, match="mixes the device"):
        far + torch.ones(2, 2)
    with pytest.raises((RuntimeError, NotImplementedError, TypeError)):
        far.numpy()


SETTINGS = [
    {},
    {"merging": "linear", "pruning": None, "interpolation": "linear"},
    {"merging": "dare", "svd": "exact", "rescale": "policy_norm"},
    {"merging": "tsv", "r": 0.9},
    {"pruning": 0.5, "merging": "fr", "capture": ["embeddings", "norms"]},
]


@pytest.mark.slow
@pytest.mark.parametrize("settings", SETTINGS, ids=lambda settings: "-".join(map(str, settings.values())) or "defaults")
def test_a_module_s_work_is_done_on_the_device(llama, policies, tmp_path, tiny, monkeypatch, stand_in, agree, settings):
    settings = {"r": 2, "dtype": "float32", "progress": False, **settings}
    build_adapter(llama, policies, tmp_path / "cpu", **settings)
    assert stand_in.operations == []
    vectors = []
    real = module_work.compare
    monkeypatch.setattr(module_work, "compare", lambda read: vectors.extend(read.deltas.values()) or real(read))
    report = build_adapter(llama, policies, tmp_path / "far", device="meta", **settings)
    assert vectors
    assert all(isinstance(vector, Far) for vector in vectors)
    seen = set(stand_in.operations)
    assert {"aten::mm", "aten::linalg_eigh" if settings.get("svd") != "exact" else "aten::linalg_vector_norm"} & seen
    assert report.options["device"] == "meta"
    for name, tensor in tiny.tensors(tmp_path / "cpu").items():
        torch.testing.assert_close(tiny.tensors(tmp_path / "far")[name], tensor, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("settings", [{"r": 2, "merging": "linear"}, {"merging": "ties"}], ids=["factors", "entries"])
def test_lora_policies_are_taken_on_the_device(llama, tmp_path, tiny, monkeypatch, stand_in, settings):
    for seed, name in enumerate(("kind", "brief")):
        torch.manual_seed(seed)
        with _disable_current_modes():
            lora = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
            get_peft_model(AutoModelForCausalLM.from_pretrained(llama), lora).save_pretrained(tmp_path / name)
    adapters = {name: tmp_path / name for name in ("kind", "brief")}
    build_adapter(llama, adapters, tmp_path / "cpu", progress=False, **settings)
    made = []
    real = module_builder.ModuleBuilder.build
    monkeypatch.setattr(module_builder.ModuleBuilder, "build", lambda *given: made.append(real(*given)) or made[-1])
    build_adapter(llama, adapters, tmp_path / "far", progress=False, device="meta", **settings)
    assert all(isinstance(tensor, Far) for factors, _ in made for factor in factors for tensor in (factor.a, factor.b))
    for index in range(3):
        near, far = (tiny.delta(tmp_path / place, "model.layers.0.mlp.up_proj", index) for place in ("cpu", "far"))
        torch.testing.assert_close(far, near, rtol=1e-3, atol=1e-5)


@pytest.mark.slow
def test_every_merge_and_all_that_is_captured_is_computed_on_the_device(
    everything, tmp_path, tiny, stand_in, decomposed
):
    settings = {**everything.settings, "r": 3, "dtype": "float32"}
    for place, kind in (("cpu", torch.Tensor), ("meta", Far)):
        decomposed.clear()
        build_adapter(everything.base, everything.policies, tmp_path / place, device=place, **settings)
        assert set(decomposed) == {kind}
        assert len(decomposed) == 9 * (
            2 + len(METHODS) + 1
        )  # 7 linear layers, embedding and head; a LoRA is taken as it is
    near, far = (tiny.tensors(tmp_path / place) for place in ("cpu", "meta"))
    assert near.keys() == far.keys()
    for name, tensor in near.items():
        torch.testing.assert_close(far[name], tensor, rtol=1e-3, atol=1e-4)


@pytest.fixture
def decomposed(monkeypatch):
    """Where every task vector that was truncated lay."""
    found = []
    real = module_builder.truncated_svd
    monkeypatch.setattr(
        module_builder,
        "truncated_svd",
        lambda delta, *given, **more: found.append(type(delta)) or real(delta, *given, **more),
    )
    return found


@pytest.mark.slow
def test_what_an_adapter_gains_is_computed_on_the_device(llama, policies, tmp_path, tiny, stand_in, decomposed):
    # `build` took a device, and the commands that add to what it built did not.
    third = tiny.rewrite(llama, tmp_path / "third", tiny.noisy(3))
    own = tiny.rewrite(llama, tmp_path / "own", tiny.noisy(4))
    build_adapter(llama, policies, tmp_path / "two", r=2, capture=["embeddings", "norms"], progress=False)
    for place, kind in (("cpu", torch.Tensor), ("meta", Far)):
        out = [tmp_path / f"{place}-{step}" for step in range(3)]
        decomposed.clear()
        add_objective(tmp_path / "two", "third", third, out[0], device=place)
        add_expert(out[0], [0.5, 0.25, 0.25], out[1], device=place)
        command = ["add-expert", str(out[1]), "--expert", f"0.25,0.75,0={own}", "--output", str(out[2])]
        assert main([*command, "--device", place]) == 0
        assert set(decomposed) == {kind}
        assert (
            len(decomposed) == 8 + (3 + 1) * 8 + 8
        )  # 7 linear layers and the embedding; a merge comes with its corners
    near, far = (tiny.tensors(tmp_path / f"{place}-2") for place in ("cpu", "meta"))
    assert near.keys() == far.keys()
    for name, tensor in near.items():
        torch.testing.assert_close(far[name], tensor, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("add", ["add-expert --expert 0.25,0.75", "add-objective --policy third={}"])
def test_no_device_adds_nothing(llama, policies, tmp_path, capsys, add):
    build_adapter(llama, policies, tmp_path / "two", r=2, progress=False)
    capsys.readouterr()
    name, *rest = add.format(policies["kind"]).split()
    given = [name, str(tmp_path / "two"), *rest, "--output", str(tmp_path / "out"), "--device", "mps"]
    assert main(given) == 2
    assert "device is 'mps'; allowed are 'cpu' and 'cuda'" in capsys.readouterr().err
    assert list(tmp_path.glob("*out*")) == []
    with pytest.raises(ExpertError, match="device is 'mps'") as caught:
        add_expert(tmp_path / "two", ExpertSpec([0.25, 0.75], policy=policies["kind"]), tmp_path / "out", device="mps")
    assert caught.value.argument == "device"


@pytest.mark.parametrize("method", METHODS)
def test_every_merge_stays_on_the_device_and_draws_the_same(stand_in, method):
    generator = torch.Generator().manual_seed(3)
    deltas = [torch.randn(24, 40, generator=generator) for _ in range(3)]
    weights, chosen = [0.2, 0.3, 0.5], check_merge(method, None)
    near = merge(deltas, weights, method, chosen)
    far = merge([delta.to(STAND_IN) for delta in deltas], weights, method, chosen)
    assert isinstance(far, Far)
    torch.testing.assert_close(far.near, near)


def test_a_threshold_is_the_same_wherever_it_is_found(stand_in):
    values = torch.randn(5000, generator=torch.Generator().manual_seed(0))
    found = []
    for tensor in (values, values.to(STAND_IN)):
        search = ThresholdSearch(0.4)
        search.count(tensor)
        assert search.narrow()
        search.count_inside(tensor)
        found.append((search.threshold, search.dropped))
    assert found[0] == found[1] == (float(values.abs().kthvalue(2000).values), 1999 / 5000)


@pytest.mark.parametrize("value", ["meta", "mps", "gpu", None, 1.5])
def test_what_is_no_device_for_a_build_is_refused(llama, policies, tmp_path, value):
    with pytest.raises(ExpertError, match=f"device is {str(value)!r}; allowed are 'cpu' and 'cuda'") as caught:
        build_adapter(llama, policies, tmp_path / "out", device=value)
    assert caught.value.argument == "device"
    assert list(tmp_path.glob("*out*")) == []


@pytest.mark.parametrize("value", ["cuda", "cuda:1"])
def test_a_gpu_that_is_not_there_is_refused_before_the_work(llama, policies, tmp_path, monkeypatch, value):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: value != "cuda")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: value != "cuda" or 0)
    with pytest.raises(
        ExpertError, match=f"device is '{value}', but torch .* GPU here; allowed are .*Build on the CPU"
    ) as caught:
        build_adapter(llama, policies, tmp_path / "out", device=value)
    assert caught.value.allowed == (["cpu"] if value == "cuda" else ["cpu", "cuda", "cuda:0"])
    with pytest.raises(ExpertError, match=f"device is '{value}'"):
        plan.plan_build(llama, policies, device=value)


def test_the_cpu_by_name_is_the_default(llama, policies, tmp_path):
    assert check_device("cpu") == check_device(torch.device("cpu")) == torch.device("cpu")
    for name, given in (("named", {"device": "cpu"}), ("default", {})):
        build_adapter(llama, policies, tmp_path / name, r=2, progress=False, **given)
    weights = [(tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("named", "default")]
    assert weights[0] == weights[1]


def test_a_gpu_s_memory_is_in_the_plan(llama, policies, monkeypatch, stand_in):
    monkeypatch.setattr("peft_hoe.experts.plan_times._GPU_SIDE", 64)
    near, far = plan.plan_build(llama, policies), plan.plan_build(llama, policies, device="meta")
    assert near.device_bytes == 0 < far.device_bytes
    assert near.memory_bytes == far.memory_bytes + far.device_bytes
    assert "of the GPU" in far.table()
