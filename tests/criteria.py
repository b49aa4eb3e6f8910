"""When a result is accurate enough.

As close to the float64 truth as PyTorch's own result of the same dtype is, plus a stated tolerance, element by
element: half a unit in the last place of the output type at max(|truth|, the row's largest |truth|) for 16-bit
results, 1e-5 (float32) or 1e-12 (float64) relative to that maximum.
"""

from __future__ import annotations

import torch
from torch import Tensor

RELATIVE_TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5}


def tolerance(dtype: torch.dtype, largest: Tensor) -> Tensor:
    """The stated tolerance at ``largest`` > 0, in float64."""
    if dtype in RELATIVE_TOLERANCE:
        return RELATIVE_TOLERANCE[dtype] * largest
    exponent = torch.frexp(largest).exponent - 1  # largest lies in [2^exponent, 2^(exponent + 1))
    return torch.ldexp(torch.full_like(largest, torch.finfo(dtype).eps / 2), exponent)


def assert_accurate(ours: Tensor, theirs: Tensor, truth: Tensor, scale: Tensor | None = None) -> None:
    """``ours`` and PyTorch's ``theirs`` of one dtype, ``truth`` in float64; a row is all dimensions but the first.

    ``scale``, (N,), takes the place of the row's largest |truth| where the result is a difference of larger terms,
    whose own rounding no implementation can undo: it is the size of those terms.
    """
    assert ours.dtype == theirs.dtype
    assert truth.dtype == torch.float64
    assert ours.shape == truth.shape
    rounded = truth.to(ours.dtype).double()  # infinite where the truth is beyond the dtype's range
    assert torch.equal(ours.isnan(), truth.isnan())
    infinite = rounded.isinf()
    assert torch.equal(ours[infinite].double(), rounded[infinite])
    finite = rounded.isfinite()
    if not finite.any():
        return
    true = truth.where(finite, 0.0)
    if scale is None:
        scale = true.abs().reshape(true.shape[0], -1).amax(1)
    largest = torch.maximum(true.abs(), scale.reshape(-1, *[1] * (true.dim() - 1)))
    smallest_step = torch.finfo(ours.dtype).smallest_normal * torch.finfo(ours.dtype).eps
    error = (ours.double() - true).abs().where(finite, 0.0)
    allowed = (theirs.double() - true).abs().nan_to_num(nan=0.0, posinf=0.0)
    allowed = allowed + tolerance(ours.dtype, largest) + smallest_step
    excess = (error - allowed).max()
    assert excess <= 0, f"exceeds the allowed error by {excess:.3e}; worst error {error.max():.3e}"
