"""Which kernel runs, and what says no to one that cannot."""

from __future__ import annotations

import pytest
import torch

from peft_hoe import HoEError, RouterSpec, use_kernel
from peft_hoe.tuner.kernels import choice

CPU = torch.device("cpu")


def test_the_cpu_has_plain_operations_unless_asked(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(choice, "_installed", lambda: True)
    assert not choice.is_fused(CPU, torch.float32, 3)
    with use_kernel("triton"):
        assert choice.is_fused(CPU, torch.float32, 3)
        with use_kernel("plain"):
            assert not choice.is_fused(CPU, torch.float32, 3)
    assert not choice.is_fused(CPU, torch.float32, 3)


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ((CPU, torch.float64, 3), "float64"),
        ((CPU, torch.float32, 5000), "5000 experts"),
        ((torch.device("mps"), torch.float32, 3), "'mps'"),
    ],
)
def test_a_forced_kernel_that_does_not_fit_is_refused(monkeypatch, place, message):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(choice, "_installed", lambda: True)
    with use_kernel("triton"), pytest.raises(HoEError, match=message) as caught:
        choice.is_fused(*place)
    assert caught.value.allowed == ("auto", "plain")


def test_a_model_refuses_too(hoe_llama, tokens, monkeypatch):
    monkeypatch.setattr(choice, "_installed", lambda: True)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    model = hoe_llama(trained=True)
    with use_kernel("triton"):
        model(tokens, preference=[1.0, 0.0])  # static: there is nothing to choose
        with pytest.raises(HoEError, match="needs a GPU"):
            model(tokens, preference=[0.25, 0.75])
    model(tokens, preference=[0.25, 0.75])


def test_without_triton_it_cannot_be_forced(monkeypatch):
    monkeypatch.setattr(choice, "_installed", lambda: False)
    with pytest.raises(HoEError, match="Triton is not installed"), use_kernel("triton"):
        pass
    with pytest.raises(HoEError, match="'auto', 'plain', 'triton'"), use_kernel("cuda"):
        pass


def test_what_the_variable_asks_for_is_refused_at_the_first_use(monkeypatch, hoe_llama, tokens):
    monkeypatch.setattr(choice, "_installed", lambda: False)
    monkeypatch.setattr(choice.WANTED, "kernel", "triton")
    with pytest.raises(HoEError, match="Triton is not installed"):
        hoe_llama(trained=True)(tokens, preference=[0.25, 0.75])


def test_an_old_gpu_is_refused_and_not_chosen(monkeypatch):
    monkeypatch.setattr(choice, "_installed", lambda: True)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (6, 1))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Tesla P4")
    place = torch.device("cuda"), torch.float16, 3
    assert not choice.is_fused(*place)
    with use_kernel("triton"), pytest.raises(HoEError, match=r"Tesla P4 is older .* \(compute capability 7.0\)"):
        choice.is_fused(*place)


def test_routers_by_module_that_train_are_refused_beside_those_by_token(hoe_llama, tokens, monkeypatch):
    """Their votes would need gradients from the kernel. As they stand, it takes them."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(choice, "_installed", lambda: True)
    routers = [RouterSpec([0.25, 0.75], kind="module"), RouterSpec([0.75, 0.25])]
    model, rows = hoe_llama(trained=True, routers=routers), [[0.4, 0.6], [0.6, 0.4], [1.0, 0.0]]
    for name, parameter in model.named_parameters():
        if name.endswith("hoe_router.default.weight"):
            parameter.data[:2] = 0
    with use_kernel("triton"), pytest.raises(HoEError, match="routers by module vote too"):
        model(tokens, preference=rows)
    model(tokens, preference=rows)


def test_the_variable_is_read_and_checked(monkeypatch):
    monkeypatch.setenv(choice.VARIABLE, "plain")
    assert choice._Wanted().kernel == "plain"
    monkeypatch.setenv(choice.VARIABLE, "fast")
    with pytest.raises(HoEError, match="PEFT_HOE_KERNEL is 'fast'"):
        choice._Wanted()
