"""Which kernel works out the gate of a routed module: Triton's, or plain operations of torch.

Both give the same numbers up to rounding. A module asks once for each plan, and a compiler once for each graph. Where votes are
static there is nothing to choose: the gate is then one multiplication.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from importlib import util

import torch

from ...errors import HoEError, check_choice

KERNELS = ("auto", "plain", "triton")
VARIABLE = "PEFT_HOE_KERNEL"
MOST_EXPERTS = 4096  # of one module, which a program of the kernel holds at once
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


class _Wanted:
    """What the process asks for.

    Attributes:
        kernel: one of `KERNELS`.
    """

    def __init__(self) -> None:
        self.kernel = os.environ.get(VARIABLE, "auto")
        check_choice(VARIABLE, self.kernel, KERNELS)


WANTED = _Wanted()


@contextlib.contextmanager
def use_kernel(kernel: str) -> Iterator[None]:
    """A block in which routed modules use a kernel, in all threads; the variable PEFT_HOE_KERNEL says so for a whole process.

    Args:
        kernel: "auto": Triton's where the weights lie on a GPU that it supports, in float32 or 16 bits, else plain. "plain":
            operations of torch alone. "triton": Triton's, or an error.

    Raises:
        HoEError: there is no such kernel, or Triton is not installed. A forward inside the block raises it too, where the
            kernel does not fit the device, the dtype, the number of experts or the kinds of routers.

    >>> import peft_hoe
    >>> model, tokenizer = peft_hoe.demo.load_demo_adapter(), peft_hoe.demo.load_tokenizer()
    >>> with peft_hoe.use_kernel("plain"):
    ...     _ = model(**tokenizer("Once upon a time", return_tensors="pt"), preference=[0.5, 0.5])
    """
    check_choice("kernel", kernel, KERNELS)
    if kernel == "triton" and not _installed():
        raise _refused(_NOT_INSTALLED)
    outer, WANTED.kernel = WANTED.kernel, kernel
    try:
        yield
    finally:
        WANTED.kernel = outer


def is_fused(device: torch.device, dtype: torch.dtype, experts: int, *, by_module: bool = False) -> bool:
    """Whether a routed module uses Triton's kernel.

    Args:
        device: of its weights.
        dtype: theirs.
        experts: in play.
        by_module: whether votes of routers that vote by module are worked out anew at each call.

    Raises:
        HoEError: that kernel is asked for, and does not fit.
    """
    if WANTED.kernel == "plain" or (WANTED.kernel == "auto" and device.type != "cuda"):
        return False
    problem = _problem(device, dtype, experts, by_module)
    if problem is not None and WANTED.kernel == "triton":
        raise _refused(problem)
    return problem is None


_NOT_INSTALLED = "Triton is not installed (it comes with torch for CUDA on Linux; else `pip install triton`)"


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _problem(device: torch.device, dtype: torch.dtype, experts: int, by_module: bool) -> str | None:
    """Why the kernel cannot be used; None where it can."""
    if not _installed():
        return _NOT_INSTALLED
    if device.type != "cuda" and not (device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"):
        return f"the weights lie on {device.type!r}, and Triton needs a GPU (TRITON_INTERPRET=1 runs it on the CPU, for tests)"
    if device.type == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability(device) < (7, 0):
        return f"{torch.cuda.get_device_name(device)} is older than what Triton supports (compute capability 7.0)"
    if dtype not in _DTYPES:
        return f"the weights are {dtype}, and the kernel sums in float32; it takes float32, float16 and bfloat16"
    if experts > MOST_EXPERTS:
        return f"{experts} experts are in play, and the kernel takes up to {MOST_EXPERTS}"
    if by_module:
        return "routers by module vote too, and the kernel does not take their votes while they train or in a compiled model"
    return None


def _installed() -> bool:
    return util.find_spec("triton") is not None


def _refused(problem: str) -> HoEError:
    return HoEError(
        f'the kernel "triton" cannot be used: {problem}. Take "auto" or "plain" (use_kernel, or the variable {VARIABLE})',
        argument="kernel",
        value="triton",
        allowed=("auto", "plain"),
    )
