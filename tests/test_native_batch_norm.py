"""The CPU kernels of batch norm, torch.ops.rds_fast_native.batch_norm*, against PyTorch in float64.

The truth is PyTorch's batch norm, its gradient and the gradient of that, in float64 of the same (rounded) inputs;
"theirs" is what PyTorch gives in the dtype itself.
"""

from __future__ import annotations

import os
import subprocess
import sys
from functools import partial
from itertools import product
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from criteria import assert_accurate as assert_rows_accurate
from threads import assert_same_bits_with_any_number_of_threads
from torch import Tensor

from rds_fast import backends
from rds_fast.reference import accumulation_dtype

failure = backends.failure("native", "cpu")
pytestmark = pytest.mark.skipif(failure is not None, reason=f"the native CPU kernels: {failure}")
native = torch.ops.rds_fast_native

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
SIZES = (
    (1, 1),  # one value: x̂ is 0 and every derivative with it
    (1, 5),  # M = 1
    (2, 300),  # channels that are more than half a strip: samples are not joined
    (7, 3),  # samples joined into one row, which is not full
    (2000, 3),  # many rows of joined samples, the last not full
    (300, 600),  # two strips, the second shorter; rows over several tiles
    (5, 3, 1, 4),  # planes shorter than a vector
    (4, 40, 7, 7),  # several strips of short planes that are no multiple of a vector
    (70, 2, 10),  # more rows than one tile
    (3, 2, 129),  # the shortest planes treated as such, and a remainder
    (1, 3, 100, 101),  # N = 1, planes of two tiles
    (150, 9, 2, 8, 8),  # several planes a tile, several tiles, enough strips for a thread to take whole ones
)
LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


class Case(NamedTuple):
    """What is there beside x and u."""

    training: bool = True
    affine: bool = True
    relu: bool = False
    residual: bool = False
    eps: float = 1e-5


class Given(NamedTuple):
    """The inputs of all three orders; absent ones are None."""

    x: Tensor
    weight: Tensor | None
    bias: Tensor | None
    residual: Tensor | None
    mean: Tensor | None
    var: Tensor | None
    u: Tensor
    x_cotangent: Tensor | None
    v: Tensor | None
    vweight: Tensor | None
    vbias: Tensor | None
    vresidual: Tensor | None

    def to(self, dtype: torch.dtype, of_channels: torch.dtype) -> Given:
        return Given(*(t if t is None else t.to(of_channels if t.dim() == 1 else dtype) for t in self))


ALL_COTANGENTS = frozenset(("x_cotangent", "v", "vweight", "vbias", "vresidual"))


def given(
    size: tuple[int, ...],
    dtype: torch.dtype,
    case: Case,
    *,
    present: frozenset[str] = ALL_COTANGENTS,
    channels_last: bool = False,
    mean: float = 0.5,
) -> Given:
    generator = torch.Generator().manual_seed(sum(size) * 1009 + len(size))

    def normal(*shape: int, scale: float = 1.0, mean: float = 0.0) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64) * scale + mean

    channels = size[1]
    values = Given(
        x=normal(*size, scale=1.5, mean=mean),
        weight=normal(channels, mean=1.0),
        bias=normal(channels),
        residual=normal(*size),
        mean=normal(channels, scale=0.3, mean=mean),
        var=normal(channels).square() + 0.5,
        u=normal(*size, mean=0.3),
        x_cotangent=normal(*size),
        v=normal(*size, mean=-0.4),
        vweight=normal(channels),
        vbias=normal(channels),
        vresidual=normal(*size),
    )
    absent = ALL_COTANGENTS - present
    absent |= set() if case.affine else {"weight", "bias"}
    absent |= set() if case.residual else {"residual", "vresidual"}
    absent |= {"mean", "var"} if case.training else set()
    values = values._replace(**dict.fromkeys(absent)).to(dtype, accumulation_dtype(dtype))
    if channels_last and len(size) in LAST:
        values = Given(
            *(t if t is None or t.dim() == 1 else t.contiguous(memory_format=LAST[len(size)]) for t in values)
        )
    return values


class Results(NamedTuple):
    """du is masked; without a residual there is no gresidual, without need no dx: None. gx_again has no x_cotangent."""

    y: Tensor
    gx: Tensor
    gweight: Tensor
    gbias: Tensor
    gresidual: Tensor | None
    du: Tensor
    dx: Tensor | None
    dweight: Tensor
    gx_again: Tensor
    mean: Tensor
    var: Tensor


