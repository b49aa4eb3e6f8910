"""Batch norm's Triton kernels on a GPU: every order against float64, determinism, and what ran."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from rds_fast.ops import costs
from rds_fast.ops.batch_norm import batch_norm
from tests.batch_norm_orders import OPTIONAL, check, inputs

triton = pytest.importorskip("triton")
pytestmark = pytest.mark.gpu

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
CONTIGUOUS, LAST, LAST_3D = torch.contiguous_format, torch.channels_last, torch.channels_last_3d

SIZES = [
    ((2, 3), CONTIGUOUS),  # almost no values
    ((1000, 130), CONTIGUOUS),  # a block of channels that is not full
    ((70_000, 5), CONTIGUOUS),  # five channels, which no vector load divides
    ((1, 7, 1000), CONTIGUOUS),  # one sample
    ((32, 64, 56, 56), LAST),  # ResNet-50's first layers: many programs a channel
    ((32, 64, 56, 56), CONTIGUOUS),
    ((64, 2048, 7, 7), LAST),  # and its last: many channels
    ((64, 2048, 7, 7), CONTIGUOUS),  # planes that no vector load divides
    ((256, 512, 4, 4), CONTIGUOUS),  # several channels make a run
    ((3, 6, 111, 113), CONTIGUOUS),  # planes longer than a tile, all sizes odd
    ((3, 6, 111, 113), LAST),
    ((2, 20, 9, 10, 11), LAST_3D),
]


FORWARD = {"_statistics_kernel": 1, "_merge_kernel": 1, "_forward_kernel": 1}
BACKWARD = {"_backward_sums_kernel": 1, "_backward_merge_kernel": 1, "_backward_kernel": 1}
DOUBLE_BACKWARD = {f"_double{name}": 1 for name in BACKWARD}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("residual", [True, False], ids=["residual", "no residual"])
@pytest.mark.parametrize(("shape", "memory_format"), SIZES, ids=str)
def test_train_mode(
    shape: tuple[int, ...], memory_format: torch.memory_format, residual: bool, dtype: torch.dtype
) -> None:
    from rds_fast.kernels import batch_norm as kernels

    without = () if residual else ("residual", "other_u", "vresidual")
    check(kernels, inputs(shape, dtype, memory_format, "cuda", without), True, 0.1, True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("shape", "memory_format"), SIZES[1::2], ids=str)
def test_eval_mode(shape: tuple[int, ...], memory_format: torch.memory_format, dtype: torch.dtype) -> None:
    from rds_fast.kernels import batch_norm as kernels

    check(kernels, inputs(shape, dtype, memory_format, "cuda"), False, 1e-5, True)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("relu", [True, False], ids=["relu", "no relu"])
@pytest.mark.parametrize("absent", [(), *((name,) for name in OPTIONAL), OPTIONAL], ids=str)
def test_absent_tensors(absent: tuple[str, ...], relu: bool, training: bool) -> None:
    from rds_fast.kernels import batch_norm as kernels

    absent += ("vresidual",) if "residual" in absent else ()
    check(kernels, inputs((70, 3, 50), torch.float64, device="cuda", without=absent), training, 0.5, relu)


@pytest.mark.parametrize("memory_format", [CONTIGUOUS, LAST], ids=str)
@settings(deadline=None, max_examples=15)  # most shapes have kernels to be compiled
@given(shape=st.tuples(st.integers(2, 300), st.integers(1, 140), st.integers(1, 40), st.integers(1, 6)))
def test_any_shape(memory_format: torch.memory_format, shape: tuple[int, ...]) -> None:
    from rds_fast.kernels import batch_norm as kernels

    check(kernels, inputs(shape, torch.bfloat16, memory_format, "cuda"), True, 1e-5, True)


@pytest.mark.parametrize("memory_format", [CONTIGUOUS, LAST], ids=str)
def test_a_large_mean_costs_no_digits(memory_format: torch.memory_format) -> None:
    """Mean 1e4 and deviation 1, where E[x²] − E[x]² has no correct digit in float32."""
    from rds_fast.kernels import batch_norm as kernels

    x = 1e4 + torch.randn(64, 64, 56, 56, generator=torch.Generator().manual_seed(0))
    x[0] += 20  # the first tile is far from the others
    x = x.cuda().contiguous(memory_format=memory_format)
    _, mean, var = kernels.batch_norm(x, None, None, None, None, None, 0.1, 1e-5, False)
    truth = x.double().transpose(0, 1).flatten(1)
    torch.testing.assert_close(mean.double(), truth.mean(1), rtol=1.2e-7, atol=0)
    torch.testing.assert_close(var.double(), truth.var(1, correction=0), rtol=1e-5, atol=0)


def two_orders(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None) -> list[Tensor]:
    """y, the gradients of a penalty on the input gradient, and the running statistics, of the public operation."""
    statistics = torch.zeros_like(weight), torch.ones_like(weight)
    leaves = [t.detach().requires_grad_() for t in (x, weight, bias)]
    y = batch_norm(leaves[0], *statistics, *leaves[1:], True, residual=residual, relu=True)
    (gx,) = torch.autograd.grad(y.float().square().sum(), leaves[0], create_graph=True)
    return [y.detach(), *torch.autograd.grad(gx.float().square().sum(), leaves), *statistics]


@pytest.mark.parametrize("residual", [True, False], ids=["residual", "no residual"])
def test_what_runs(ran: Counter[str], residual: bool) -> None:
    """Through the public operation: the declared launches of each order, and the same bits on every run."""
    i = inputs((32, 64, 28, 28), torch.bfloat16, LAST, "cuda")
    arguments = (i.x, i.weight, i.bias, i.residual if residual else None)
    first = two_orders(*arguments)
    once = FORWARD | DOUBLE_BACKWARD
    assert {name: ran[name] for name in once} == once
    assert {name: ran[name] for name in BACKWARD} == dict.fromkeys(BACKWARD, 2)  # of y, then of all that y made
    assert costs.cost("batch_norm", {}).launches == len(FORWARD)
    assert costs.cost("batch_norm_backward", {"y": None, "training": True}).launches == len(BACKWARD)
    assert costs.cost("batch_norm_double_backward", {"training": True}).launches == len(DOUBLE_BACKWARD)
    for _ in range(3):
        for once, again in zip(first, two_orders(*arguments), strict=True):
            assert torch.equal(once, again)


def test_running_statistics_are_pytorchs(ran: Counter[str]) -> None:
    i = inputs((32, 64, 28, 28), torch.float32, LAST, "cuda")
    ours = two_orders(i.x, i.weight, i.bias, None)[-2:]
    layer = nn.BatchNorm2d(64, device="cuda")
    layer(i.x)
    assert ran["_merge_kernel"] == 1
    torch.testing.assert_close(ours, [layer.running_mean, layer.running_var])


def test_gradcheck(ran: Counter[str]) -> None:
    x = torch.randn(4, 3, 2, 2, dtype=torch.float64, device="cuda", requires_grad=True)
    weight, bias = (torch.randn(3, dtype=torch.float64, device="cuda", requires_grad=True) for _ in range(2))

    def function(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return batch_norm(x, None, None, weight, bias, True, eps=0.3)

    assert torch.autograd.gradcheck(function, (x, weight, bias))
    assert torch.autograd.gradgradcheck(function, (x, weight, bias))
    assert ran["_double_backward_kernel"]


def test_more_than_two_to_the_31_elements() -> None:
    """Offsets past 2³¹ in the last rows and planes: a channel whose last value alone is not zero."""
    from rds_fast.kernels import batch_norm as kernels

    if torch.cuda.mem_get_info()[0] < 24 * 2**30:
        pytest.skip("needs 24 GiB of free GPU memory")
    for shape, memory_format in (((2**17, 64, 16, 17), LAST), ((2**17, 64, 16, 17), CONTIGUOUS)):
        x = torch.empty(shape, dtype=torch.bfloat16, device="cuda", memory_format=memory_format).zero_()
        x[-1, -1, -1, -1] = 256.0
        y, mean, var = kernels.batch_norm(x, None, None, None, None, None, 0.1, 1e-5, False)
        count = x.numel() / 64
        assert abs(mean[-1].item() * count / 256 - 1) < 1e-5
        assert abs(var[-1].item() * count / 256**2 - 1) < 1e-5
        assert not mean[:-1].any()
        assert abs(y[-1, -1, -1, -1].item() / (256 / (var[-1].item() + 1e-5) ** 0.5) - 1) <= 2.0**-8
        assert not y[0, 0].any()
        del x, y
