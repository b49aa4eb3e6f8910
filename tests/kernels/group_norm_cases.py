"""The Triton kernels of group norms in Triton's interpreter, on CPU tensors, against float64.

As ``interpreter_cases.py``: run by ``test_interpreter.py`` in a process of its own, where bfloat16 is rounded to zero.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional

import rds_fast
from rds_fast.kernels import group_norm, rows
from rds_fast.ops import group_norm as public
from tests.criteria import RELATIVE_TOLERANCE

# Half a unit in the last place at a power of two; for bfloat16 a whole one, for rounding towards zero.
TOLERANCE = RELATIVE_TOLERANCE | {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-7}

# (N, C, S), groups, and the programs that rows are spread over.
LAYER_ONE = (3, 1, 1), 1, 512  # K = 1
LAYER_SHORT = (600, 7, 1), 1, 4  # many rows a program, several tiles of rows each, the last with rows outside
LAYER = (5, 300, 1), 1, 2
LAYER_SPLIT = (2, 8_203, 1), 1, 512  # longer than a tile of float64: cut over programs
LAYER_LONG = (2, 8_203, 1), 1, 1  # one program a row
GROUP_OF_VALUES = (4, 12, 1), 3, 512
GROUP = (3, 8, 15), 2, 512
GROUP_SPLIT = (2, 4, 4_200), 2, 512
GROUP_LONG = (2, 4, 4_200), 2, 1
INSTANCE = (3, 5, 33), 5, 512
INSTANCE_SPLIT = (1, 3, 8_500), 3, 512
SHORT = [LAYER_ONE, LAYER_SHORT, LAYER, GROUP_OF_VALUES, GROUP, INSTANCE]
LONG = [LAYER_SPLIT, LAYER_LONG, GROUP_SPLIT, GROUP_LONG, INSTANCE_SPLIT]  # slow here: dtypes differ in loads alone
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
CASES = [(case, dtype, affine) for case in SHORT for dtype in DTYPES for affine in (True, False)]
CASES += [(case, torch.float64, True) for case in LONG]
Case = tuple[tuple[int, int, int], int, int]


@pytest.fixture(autouse=True)
def spread(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = request.node.callspec.params if hasattr(request.node, "callspec") else {}
    if "case" in arguments:
        monkeypatch.setattr(rows, "_PROGRAMS", arguments["case"][2])


def inputs(case: Case, dtype: torch.dtype) -> list[Tensor]:
    """x, u, v and x's cotangent; weight, bias and the cotangents of their gradients, all in float64's copy of dtype."""
    generator = torch.Generator().manual_seed(0)
    N, C, S = case[0]
    tensors = [torch.randn(N, C, S, generator=generator, dtype=torch.float64).to(dtype) for _ in range(4)]
    accumulated = rows.accumulation_dtype(dtype)
    return tensors + [torch.randn(C, generator=generator, dtype=torch.float64).to(accumulated) for _ in range(4)]


def raw(case: Case, tensors: list[Tensor], with_parameters: bool) -> list[Tensor]:
    """y; gx, gw, gb; the inner gx, without x's cotangent and sums over channels; du, dx, dw."""
    x, u, v, cotangent, w, b, a, h = tensors
    groups = case[1]
    weight, bias = (w, b) if with_parameters else (None, None)
    y, mean, rstd = group_norm.group_norm(x, weight, bias, groups, 1e-3)
    outer = group_norm.group_norm_backward(u, x, weight, mean, rstd, cotangent, groups, True)
    inner, *nothing = group_norm.group_norm_backward(u, x, weight, mean, rstd, None, groups, False)
    assert [t.numel() for t in nothing] == [0, 0]
    given = (v, a, h) if with_parameters else (v, None, None)
    double = group_norm.group_norm_double_backward(*given, u, x, weight, mean, rstd, groups, True)
    return [y, *outer, inner, *double]


def by_autograd(case: Case, tensors: list[Tensor], with_parameters: bool) -> list[Tensor]:
    x, u, v, cotangent, w, b, a, h = (t.double().clone().requires_grad_() for t in tensors)
    if not with_parameters:  # the sums are those at a weight of 1
        w, b, a, h = (t.detach() * 0 + one for t, one in ((w, 1), (b, 0), (a, 0), (h, 0)))
        w.requires_grad_()
        b.requires_grad_()
    y = functional.group_norm(x, case[1], w, b, 1e-3) if x.shape[0] * x.shape[2] > 1 else None
    assert y is not None
    gx, gw, gb = torch.autograd.grad(y, (x, w, b), u, create_graph=True)
    double = torch.autograd.grad((gx, gw, gb), (u, x, w), (v, a, h))
    return [t.detach() for t in (y, gx + cotangent, gw, gb, gx, *double)]


