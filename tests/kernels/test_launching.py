"""The short way of a launch: which launches are alike, and what is handed on."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch

triton = pytest.importorskip("triton")
if triton.knobs.runtime.interpret:
    pytest.skip("the interpreter launches in its own way", allow_module_level=True)

import triton.language as tl  # noqa: E402
from triton.compiler import CompiledKernel  # noqa: E402
from triton.runtime.jit import JITFunction  # noqa: E402

from rds_fast.kernels.launching import Kernel, kernel  # noqa: E402


@kernel("N")
def copy(x_ptr, other_ptr, N, stride, factor, FLAG: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    pass


class Compiled(CompiledKernel):
    """What Triton would have compiled; it keeps what it is called with."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return lambda *arguments: self.calls.append((grid, *arguments))


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[Compiled]:
    """What was compiled, in order."""
    found: list[Compiled] = []

    def run(self: JITFunction, *arguments: Any, grid: Any, warmup: bool, **options: Any) -> Compiled:
        found.append(Compiled())
        return found[-1]

    monkeypatch.setattr(JITFunction, "run", run)
    monkeypatch.setattr(copy, "_compiled", {})
    return found


X = torch.zeros(64)
LAUNCH: dict[str, Any] = {"x": X, "other": None, "N": 5, "stride": 8, "factor": 0.5, "FLAG": True, "BLOCK": 16}


def launch(**changed: Any) -> None:
    values = {**LAUNCH, **changed}
    options = {name: values.pop(name) for name in ("FLAG", "BLOCK")}
    copy[(7,)](*values.values(), **options, num_warps=4)


def test_a_launch_like_one_before_is_direct(compiled: list[Compiled]) -> None:
    launch()
    launch()
    launch(N=6, factor=1.5, x=torch.zeros(32))
    (kernel,) = compiled
    address = X.data_ptr()
    assert kernel.calls[0] == ((7, 1, 1), address, None, 5, 8, 0.5, True, 16)
    assert kernel.calls[1][3:6] == (6, 8, 1.5)
    assert kernel.calls[1][1] != address


@pytest.mark.parametrize(
    "changed",
    [
        {"x": X.double()},
        {"other": X},
        {"N": 2**31},  # int64
        {"stride": 9},  # Triton specialises on its value
        {"stride": 1},
        {"stride": 1.0},
        {"N": 0.5},
        {"FLAG": False},
        {"BLOCK": 32},
        {"FLAG": 1, "BLOCK": 2},
        {"x": torch.nn.Parameter(X.half())},
    ],
    ids=str,
)
def test_another_is_compiled(compiled: list[Compiled], changed: dict[str, Any]) -> None:
    launch()
    launch(**changed)
    launch()
    launch(**changed)
    assert [len(kernel.calls) for kernel in compiled] == [1, 1]


def test_another_device_is_another_launch(compiled: list[Compiled], monkeypatch: pytest.MonkeyPatch) -> None:
    launch(other=X)
    monkeypatch.setattr(torch.Tensor, "get_device", lambda self: int(self is X))  # the second of two
    launch(x=X.clone(), other=X)
    launch(x=X.clone(), other=X)
    assert [len(kernel.calls) for kernel in compiled] == [0, 1]


def test_names_of_options_count(compiled: list[Compiled]) -> None:
    for options in ({"FLAG": 1, "BLOCK": 2}, {"BLOCK": 1, "FLAG": 2}):
        copy[(1,)](X, None, 5, 8, 0.5, **options)
    assert len(compiled) == 2


def test_grids(compiled: list[Compiled]) -> None:
    for grid in ((3,), (3, 4), (3, 4), (3, 4, 5)):
        copy[grid](X, None, 5, 8, 0.5, FLAG=True, BLOCK=16)
    assert [call[0] for call in compiled[0].calls] == [(3, 4, 1), (3, 4, 1), (3, 4, 5)]


@pytest.mark.parametrize("name", ["x", "other"])
def test_what_is_not_aligned_is_left_to_triton(compiled: list[Compiled], name: str) -> None:
    launch(other=X)
    for first in (1, 1, 4, 1):  # four values are 16 bytes
        launch(**{"other": X, name: X[first:]})
    assert [len(kernel.calls) for kernel in compiled] == [1, 0, 0, 0]


def test_subclasses_are_left_to_triton_and_not_kept(compiled: list[Compiled]) -> None:
    class Image(torch.Tensor):
        pass

    references = []
    for _ in range(3):
        x = torch.zeros(64).as_subclass(Image)
        references.append(weakref.ref(x))
        launch(x=x)
        del x
    assert [len(kernel.calls) for kernel in compiled] == [0, 0, 0]
    assert not any(reference() is not None for reference in references)


def test_a_missing_argument_is_an_error(compiled: list[Compiled]) -> None:
    with pytest.raises(ValueError, match="zip"):
        copy[(1,)](X, None, 5, FLAG=True, BLOCK=16)


def test_compile_time_arguments_come_last() -> None:
    def misplaced(FLAG: tl.constexpr, x_ptr):  # type: ignore[no-untyped-def]
        pass

    with pytest.raises(TypeError, match="misplaced: compile-time arguments must come last"):
        Kernel(misplaced, ())
