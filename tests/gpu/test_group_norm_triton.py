"""The Triton kernels of layer, group and instance norm on a GPU: accuracy at every order, determinism, what ran."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from rds_fast.ops import group_norm as ours
from tests.ops.test_group_norm import Case, assert_all_accurate, identify, inputs, orders, recorded, sizes_of_terms

pytest.importorskip("triton")
pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("ran")]

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
CASES = [
    Case("layer_norm", (1003, 7), (1003, 7, 1)),  # many rows a program, the last not full
    Case("layer_norm", (5000, 96), (5000, 96, 1)),  # each program adds up the channels of several tiles of rows
    Case("layer_norm", (2000, 768), (2000, 768, 1)),
    Case("layer_norm", (70, 8192), (70, 8192, 1)),  # rows in registers, too wide for sums beside them
    Case("layer_norm", (600, 16_411), (600, 16_411, 1)),  # one program a row, block by block
    Case("layer_norm", (2, 1_000_000), (2, 1_000_000, 1)),  # cut over programs
    Case("group_norm", (40, 96), (40, 96, 1), 4),
    Case("group_norm", (8, 64, 7, 7), (8, 64, 49), 8),
    Case("group_norm", (4, 32, 64, 64), (4, 32, 4096), 4),  # long rows of many channels
    Case("group_norm", (2, 4, 300_000), (2, 4, 300_000), 2),
    Case("instance_norm", (6, 5, 14, 14), (6, 5, 196), 5),
    Case("instance_norm", (2, 3, 200_000), (2, 3, 200_000), 3),
]


def on_gpu(case: Case, dtype: torch.dtype) -> tuple[Tensor, ...]:
    return tuple(t.cuda() for t in inputs(case, dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=identify)
def test_as_accurate_as_torch_at_every_order(ran: Counter[str], case: Case, dtype: torch.dtype) -> None:
    tensors = on_gpu(case, dtype)
    our = orders(case.of(ours), *tensors)
    for kernel in ("_forward_kernel", "_backward_kernel", "_double_backward_kernel"):
        assert ran[kernel] > 0, f"{kernel} did not run: {ran}"
    truth = orders(case.of(functional), *(t.double() for t in tensors))
    theirs = orders(case.of(functional), *tensors)
    assert_all_accurate(case, our, theirs, truth, sizes_of_terms(case, 1e-5, *tensors))


@pytest.mark.parametrize("case", [CASES[1], CASES[4], CASES[5], CASES[7], CASES[9], CASES[11]], ids=identify)
def test_the_same_bits_on_every_run(case: Case) -> None:
    tensors = on_gpu(case, torch.float32)
    first = orders(case.of(ours), *tensors)
    for _ in range(5):
        for again, once in zip(orders(case.of(ours), *tensors), first, strict=True):
            assert torch.equal(again, once)


@pytest.mark.parametrize("case", [CASES[2], CASES[7], CASES[10]], ids=identify)
def test_a_large_mean_does_not_cost_the_variance(case: Case) -> None:
    x, *rest = on_gpu(case, torch.float32)
    tensors = (x / 2 + 1e4, *rest)
    truth = orders(case.of(functional), *(t.double() for t in tensors))
    for our, true in zip(orders(case.of(ours), *tensors), truth, strict=True):
        assert (our - true).abs().max() <= 2e-3 * true.abs().max()


def test_affine_gradients_are_computed_where_the_engine_asks_for_them() -> None:
    """The engine runs these backwards on a thread of its own."""
    x, w, b = (t.requires_grad_() for t in on_gpu(CASES[1], torch.float32)[:3])
    loss = CASES[1].of(ours)(x, w, b).pow(3).sum()
    with recorded() as calls:
        torch.autograd.grad(loss, x, create_graph=True)
        torch.autograd.grad(loss, (x, w), create_graph=True)
    assert calls == [("backward", False), ("backward", True)]


def test_launches_of_a_layer_norm(ran: Counter[str]) -> None:
    x, w, b = (t.requires_grad_() for t in on_gpu(CASES[2], torch.bfloat16)[:3])
    y = CASES[2].of(ours)(x, w, b)
    (gx,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    assert ran == {"_forward_kernel": 1, "_backward_kernel": 1}
    gx.square().sum().backward()
    assert ran["_double_backward_kernel"] == ran["_sum_strips_kernel"] == 1
    assert ran["_channel_sums_kernel"] == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_as_torch(dtype: torch.dtype) -> None:
    x = torch.randn(4, 8, 6, device="cuda", dtype=dtype)
    w = torch.ones(8, device="cuda")
    calls: list[Callable] = [
        lambda f: f.layer_norm(x, (6,), w[:6], w[:6]),
        lambda f: f.group_norm(x, 2, w, w),
        lambda f: f.instance_norm(x),
    ]
    with torch.autocast("cuda", dtype=dtype):
        for call in calls:
            our, their = call(ours), call(functional)
            assert our.dtype == their.dtype
            torch.testing.assert_close(our, their, rtol=0.02, atol=0.02)  # instance norm stays in 16 bits


def test_errors_are_those_of_torch() -> None:
    x = torch.randn(4, 8, device="cuda", dtype=torch.bfloat16)
    results = []
    for module in (functional, ours):  # a float32 weight beside a 16-bit input, which PyTorch may or may not take
        try:
            results.append(module.layer_norm(x, (8,), torch.ones(8, device="cuda")).dtype)
        except RuntimeError as error:
            results.append(str(error))
    assert results[0] == results[1]


def test_running_statistics() -> None:
    x = torch.randn(3, 4, 50, device="cuda") * 2 + 1
    mean, var = torch.randn(4, device="cuda"), torch.rand(4, device="cuda")
    running = [(mean.clone(), var.clone()) for _ in range(2)]
    for module, pair in zip((ours, functional), running, strict=True):
        module.instance_norm(x, *pair)
    for our, their in zip(*running, strict=True):
        torch.testing.assert_close(our, their)


def test_more_than_two_to_the_31_elements() -> None:
    """Offsets past 2³¹ in the last rows, in the kernel of the rows and in that of the channels."""
    if torch.cuda.mem_get_info()[0] < 60 * 2**30:
        pytest.skip("needs 60 GiB of free GPU memory")
    for shape, groups in (((2**20 + 8, 2100, 1), 1), ((2, 4, 2**28 + 2**20), 2)):
        x = torch.zeros(shape, dtype=torch.bfloat16, device="cuda")
        x[-1, -1, -1] = 1.0
        w = torch.ones(shape[1], device="cuda", dtype=torch.bfloat16)
        x.requires_grad_()
        w.requires_grad_()
        K = shape[1] * shape[2] // groups
        y = ours.group_norm(x, groups, w) if groups > 1 else ours.layer_norm(x[:, :, 0], (shape[1],), w)[..., None]
        expected = (1 - 1 / K) * (1 / K * (1 - 1 / K) + 1e-5) ** -0.5
        assert abs(y[-1, -1, -1].item() / expected - 1) < 0.01
        (gw,) = torch.autograd.grad(y[-1, -1, -1], w)
        assert abs(gw[-1].item() / expected - 1) < 0.01
        assert not gw[:-1].any()
        del x, y
