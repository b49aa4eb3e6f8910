"""Concatenation with a double backward of one pass.

The backward of a concatenation cuts its cotangent into parts, and the derivative of that puts the parts' cotangents
together again. PyTorch cuts each part by an operation of its own, whose derivative is a tensor of zeros of the whole
size with the one part in it, and adds these up: for n tensors n passes over the whole, where one would do. In DenseNet,
which concatenates all that came before at every layer, that is nearly half of a penalised step.

Derivatives of all orders exist. A gradient with a graph of its own may be changed in place if it is a leaf's; that of
another tensor is one of the results of a split, for which PyTorch raises.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..backends import runs_plainly
from .function import Function


class Concatenation(Function):
    """The tensors one after the other along ``dim``."""

    @staticmethod
    def forward(dim: int, *tensors: Tensor) -> Tensor:
        return torch.cat(tensors, dim)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.dim, *tensors = inputs
        ctx.sizes = [tensor.shape[ctx.dim] for tensor in tensors]
        ctx.leaves = [number for number, tensor in enumerate(tensors) if tensor.is_leaf and tensor.requires_grad]
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, g: Tensor | None) -> Any:
        if g is None:
            return (None,) * (1 + len(ctx.sizes))
        parts = list(g.split(ctx.sizes, ctx.dim))  # one operation, whose derivative is one concatenation
        if torch.is_grad_enabled():  # a leaf's goes to the user, who may change it in place; PyTorch forbids that here
            for number in ctx.leaves:
                parts[number] = g.narrow(ctx.dim, sum(ctx.sizes[:number]), ctx.sizes[number])
        return None, *parts


def concatenate(plain: Callable[..., Tensor], tensors: Sequence[Tensor], dim: Any = 0, *, axis: Any = None) -> Tensor:
    """``plain(tensors, dim)``, which is ``torch.cat`` or one of its other names; ``axis`` is NumPy's name for it."""
    if axis is not None:
        dim = axis
    if not _is_covered(tensors, dim):
        return plain(tensors, dim)
    return Concatenation.apply(dim, *tensors)


def _is_covered(tensors: Any, dim: Any) -> bool:
    """Where nothing is cast and no tensor is the empty vector that PyTorch passes over, whatever the others' shapes.

    Where one tensor alone has a gradient, PyTorch's double backward is one pass, too.
    """
    if not (isinstance(tensors, tuple | list) and len(tensors) > 1 and type(dim) is int):
        return False
    if not all(isinstance(tensor, Tensor) for tensor in tensors):
        return False
    first = tensors[0]
    if any(tensor.dtype != first.dtype or tensor.dim() != first.dim() for tensor in tensors):
        return False
    return sum(tensor.requires_grad for tensor in tensors) > 1 and not runs_plainly(first)


# PyTorch's functions, and what takes their place, which gets them as first argument.
REPLACEMENTS: dict[Callable[..., Any], Callable[..., Any]] = dict.fromkeys(
    (torch.cat, torch.concat, torch.concatenate), concatenate
)