def sizes_of_terms(case: Case, tensors: list[Tensor], with_parameters: bool) -> list[float]:
    """How large the terms of each result's sums are, in all."""
    _, u, v, cotangent, w, b, a, h = (t.double().abs() for t in tensors)
    if not with_parameters:
        w, b, a, h = torch.ones_like(w), b * 0, a * 0, h * 0
    by_row = tensors[0].detach().double().reshape(case[0][0] * case[1], -1)
    r = float((by_row.var(1, unbiased=False) + 1e-3).rsqrt().max())
    unit = float(by_row.abs().max() * r)
    largest = [float(t.max()) for t in (w * 1, b, a, h, u, v, cotangent)]
    W, B, A, H, U, V, X = largest
    gx = r * W * U * (1 + unit)
    of_channel = float(u.sum((0, 2)).max())
    return [
        W * unit + B, gx + X, of_channel * unit, of_channel, gx, r * W * V * (1 + unit) + A * unit + H,
        r * r * W * U * V * (1 + unit) + r * A * U, of_channel * r * V * (1 + unit),
    ]  # fmt: skip


@pytest.mark.parametrize(("case", "dtype", "with_parameters"), CASES, ids=str)
def test_every_order(case: Case, dtype: torch.dtype, with_parameters: bool) -> None:
    tensors = inputs(case, dtype)
    ours = raw(case, tensors, with_parameters)
    truth = by_autograd(case, tensors, with_parameters)
    sizes = sizes_of_terms(case, tensors, with_parameters)
    for our, true, size in zip(ours, truth, sizes, strict=True):
        assert our.shape == true.shape
        assert (our.double() - true).abs().max() <= TOLERANCE[our.dtype] * size


@pytest.mark.parametrize("case", [LAYER, LAYER_SPLIT, GROUP, INSTANCE], ids=str)
def test_an_absent_cotangent_of_the_input_gradient_is_zero(case: Case) -> None:
    x, u, v, _, w, _, a, h = inputs(case, torch.float64)
    _, mean, rstd = group_norm.group_norm(x, w, None, case[1], 1e-3)
    absent = group_norm.group_norm_double_backward(None, a, h, u, x, w, mean, rstd, case[1], True)
    zero = group_norm.group_norm_double_backward(v * 0, a, h, u, x, w, mean, rstd, case[1], True)
    for one, other in zip(absent, zero, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("case", [LAYER, LAYER_SPLIT, LAYER_LONG, GROUP, INSTANCE], ids=str)
def test_a_large_mean_does_not_cost_the_variance(case: Case) -> None:
    x = inputs(case, torch.float32)[0] + 1e4
    x = torch.cat([x, x + 0.5], 2) if case[0][1] > 5000 else x  # float32 rows may be twice as long before they are cut
    _, mean, rstd = group_norm.group_norm(x, None, None, case[1], 1e-5)
    # A mean of 1e4 is rounded by up to 5e-4, whose square enters the variance where blocks or splits are merged.
    by_row = x.double().reshape(mean.numel(), -1)
    torch.testing.assert_close(mean.double(), by_row.mean(1), rtol=2e-7, atol=0)  # one step of float32
    torch.testing.assert_close(rstd.double(), (by_row.var(1, unbiased=False) + 1e-5).rsqrt(), rtol=3e-6, atol=0)


@pytest.mark.parametrize("case", [LAYER, LAYER_SPLIT, GROUP], ids=str)
def test_rows_of_zero_variance(case: Case) -> None:
    _, *rest = inputs(case, torch.float32)
    x = torch.full(case[0], 0.5)
    for our, true in zip(raw(case, [x, *rest], True), by_autograd(case, [x, *rest], True), strict=True):
        torch.testing.assert_close(our.double(), true, rtol=1e-4, atol=1e-3)


def test_no_rows() -> None:
    case = ((0, 4, 2), 2, 512)
    assert [t.shape for t in raw(case, inputs(case, torch.float32), True)[:3]] == [(0, 4, 2), (0, 4, 2), (4,)]


PUBLIC: dict[str, Callable[..., Tensor]] = {
    "layer_norm": lambda x, w, b: public.layer_norm(x, (4,), w, b),
    "group_norm": lambda x, w, b: public.group_norm(x.transpose(1, 2), 2, w, b),
    "instance_norm": lambda x, w, b: public.instance_norm(x.transpose(1, 2), weight=w, bias=b),
}


@pytest.mark.parametrize("name", PUBLIC)
def test_the_public_functions_are_differentiable_twice(name: str) -> None:
    x = torch.randn(1, 2, 4, dtype=torch.float64, requires_grad=True)
    w, b = (torch.randn(4, dtype=torch.float64, requires_grad=True) for _ in range(2))
    with rds_fast.use_backend("triton"):
        ours = PUBLIC[name](x, w, b)
        assert torch.autograd.gradcheck(PUBLIC[name], (x, w, b))
        assert torch.autograd.gradgradcheck(PUBLIC[name], (x, w, b))
    with rds_fast.use_backend("reference"):
        torch.testing.assert_close(ours, PUBLIC[name](x, w, b))