def run(t: Given, case: Case) -> Results:
    if case.training:
        y, mean, var = native.batch_norm(t.x, t.weight, t.bias, t.residual, None, None, 0.1, case.eps, case.relu)
    else:
        y = native.batch_norm_inference(t.x, t.mean, t.var, t.weight, t.bias, t.residual, case.eps, case.relu)
        mean, var = t.mean, t.var
    source = y if case.relu and case.residual else None
    rest = (source, t.weight, t.bias, mean, var)
    flags = (case.training, case.eps, case.relu)
    gx, gweight, gbias, gresidual, _ = native.batch_norm_backward(t.u, None, t.x, *rest, t.x_cotangent, *flags)
    assert gresidual.numel() == (0 if source is None else t.x.numel())
    u = t.u if source is None else gresidual
    arguments = (t.v, t.vweight, t.vbias, t.vresidual, u, t.x, *rest, *flags)
    du, dx, dweight, gx_again = native.batch_norm_double_backward(*arguments, True)
    *alone, none = native.batch_norm_double_backward(*arguments, False)
    assert none.numel() == 0
    for one, beside in zip(alone, (du, dx, dweight), strict=True):
        torch.testing.assert_close(one, beside, rtol=0, atol=0, equal_nan=True)
    for result in (y, gx, du, gx_again, *(() if source is None else (gresidual,))):
        assert result.stride() == t.x.stride()
    has_dx = case.training or t.vweight is not None
    assert dx.stride() == t.x.stride() if has_dx else dx.shape == (0,)
    return Results(y, gx, gweight, gbias, None if source is None else gresidual, du, dx if has_dx else None,
                   dweight, gx_again, mean, var)  # fmt: skip


def autograd(t: Given, case: Case, mask: Tensor) -> Results:
    """The same by PyTorch's autograd of the plain formula, in the dtypes of ``t``; ``mask`` is [y > 0] of the truth."""
    dims = [d for d in range(t.x.dim()) if d != 1]
    wide = accumulation_dtype(t.x.dtype)

    def along(values: Tensor) -> Tensor:
        return values.reshape(1, -1, *[1] * (t.x.dim() - 2))

    x = t.x.detach().requires_grad_()
    u = t.u.detach().requires_grad_()
    weight = (torch.ones(x.shape[1], dtype=wide) if t.weight is None else t.weight).detach().requires_grad_()
    bias = (torch.zeros(x.shape[1], dtype=wide) if t.bias is None else t.bias).detach().requires_grad_()
    residual = (torch.zeros_like(x) if t.residual is None else t.residual).detach().requires_grad_()
    var, mean = torch.var_mean(x.to(wide), dims, correction=0) if case.training else (t.var, t.mean)
    normed = (x.to(wide) - along(mean)) * along((var + case.eps).rsqrt())
    z = normed * along(weight) + along(bias) + residual
    y = (z * mask if case.relu else z).to(x.dtype)
    inputs = (x, weight, bias, residual)
    firsts = torch.autograd.grad(y, inputs, u, create_graph=True)
    cotangents = [torch.zeros_like(f) if c is None else c for f, c in zip(
        firsts, (t.v, t.vweight, t.vbias, t.vresidual), strict=True)]  # fmt: skip
    seconds = torch.autograd.grad(firsts, (u, x, weight), cotangents, allow_unused=True)
    seconds = [torch.zeros_like(i) if s is None else s for s, i in zip(seconds, (u, x, weight), strict=True)]
    gx_again, gweight, gbias, gresidual = (f.detach() for f in firsts)
    gx = gx_again if t.x_cotangent is None else gx_again + t.x_cotangent
    return Results(y.detach(), gx, gweight, gbias, gresidual, *seconds, gx_again, mean.detach(), var.detach())


def size_of_terms(t: Given, case: Case, truth: Results) -> dict[str, Tensor]:
    """For each channel the size of the terms of a result: where they cancel, rounding is relative to it.

    Sums over a channel have terms of random signs.
    """
    dims = [d for d in range(t.x.dim()) if d != 1]

    def rms(values: Tensor | None) -> Tensor:
        return torch.zeros(t.x.shape[1]).double() if values is None else values.double().square().mean(dims).sqrt()

    u, v, a = rms(t.u), rms(t.v), rms(None) if t.vweight is None else t.vweight.double().abs()
    r = (truth.var + case.eps).rsqrt()
    gamma = torch.ones_like(r) if t.weight is None else t.weight.double().abs()
    count = t.x.numel() / t.x.shape[1]
    sizes = {
        "gx": gamma * r * u + rms(t.x_cotangent),
        "gx_again": gamma * r * u,
        "gweight": u * count**0.5,
        "gbias": u * count**0.5,
        "du": gamma * r * v + a,
        "dx": gamma * r * r * u * v + a * r * u,
        "dweight": r * u * v * count**0.5,
        "mean": t.x.double().abs().amax(dims),
    }
    for name in ("gx", "gx_again", "du", "dx"):
        true = getattr(truth, name).transpose(0, 1).flatten(1)
        sizes[name] = torch.maximum(sizes[name], true.abs().amax(1))
    return sizes


