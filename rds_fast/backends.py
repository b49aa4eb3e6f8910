"""Which implementation of an operation runs, and why.

Three implementations stand behind every operation:

- ``"reference"``: plain PyTorch (``rds_fast.reference``), everywhere;
- ``"native"``: C++ for CPU, CUDA C++ for NVIDIA GPUs, where they were built;
- ``"triton"``: Triton kernels for GPUs; on CPU tensors only in Triton's interpreter (``TRITON_INTERPRET=1``).

The choice is made once, in the forward, and handed to every backward as an argument: the backward of a CUDA operation
runs on another thread, where thread-local state and context variables do not follow.
"""

from __future__ import annotations

import functools
import importlib.util
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from pathlib import Path

import torch
from torch import Tensor
from torch.autograd import forward_ad

BACKENDS = ("reference", "native", "triton")

# The types of tensors whose operations are the dispatcher's alone: a subclass has ways of its own.
PLAIN_TENSORS = frozenset((Tensor, torch.nn.Parameter))

# The order in which "auto" tries the implementations, by device. CPU: Triton's interpreter is for tests, never chosen.
# CUDA: native first, because one launch costs a few microseconds less on the host than Triton's launcher, which is
# what short rows wait for. Anything else (MPS, XLA): PyTorch.
_PREFERENCE = {"cpu": ("native", "reference"), "cuda": ("native", "triton", "reference")}

# The devices for which the operations of a network's layers have native kernels; on GPUs they are Triton's.
LAYERS_NATIVE_ON = ("cpu",)

_LIBRARIES = {"cpu": "_native_cpu.so", "cuda": "_native_cuda.so"}

_requested: ContextVar[str] = ContextVar("rds_fast_backend", default="auto")


@functools.cache
def _native_failure(device_type: str) -> str | None:
    """Loads the native library of a device; None if its kernels are usable, else the reason why not."""
    if device_type not in _LIBRARIES:
        return f"there are no native kernels for {device_type}"
    if device_type == "cuda":
        if not torch.cuda.is_available():
            return "no CUDA device is present"
        if torch.version.hip is not None:
            return "the native kernels are CUDA C++, and this is a ROCm build of PyTorch"
        failure = _native_failure("cpu")  # it declares the schemas that the CUDA library implements
        if failure is not None:
            return failure
    path = Path(__file__).parent / _LIBRARIES[device_type]
    if not path.exists():
        return f"{path.name} was not built (see 'Building' in README.md)"
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        return f"{path.name} was built for another PyTorch or system and cannot be loaded: {error}"
    return None


@functools.cache
def _triton_failure(device_type: str) -> str | None:
    """None if the Triton kernels are usable on a device, else the reason why not."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed (pip install 'rds_fast[triton]')"
    if device_type == "cuda":
        return None if torch.cuda.is_available() else "no CUDA device is present"
    if device_type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1":
        return None
    return f"Triton does not run on {device_type} (on cpu: only in its interpreter, TRITON_INTERPRET=1)"


def failure(backend: str, device_type: str) -> str | None:
    """Why ``backend`` cannot run on ``device_type``; None if it can."""
    if backend == "native":
        return _native_failure(device_type)
    if backend == "triton":
        return _triton_failure(device_type)
    return None


def available(device: torch.device | str | None = None) -> tuple[str, ...]:
    """The implementations usable on a device.

    Args:
        device: a device or its name; default: ``"cuda"`` where a CUDA device is present, else ``"cpu"``.

    Returns:
        A tuple of ``"reference"``, ``"native"``, ``"triton"``, those that can run there.

    Raises:
        ValueError: there is no such kind of device.
    """
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device_type = torch.device(device).type
    except (RuntimeError, TypeError) as error:
        raise ValueError(
            f"device is {device!r}; it must be a torch.device or the name of one, such as 'cpu', 'cuda', 'cuda:1'"
        ) from error
    return tuple(backend for backend in BACKENDS if failure(backend, device_type) is None)


@contextmanager
def use_backend(backend: str) -> Iterator[None]:
    """Force one implementation for the operations called inside the ``with`` block, and for their backwards.

    Args:
        backend: ``"auto"`` (the default outside), ``"reference"``, ``"native"`` or ``"triton"``.

    Raises:
        ValueError: the name is none of these.
        RuntimeError: raised by the operation, not here, if the implementation cannot run on its input's device.
    """
    if backend not in ("auto", *BACKENDS):
        raise ValueError(f"backend is {backend!r}; it must be one of 'auto', 'reference', 'native', 'triton'")
    token = _requested.set(backend)
    try:
        yield
    finally:
        _requested.reset(token)


def implementation(fast: bool) -> AbstractContextManager[None]:
    """``fast=False``: the operations inside, and the model's layers, run on plain PyTorch."""
    return nullcontext() if fast else use_backend("reference")


