"""A linear map y = x Wᵀ + b as the product of a chain; see ``chain``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Linear(NamedTuple):
    """x (..., K), weight (C, K) to y (..., C)."""

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return torch.nn.functional.linear(x, weight, bias)

    def backward(
        self, g: Tensor, x: Tensor, weight: Tensor, wanted: Sequence[bool], onto: Tensor | None = None
    ) -> tuple[Tensor | None, ...]:
        """g W + onto, gᵀ x and Σ g, each None where it is not wanted."""
        gx = gweight = gbias = None
        rows = g.reshape(-1, g.shape[-1])
        if wanted[0]:
            product = rows.mm(weight) if onto is None else torch.addmm(onto.reshape(-1, onto.shape[-1]), rows, weight)
            gx = product.view(*g.shape[:-1], weight.shape[1])
        if wanted[1]:
            gweight = rows.t().mm(x.reshape(-1, x.shape[-1]))
        if wanted[2]:
            gbias = rows.sum(0)
        return gx, gweight, gbias
