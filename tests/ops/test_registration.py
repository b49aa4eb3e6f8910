"""How a Function calls the operation beside it: past PyTorch's dispatcher, where nobody would notice."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import rds_fast
from rds_fast import backends
from rds_fast.ops import registration
from tests.kernel_cases import ROW_FUNCTIONS, UNUSUAL_WAYS


class Recorder(TorchDispatchMode):
    """The names of the operations that a dispatch mode sees."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


class Labelled(Tensor):
    """A subclass that sees the operations on its instances."""

    seen: list[str] = []  # noqa: RUF012

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        cls.seen.append(str(func))
        plain = [t.as_subclass(Tensor) if isinstance(t, Labelled) else t for t in args]
        with torch._C._DisableTorchDispatch():
            return func(*plain, **(kwargs or {}))


def profiled() -> AbstractContextManager[Any]:
    return torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU])


CONTEXTS: dict[str, tuple[Callable[[], AbstractContextManager[Any]], bool]] = {
    "nothing": (nullcontext, True),
    "inference mode": (torch.inference_mode, False),
    "autocast": (lambda: torch.autocast("cpu"), True),
    "gradients": (torch.enable_grad, False),
    "profiler": (profiled, False),
    "dispatch mode": (Recorder, False),
    "fake tensors": (FakeTensorMode, False),
}


@pytest.mark.parametrize("name", CONTEXTS)
def test_who_is_watching(name: str) -> None:
    context, unwatched = CONTEXTS[name]
    x = torch.ones(3, 4)
    with torch.no_grad(), context():
        assert registration._is_unwatched((x, None, 1, 2.0, "native")) is unwatched


@torch.no_grad()
def test_which_arguments_are_plain() -> None:
    x = torch.ones(3, 4)
    assert registration._is_unwatched((x, torch.nn.Parameter(x)))
    assert not registration._is_unwatched((None, torch.ones(3, device="meta")))
    assert not registration._is_unwatched((x, x.as_subclass(Labelled)))
    assert not registration._is_unwatched((x, torch.complex(x, x).conj().imag))  # its memory is still to be negated
    assert not registration._is_unwatched((x, torch._efficientzerotensor((3,))))  # it has none
    assert not registration._is_unwatched((x, x.to_sparse()))
    assert not registration._is_unwatched((x, [x]))  # no operation takes one yet; nothing is known of its contents


@pytest.mark.filterwarnings("ignore:.*torch.jit.trace.*deprecated")
def test_transformations_are_seen() -> None:
    answers = []

    def function(x: Tensor) -> Tensor:
        with torch.no_grad():
            answers.append(registration._is_unwatched((torch.ones(2),)))
        return x.sum()

    torch.func.grad(function)(torch.ones(3))
    torch.vmap(function)(torch.ones(3, 2))
    torch.jit.trace(function, torch.ones(3), check_trace=False)
    assert answers == [False] * 3


@pytest.fixture
def penalty() -> Callable[[], None]:
    if backends.automatic("cpu") == "reference":
        pytest.skip("no kernels were built for this machine")

    def run() -> None:
        x = torch.randn(4, 5, generator=torch.Generator().manual_seed(0)).requires_grad_()
        (gradient,) = torch.autograd.grad(rds_fast.logsumexp(x).sum(), x, create_graph=True)
        rds_fast.gradient_norm(gradient).sum().backward()

    return run


ORDERS = [f"{name}{order}" for name in ("logsumexp", "gradient_norm") for order in ("", "_backward")]
ORDERS.append("logsumexp_double_backward")


def test_a_mode_and_the_profiler_see_the_operations(penalty: Callable[[], None]) -> None:
    with Recorder() as recorder:
        penalty()
    assert {f"rds_fast.{name}.default" for name in ORDERS} <= set(recorder.seen)
    with profiled() as profiler:
        penalty()
    assert {f"rds_fast::{name}" for name in ORDERS} <= {event.key for event in profiler.key_averages()}


def test_otherwise_the_kernels_are_called_directly(
    penalty: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The dispatcher's own way leads to the same kernels, but not from ``call``."""
    callers = []
    kernel = registration._kernel

    def recorded(*names: str) -> Any:
        callers.append(sys._getframe(1).f_code.co_name)
        return kernel(*names)

    monkeypatch.setattr(registration, "_kernel", recorded)
    penalty()
    assert callers == ["call"] * len(ORDERS)
    callers.clear()
    with Recorder():
        penalty()
    assert len(callers) == len(ORDERS)
    assert "call" not in callers


@pytest.mark.parametrize("way", UNUSUAL_WAYS)
@pytest.mark.parametrize("name", ROW_FUNCTIONS)
def test_tensors_that_are_more_than_memory(name: str, way: str, fused_backend: str) -> None:
    gradient = UNUSUAL_WAYS[way](ROW_FUNCTIONS[name])
    with rds_fast.use_backend("reference"):
        torch.testing.assert_close(gradient, UNUSUAL_WAYS[way](ROW_FUNCTIONS[name]))
