"""The Triton kernels of batch norm in Triton's interpreter, on CPU tensors, against float64.

Run by ``test_interpreter.py`` in a process of its own: the interpreter takes the compiler's place for a whole process.
It computes with numpy.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
import triton.language as tl
from torch import Tensor
from triton.runtime import interpreter

import rds_fast
from rds_fast.kernels import batch_norm, channels
from rds_fast.ops import batch_norm as operation
from rds_fast.ops import registration
from tests.batch_norm_orders import OPTIONAL, by_kernels, check, inputs

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
CONTIGUOUS = torch.contiguous_format
LAST, LAST_3D = torch.channels_last, torch.channels_last_3d

# With three programs a channel, and three that write.
SIZES = [
    ((1, 3), CONTIGUOUS),  # one value a channel
    ((4, 70), CONTIGUOUS),  # two blocks of channels, the second not full
    ((9001, 2), CONTIGUOUS),  # 512 rows a part: several splits of several tiles, the last not full
    ((1, 2, 5), CONTIGUOUS),  # one sample
    ((40, 5, 3, 3), CONTIGUOUS),  # four channels make a run; the second block of channels and the last tile not full
    ((40, 5, 3, 3), LAST),
    ((2, 3, 8, 8), CONTIGUOUS),  # vector loads
    ((2, 2, 20, 61), CONTIGUOUS),  # planes longer than a tile, a position that no vector load divides
    ((2, 2, 20, 61), LAST),
    ((130, 64, 1, 1), LAST),  # a full block of channels, aligned
    ((2, 3, 2, 3, 4), CONTIGUOUS),
    ((2, 3, 2, 3, 4), LAST_3D),
]
SMALL = SIZES[4:6]


def rounded_to_nearest(input: Any, input_dtype: Any, output_dtype: Any, rounding_mode: Any) -> Any:
    """The interpreter's conversion between float types; but to bfloat16 as GPUs do, not towards zero."""
    if (input_dtype, output_dtype) != (tl.float32, tl.bfloat16):
        return _convert_float(input, input_dtype, output_dtype, rounding_mode)
    values = torch.from_numpy(np.ascontiguousarray(input).view(np.float32).copy())
    return values.bfloat16().view(torch.int16).numpy().view(np.uint16).reshape(input.shape)


_convert_float = interpreter._convert_float