@functools.cache
def automatic(device_type: str, native_on: tuple[str, ...] = ("cpu", "cuda")) -> str:
    """What "auto" means on a device, for an operation with native kernels on the devices ``native_on``."""
    order = _PREFERENCE.get(device_type, ("reference",))
    return next(
        backend
        for backend in order
        if failure(backend, device_type) is None and (backend != "native" or device_type in native_on)
    )


def select(x: Tensor, native_on: tuple[str, ...] = ("cpu", "cuda"), *, has_kernels: bool = True) -> str:
    """The implementation that an operation on ``x`` uses now.

    Under the compiler's tracer it is the reference: the compiler fuses the plain formula itself, and a compiled
    ``torch.func.grad`` of nested autograd Functions is wrong without an error. In forward mode it is the reference as
    well: nested forward-mode derivatives lose terms in autograd Functions, again without an error. And under
    ``torch.jit.trace``, whose graphs are saved, and loaded where there are no Functions of ours. On meta tensors
    nothing runs, and the fused operation is to be seen whatever was built.

    ``native_on``: the devices for which the operation has native kernels. ``has_kernels``: False for one that is made
    of PyTorch's kernels alone, so that it does not matter whether those which ``use_backend`` forces can run.
    """
    if torch.compiler.is_compiling() or forward_ad._current_level >= 0 or torch._C._is_tracing():
        return "reference"
    device_type = x.device.type
    requested = _requested.get()
    if requested == "reference":
        return "reference"
    if device_type == "meta":
        return "native"
    if requested == "auto":
        return automatic(device_type, native_on)
    if not has_kernels:
        return requested
    reason = failure(requested, device_type)
    if reason is None and requested == "native" and device_type not in native_on:
        reason = f"this operation has no native kernel for {device_type}"
    if reason is not None:
        raise RuntimeError(
            f"backend {requested!r} was requested for a tensor on {device_type}, where it cannot run: {reason}. "
            f"Usable there: {', '.join(available(device_type))}."
        )
    return requested


def in_transformation() -> bool:
    """Whether a transformation of ``torch.func`` is at work."""
    return torch._C._functorch.maybe_current_level() is not None


def select_for_layer(x: Tensor, *, has_kernels: bool = True) -> str:
    """As ``select``, for an operation of a network's layers: native kernels on CPU, Triton on GPUs.

    Inside a transformation of ``torch.func`` it is the reference too: these operations have no batching rules. So it is
    under ``torch.jit.trace``, which records PyTorch's own operations.
    """
    if in_transformation() or torch._C._get_tracing_state() is not None:
        return "reference"
    return select(x, native_on=LAYERS_NATIVE_ON, has_kernels=has_kernels)


def runs_plainly(x: Tensor) -> bool:
    """Whether PyTorch's own function runs in place of one of ours that is made of PyTorch's kernels alone."""
    return select_for_layer(x, has_kernels=False) == "reference"
