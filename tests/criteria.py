"""When a result is accurate enough.

As close to the float64 truth as PyTorch's own result of the same dtype is, plus a stated tolerance, element by
element: half a unit in the last place of the output type at max(|truth|, the row's largest |truth|) for 16-bit
results, 1e-5 (float32) or 1e-12 (float64) relative to that maximum.
"""

from __future__ import annotations

import torch
from torch import Tensor

RELATIVE_TOLERANCE = {
    torch.float64: 1e-12,
    torch.float32: 1e-5,
    torch.bfloat16: 2.0**-9,  # half a unit in the last place: 8 bits of significand
    torch.float16: 2.0**-12,  # 11 bits
}


def assert_accurate(ours: Tensor, theirs: Tensor, truth: Tensor) -> None:
    """``ours`` and PyTorch's ``theirs`` of one dtype, ``truth`` in float64; a row is all dimensions but the first."""
    assert ours.dtype == theirs.dtype
    assert truth.dtype == torch.float64
    assert ours.shape == truth.shape
    nan = truth.isnan()
    assert torch.equal(ours.isnan(), nan)
    infinite = truth.isinf()
    assert torch.equal(ours[infinite].double(), truth[infinite])
    finite_truth = truth.where(~nan & ~infinite, 0.0)
    largest = finite_truth.abs().reshape(truth.shape[0] if truth.dim() else 1, -1).amax(1) if truth.numel() else truth
    row_maximum = largest.reshape(-1, *[1] * (truth.dim() - 1)) if truth.dim() else largest[0]
    subnormal = torch.finfo(ours.dtype).smallest_normal * torch.finfo(ours.dtype).eps
    tolerance = RELATIVE_TOLERANCE[ours.dtype] * torch.maximum(finite_truth.abs(), row_maximum) + subnormal
    error = (ours.double() - finite_truth).abs().where(~nan & ~infinite, 0.0)
    allowed = (theirs.double() - finite_truth).abs().nan_to_num(nan=0.0, posinf=0.0) + tolerance
    excess = (error - allowed).max() if error.numel() else error.sum()
    assert excess <= 0, f"exceeds the allowed error by {excess:.3e}; worst error {error.max():.3e}"