@pytest.fixture(autouse=True)
def three_programs(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Few programs, so that a small tensor gives each several tiles."""
    monkeypatch.setattr(channels, "_PROGRAMS", 3)
    monkeypatch.setattr(channels, "_WRITE_PROGRAMS", 3)
    monkeypatch.setattr(interpreter, "_convert_float", rounded_to_nearest)
    channels._plan.cache_clear()
    yield
    channels._plan.cache_clear()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("shape", "memory_format"), SIZES, ids=str)
def test_train_mode(shape: tuple[int, ...], memory_format: torch.memory_format, dtype: torch.dtype) -> None:
    check(batch_norm, inputs(shape, dtype, memory_format), True, 0.1, True)


@pytest.mark.parametrize(("shape", "memory_format"), SIZES, ids=str)
def test_train_mode_mask_from_x(shape: tuple[int, ...], memory_format: torch.memory_format) -> None:
    i = inputs(shape, torch.bfloat16, memory_format, without=("residual", "vresidual"))
    check(batch_norm, i, True, 1e-5, True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("shape", "memory_format"), SMALL, ids=str)
@pytest.mark.parametrize("residual", [True, False], ids=["residual", "no residual"])
def test_eval_mode(
    shape: tuple[int, ...], memory_format: torch.memory_format, residual: bool, dtype: torch.dtype
) -> None:
    without = () if residual else ("residual", "vresidual")
    check(batch_norm, inputs(shape, dtype, memory_format, without=without), False, 1e-5, True)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("relu", [True, False], ids=["relu", "no relu"])
@pytest.mark.parametrize("absent", [(), *((name,) for name in OPTIONAL), OPTIONAL], ids=str)
def test_absent_tensors(absent: tuple[str, ...], relu: bool, training: bool) -> None:
    absent += ("vresidual",) if "residual" in absent else ()
    check(batch_norm, inputs((7, 3, 5), torch.float64, without=absent), training, 0.5, relu)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_parameters_of_another_dtype(dtype: torch.dtype, training: bool) -> None:
    check(batch_norm, inputs((40, 5, 3, 3), torch.bfloat16, LAST, parameter_dtype=dtype), training, 1e-5, True)


@pytest.mark.parametrize("memory_format", [CONTIGUOUS, LAST], ids=str)
def test_a_large_mean_costs_no_digits(memory_format: torch.memory_format) -> None:
    """Mean 1e4 and deviation 1, where E[x²] − E[x]² has no correct digit in float32."""
    x = (1e4 + torch.randn(60, 3, 8, 8, generator=torch.Generator().manual_seed(0))).contiguous(
        memory_format=memory_format
    )
    x[0] += 20  # the first tile is far from the others
    _, mean, var = batch_norm.batch_norm(x, None, None, None, None, None, 0.1, 1e-5, False)
    truth = x.double().transpose(0, 1).flatten(1)
    torch.testing.assert_close(mean.double(), truth.mean(1), rtol=1e-7, atol=0)
    torch.testing.assert_close(var.double(), truth.var(1, correction=0), rtol=1e-5, atol=0)


@pytest.mark.parametrize(("shape", "memory_format"), SMALL, ids=str)
def test_zero_variance(shape: tuple[int, ...], memory_format: torch.memory_format) -> None:
    i = inputs(shape, torch.float32, memory_format)
    i.x[:, 1] = 3.0
    results = check(batch_norm, i, True, 1e-5, True)
    assert results["var"][1] == 0
    assert results["mean"][1] == 3


@pytest.mark.parametrize(("shape", "memory_format"), [*SMALL, SIZES[0], SIZES[2]], ids=str)
@pytest.mark.parametrize("tracked", [(True, True), (True, False), (False, True)], ids=str)
def test_running_statistics(
    shape: tuple[int, ...], memory_format: torch.memory_format, tracked: tuple[bool, bool]
) -> None:
    """Updated once, with the unbiased variance; for one value a channel, with the variance 0."""
    x = inputs(shape, torch.float64, memory_format).x
    start = [torch.rand(shape[1], dtype=torch.float64) if t else None for t in tracked]
    updated = [None if t is None else t.clone() for t in start]
    batch_norm.batch_norm(x, None, None, None, *updated, 0.3, 1e-5, False)
    values = x.transpose(0, 1).flatten(1)
    count = values.shape[1]
    statistics = (values.mean(1), values.var(1, correction=0) * count / max(count - 1, 1))
    for before, after, new in zip(start, updated, statistics, strict=True):
        if before is not None:
            torch.testing.assert_close(after, 0.7 * before + 0.3 * new, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("relu", [True, False], ids=["relu", "no relu"])
def test_public_operation(monkeypatch: pytest.MonkeyPatch, relu: bool) -> None:
    """Every order through autograd, and the launchers that it reaches."""
    reached: Counter[str] = Counter()
    for name in ("batch_norm", "batch_norm_backward", "batch_norm_double_backward"):
        monkeypatch.setattr(batch_norm, name, counted(reached, name, getattr(batch_norm, name)))
    i = inputs((3, 2, 2, 2), torch.float64, LAST)
    leaves = [t.requires_grad_() for t in (i.x, i.weight, i.bias, i.residual)]

    def function(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor) -> Tensor:
        return operation.batch_norm(x, None, None, weight, bias, True, eps=0.3, residual=residual, relu=relu)

    registration._kernel.cache_clear()
    with rds_fast.use_backend("triton"):
        assert torch.autograd.gradcheck(function, leaves, fast_mode=True)
        assert torch.autograd.gradgradcheck(function, leaves, fast_mode=True)
    registration._kernel.cache_clear()
    assert len(reached) == 3


def counted(counter: Counter[str], name: str, launcher: Callable[..., Any]) -> Callable[..., Any]:
    def launch(*arguments: Any) -> Any:
        counter[name] += 1
        return launcher(*arguments)

    return launch


def test_nan_and_infinity_stay_in_their_channel() -> None:
    i = inputs((40, 5, 3, 3), torch.float32, LAST)
    i.x[2, 1, 0, 0], i.x[3, 2, 0, 0] = float("nan"), float("inf")
    results = by_kernels(batch_norm, i, True, 1e-5, False)

    def finite(t: Tensor) -> list[bool]:
        return t.transpose(0, 1).reshape(5, -1).isfinite().all(1).tolist() if t.dim() > 1 else t.isfinite().tolist()

    for name in ("y", "gx", "du", "dx", "var", "gweight", "dweight"):
        assert finite(results[name]) == [True, False, False, True, True], name


def test_the_mask_is_the_forwards() -> None:
    """Values that the normalisation takes to within rounding of zero: of either sign, and both orders agree on it."""
    x = torch.randn(500, 4, generator=torch.Generator().manual_seed(0))
    bias = torch.zeros(4)
    mean, var = x.mean(0), x.var(0, correction=0)
    x = mean + torch.arange(-250, 250)[:, None] * 2.0**-24 * mean.abs()  # steps of about a unit in the last place
    y = batch_norm.batch_norm_inference(x, mean, var, None, bias, None, 1e-5, True)
    one = torch.ones_like(x)
    gx, *_ = batch_norm.batch_norm_backward(one, None, x, None, None, bias, mean, var, None, False, 1e-5, True)
    du, *_ = batch_norm.batch_norm_double_backward(
        one, None, None, None, one, x, None, None, bias, mean, var, False, 1e-5, True, False
    )
    assert torch.equal(gx > 0, y > 0)
    assert torch.equal(du > 0, y > 0)
    assert 0 < (y > 0).sum() < y.numel()
