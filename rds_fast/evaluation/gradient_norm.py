"""How steep the density is that a model's logits define."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..ops.logsumexp import logsumexp
from ..training import data
from .results import Results
from .samples import batches_of
from .settings import EvaluationSettings


def measure(model: nn.Module, split: data.Split, settings: EvaluationSettings) -> Results:
    """``gradient_norm``: the mean of ‖∇ₓ log p(x)‖₂."""
    norms = [
        density_gradient_norm(model, data.in_unit_interval(batch.images))
        for batch in batches_of(split, settings.batch_size)
    ]
    return Results({"gradient_norm": float(torch.cat(norms).double().mean())})


def density_gradient_norm(model: nn.Module, x: Tensor) -> Tensor:
    """‖∇ₓ log p(x)‖₂ (N,): log p is the log-sum-exp of the logits up to a constant."""
    with torch.inference_mode(False), torch.enable_grad():
        x = x.detach().clone().requires_grad_()  # a clone, because inference tensors allow no autograd
        (gradient,) = torch.autograd.grad(logsumexp(model(x), 1).sum(), x)
    return gradient.flatten(1).norm(dim=1)