def check(t: Given, case: Case) -> Results:
    double = t.to(torch.float64, torch.float64)
    ours = run(t, case)
    mask = (ours.y > 0) if case.relu else torch.ones_like(t.x, dtype=torch.bool)
    truth = autograd(double, case, mask)
    theirs = autograd(t, case, mask)
    if case.relu:  # where rounding decides, the mask may be either
        z = autograd(double, case._replace(relu=False), mask).y
        sure = z.abs() > 8 * torch.finfo(accumulation_dtype(t.x.dtype)).eps * z.abs().max()
        assert torch.equal((z > 0)[sure], mask[sure])
    sizes = size_of_terms(t, case, truth)
    for name, our, their, true in zip(Results._fields, ours, theirs, truth, strict=True):
        if our is None:
            continue
        our, their, true = (value.unsqueeze(1) if value.dim() == 1 else value.transpose(0, 1) for value in
                            (our, their.to(our.dtype), true))  # fmt: skip
        assert_rows_accurate(our.flatten(1), their.flatten(1), true.flatten(1), sizes.get(name))
    return ours


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels last"])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_sizes(size: tuple[int, ...], channels_last: bool, dtype: torch.dtype) -> None:
    if channels_last and len(size) not in LAST:
        pytest.skip("no such layout")
    for training in (True, False):
        check(given(size, dtype, Case(training), channels_last=channels_last), Case(training))


SMALL = ((6, 3, 5, 5), (2, 3, 12, 12))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SMALL, ids=str)
@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels last"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_what_may_be_absent(training: bool, channels_last: bool, size: tuple[int, ...], dtype: torch.dtype) -> None:
    names = sorted(ALL_COTANGENTS)
    # Which cotangents are there does not depend on the dtype: all subsets in one of them.
    subsets = list(product((True, False), repeat=len(names) if dtype == torch.float32 else 1))
    for affine, relu, residual in product((True, False), repeat=3):
        case = Case(training, affine, relu, residual)
        for chosen in subsets if len(subsets) > 2 else [(is_there,) * len(names) for (is_there,) in subsets]:
            present = frozenset(name for name, is_there in zip(names, chosen, strict=True) if is_there)
            check(given(size, dtype, case, present=present, channels_last=channels_last), case)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SMALL, ids=str)
def test_large_eps(size: tuple[int, ...], dtype: torch.dtype) -> None:
    case = Case(relu=True, eps=3.0)
    check(given(size, dtype, case), case)


@pytest.mark.parametrize("size", [(64, 3, 40, 40), (512, 20), (32, 20, 4, 4)], ids=str)
@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels last"])
def test_mean_far_from_zero(channels_last: bool, size: tuple[int, ...]) -> None:
    """In float32 alone: in float64 the truth has the same rounding of the mean."""
    if channels_last and len(size) not in LAST:
        pytest.skip("no such layout")
    case = Case()
    t = given(size, torch.float32, case, channels_last=channels_last, mean=1e4)
    double = t.to(torch.float64, torch.float64)
    ours = run(t, case)
    truth = autograd(double, case, torch.ones_like(t.x))
    # y is of the mean that is returned, which float32 rounds by 5e-4 standard deviations.
    rounded = case._replace(training=False)
    y = autograd(double._replace(mean=ours.mean.double(), var=ours.var.double()), rounded, torch.ones_like(t.x)).y
    truth = truth._replace(y=y)
    sizes = size_of_terms(t, case, truth) | {"y": y.abs().amax()}
    for name, our, true in zip(Results._fields, ours, truth, strict=True):
        if our is None:
            continue
        # E[x²] − E[x]² in float32 would err by 10, more than the variance.
        error = (our.double() - true).abs().movedim(-1 if true.dim() == 1 else 1, 0).reshape(size[1], -1).amax(1)
        assert (error <= 1e-5 * sizes.get(name, true.abs())).all(), name


