"""Feature leakage: how much of an attribution falls where there is nothing to see."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ..attacks.pgd import check_floating
from ..reference import accumulation_dtype
from ..training import data
from .results import Results
from .samples import batches_of
from .settings import EvaluationSettings


def measure(model: nn.Module, split: data.Split, settings: EvaluationSettings) -> Results:
    """``leakage`` and ``share``: the means of both forms of ``feature_leakage`` of ∇ₓ f_y.

    The share's mean is over the samples that have a gradient; None where none has one.

    Raises:
        ValueError: the data have no null block.
    """
    parts = [
        feature_leakage(input_gradient(model, data.in_unit_interval(batch.images), batch.labels), batch.null_mask)
        for batch in batches_of(split, settings.batch_size)
    ]
    absolute, share = (torch.cat(part).double() for part in zip(*parts, strict=True))
    mean_share = float(share.nanmean())
    return Results({"leakage": float(absolute.mean()), "share": None if math.isnan(mean_share) else mean_share})


def input_gradient(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """The attribution used throughout: ∇ₓ f_y, the gradient of the true class's logit (N, ...).

    Not of the cross-entropy: that gradient is f_y's less the softmax-weighted mean of all logits', and vanishes on
    every sample that a model is sure of, whatever the model looks at.
    """
    check_floating(x)
    with torch.inference_mode(False), torch.enable_grad():
        x, y = x.detach().clone().requires_grad_(), y.clone()  # inference tensors allow no autograd
        logits = model(x)
        target_logits = logits.gather(1, y[:, None])
        return torch.autograd.grad(target_logits.sum(), x)[0]


def feature_leakage(attribution: Tensor, null_mask: Tensor) -> tuple[Tensor, Tensor]:
    """The size of each sample's attribution on its null block (Shah et al. 2021).

    With a the attribution of a sample and m its mask,

        absolute = ‖m ⊙ a‖₂,        share = ‖m ⊙ a‖₂ / ‖a‖₂  in [0, 1].

    The absolute leakage falls with every gradient that is merely smaller; the share is invariant to scaling. An
    attribution spread evenly over an input of which the null block is half has the share √½ = 0.71.

    Args:
        attribution: (N, ...), floating.
        null_mask: bool, True on the null block: (N, ...) like the attribution, with dimensions of size 1 expanded; or
            without the first dimension, one mask for all samples.

    Returns:
        absolute (N,) and share (N,), in float64 for a float64 attribution, else in float32. The share of an
        attribution that is zero throughout is NaN: it has none, and counting it as 0 would reward a model for
        having no gradient.

    Raises:
        TypeError: the attribution is not floating, or the mask not bool.
        ValueError: the mask does not fit the attribution.
    """
    if not attribution.is_floating_point():
        raise TypeError(f"the attribution is {attribution.dtype}; it must be floating")
    if null_mask.dtype != torch.bool:
        raise TypeError(f"null_mask is {null_mask.dtype}; it must be bool: True on the null block")
    if attribution.dim() < 2:
        raise ValueError(f"the attribution has shape {tuple(attribution.shape)}; it must be (N, ...), N samples")
    mask = _expand_mask(null_mask, attribution).flatten(1)
    a = attribution.detach().to(accumulation_dtype(attribution.dtype)).flatten(1)
    # Each row is divided by its largest magnitude, so that no square overflows or underflows.
    largest = a.abs().amax(1, keepdim=True) if a.shape[1] else a.new_zeros(a.shape[0], 1)
    a = a / torch.where(largest > 0, largest, 1.0)
    null_norm = torch.where(mask, a, 0.0).norm(dim=1)
    return null_norm * largest[:, 0], null_norm / a.norm(dim=1)


def _expand_mask(null_mask: Tensor, attribution: Tensor) -> Tensor:
    shape, given = tuple(attribution.shape), tuple(null_mask.shape)
    expected = f"it must have shape {shape}, 1 in place of any of its sizes, or {shape[1:]} for all samples alike"
    shared = null_mask.dim() == attribution.dim() - 1
    if not shared and null_mask.dim() != attribution.dim():
        raise ValueError(f"null_mask has shape {given}; {expected}")
    # (N, H, W) beside (N, C, H, W) would expand, wrongly, where N happens to equal C.
    if shared and len(given) > 1 and given[0] == shape[0] == shape[1] != 1:
        raise ValueError(f"null_mask of shape {given} is ambiguous beside {shape}: insert its missing dimension of 1")
    try:
        return null_mask.expand(shape)
    except RuntimeError:
        raise ValueError(f"null_mask has shape {given}; {expected}") from None
