"""Which kernel runs, and what says no to one that cannot."""

from __future__ import annotations

import pytest
import torch

from peft_hoe import HoEError, use_kernel
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


def test_the_variable_is_read_and_checked(monkeypatch):
    monkeypatch.setenv(choice.VARIABLE, "plain")
    assert choice._Wanted().kernel == "plain"
    monkeypatch.setenv(choice.VARIABLE, "fast")
    with pytest.raises(HoEError, match="PEFT_HOE_KERNEL is 'fast'"):
        choice._Wanted()
