"""The Triton kernels of the activations' derivatives in Triton's interpreter, on CPU tensors, against float64.

Run by ``test_activation_interpreter.py`` in a process of its own, as ``interpreter_cases.py`` is.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

import rds_fast
from rds_fast.kernels import activation as kernels
from rds_fast.ops import registration
from tests.criteria import RELATIVE_TOLERANCE
from tests.ops.activations import SMOOTH, orders, true_orders

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
# The interpreter rounds to bfloat16 towards zero: a whole unit in the last place, at a power of two.
TOLERANCE = RELATIVE_TOLERANCE | {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-7}
# One value; two programs of which the second is not full; a multiple of 16, which is loaded in vectors.
COUNTS = [1, 1500, 2048]


def inputs(count: int, dtype: torch.dtype) -> list[Tensor]:
    """x from −8 to 8, g, v and x_cotangent."""
    generator = torch.Generator().manual_seed(0)
    x = torch.linspace(-8 if count > 1 else 0.6, 8, count, dtype=torch.float64) + 0.003  # away from the kinks
    return [t.to(dtype) for t in (x, *torch.randn(3, count, generator=generator, dtype=torch.float64))]


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> Iterator[Counter[str]]:
    """Runs the public functions on Triton, and counts the launchers that they reach."""
    counter: Counter[str] = Counter()

    def counted(name: str, launcher: Callable) -> Callable:
        def launch(*arguments: object) -> object:
            counter[name] += 1
            return launcher(*arguments)

        return launch

    for name in ("activation_backward", "activation_double_backward"):
        monkeypatch.setattr(kernels, name, counted(name, getattr(kernels, name)))
    registration._kernel.cache_clear()
    with rds_fast.use_backend("triton"):
        yield counter
    registration._kernel.cache_clear()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("name", SMOOTH)
def test_derivatives(name: str, count: int, dtype: torch.dtype, ran: Counter[str]) -> None:
    case = SMOOTH[name]
    x, g, v, _ = inputs(count, dtype)
    theirs = orders(case.theirs, x, g, v)
    ours = orders(case.ours, x, g, v)
    assert ran == {"activation_backward": 1, "activation_double_backward": 1}
    for our, their, truth in zip(ours, theirs, true_orders(name, x, g, v), strict=True):
        assert our.dtype == dtype
        allowed = (their.double() - truth).abs().nan_to_num() + TOLERANCE[dtype] * truth.abs().max()
        assert ((our.double() - truth).abs() <= allowed + torch.finfo(dtype).tiny * torch.finfo(dtype).eps).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_cotangent_is_added_before_rounding(dtype: torch.dtype) -> None:
    x, g, _, x_cotangent = inputs(1500, dtype)
    ours = kernels.activation_backward(g, x, x_cotangent, "silu", 0.0, 0.0)
    truth = kernels.activation_backward(g.double(), x.double(), None, "silu", 0.0, 0.0) + x_cotangent.double()
    assert ((ours.double() - truth).abs() <= TOLERANCE[dtype] * truth.abs().max()).all()


def test_channels_last_stays() -> None:
    x, g, v = (t.to(memory_format=torch.channels_last) for t in torch.randn(3, 2, 5, 4, 4))
    results = [kernels.activation_backward(g, x, v, "gelu", 0.0, 0.0)]
    results += kernels.activation_double_backward(v, g, x, "gelu", 0.0, 0.0)
    flat = [kernels.activation_backward(*(t.contiguous() for t in (g, x, v)), "gelu", 0.0, 0.0)]
    flat += kernels.activation_double_backward(*(t.contiguous() for t in (v, g, x)), "gelu", 0.0, 0.0)
    for result, contiguous in zip(results, flat, strict=True):
        assert result.stride() == x.stride()
        assert torch.equal(result, contiguous)