@pytest.mark.parametrize("size", [(64, 3, 40, 40), (4000, 20), (70, 20, 4, 4)], ids=str)
def test_variance_where_the_first_value_is_far_off(size: tuple[int, ...]) -> None:
    t = given(size, torch.float32, Case())
    t.x[0] = 1e6
    _, mean, var = native.batch_norm(t.x, None, None, None, None, None, 0.1, 1e-5, False)
    true_var, true_mean = torch.var_mean(t.x.double(), [d for d in range(len(size)) if d != 1], correction=0)
    assert ((mean - true_mean).abs() <= 1e-5 * true_mean.abs()).all()
    assert ((var - true_var).abs() <= 1e-5 * true_var).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [(6, 3, 5, 5), (2, 3, 12, 12), (400, 3)], ids=str)
def test_a_constant_channel(size: tuple[int, ...], dtype: torch.dtype) -> None:
    case = Case()
    t = given(size, dtype, case)
    t.x[:, 1] = 0.1
    ours = run(t, case)
    assert ours.var[1] == 0
    assert ours.mean[1] == t.x[0, 1].flatten()[0]
    assert torch.equal(ours.y[:, 1].to(t.bias.dtype), t.bias[1].to(dtype).to(t.bias.dtype).expand_as(ours.y[:, 1]))
    assert all(result.isfinite().all() for result in ours if result is not None)
    check(t, case)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [(400, 3), (1, 3, 9, 9), (3, 3, 12, 12)], ids=str)
def test_a_nan_stays_in_its_channel(size: tuple[int, ...], dtype: torch.dtype) -> None:
    t = given(size, dtype, Case(relu=True))
    t.x[0, 1].view(-1)[-1] = torch.nan
    y, mean, var = native.batch_norm(t.x, t.weight, t.bias, None, None, None, 0.1, 1e-5, True)
    assert mean[1].isnan()
    assert var[1].isnan()
    assert y[:, 1].isnan().all()
    others = [0, 2]
    assert all(result.isfinite().all() for result in (y[:, others], mean[others], var[others]))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [(9, 3), (5, 3, 12, 12)], ids=str)
def test_running_statistics(size: tuple[int, ...], dtype: torch.dtype) -> None:
    t = given(size, dtype, Case(training=False))
    theirs = t.mean.clone(), t.var.clone()
    F.batch_norm(t.x.to(t.mean.dtype), *theirs, training=True, momentum=0.3)
    for absent in (None, 0, 1):
        ours = [None if k == absent else values.clone() for k, values in enumerate((t.mean, t.var))]
        native.batch_norm(t.x, None, None, None, *ours, 0.3, 1e-5, False)
        for our, their in zip(ours, theirs, strict=True):
            if our is not None:
                torch.testing.assert_close(our, their, rtol=1e-6, atol=1e-6)


def test_one_value_leaves_a_finite_running_variance() -> None:
    running_mean, running_var = torch.zeros(2), torch.ones(2)
    native.batch_norm(torch.ones(1, 2), None, None, None, running_mean, running_var, 0.1, 1e-5, False)
    assert torch.allclose(running_mean, torch.full((2,), 0.1))
    assert torch.allclose(running_var, torch.full((2,), 0.9))


# ---- the same bits, and every instruction set ------------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize(
    "size", [(20_000, 3), (200, 700), (9, 3, 100, 100), (40, 6, 32, 32), (40, 13, 32, 32), (90, 33, 7, 7)], ids=str
)
def test_results_do_not_depend_on_the_number_of_threads(size: tuple[int, ...], training: bool) -> None:
    case = Case(training, relu=True, residual=True)
    for channels_last in (False, True) if len(size) in LAST else (False,):
        t = given(size, torch.float32, case, channels_last=channels_last)
        assert_same_bits_with_any_number_of_threads(partial(run, t, case))


@pytest.mark.parametrize("capability", ["default", "avx2"])
def test_every_lower_capability(capability: str) -> None:
    """This file again in a process of its own: the capability is chosen once, when the library is first used."""
    order = ("default", "avx2", "avx512")
    if "RDS_FAST_CPU_CAPABILITY" in os.environ:
        assert native.cpu_capability() == os.environ["RDS_FAST_CPU_CAPABILITY"]
        pytest.skip("already in such a process")
    if order.index(native.cpu_capability()) <= order.index(capability):
        pytest.skip(f"this CPU's best capability is {native.cpu_capability()}: tested above")
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", str(Path(__file__))]
    environment = os.environ | {"RDS_FAST_CPU_CAPABILITY": capability, "OMP_NUM_THREADS": "1"}
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-2000:]
