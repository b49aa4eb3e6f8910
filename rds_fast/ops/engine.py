"""What autograd's engine can tell a Function that it runs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def queryable(parameter: Tensor | None) -> Tensor | None:
    """``parameter`` or, if it is a leaf, a view of it, about which ``is_wanted`` has an answer."""
    if parameter is None or not parameter.requires_grad or not parameter.is_leaf:
        return parameter
    return parameter.view_as(parameter)


def is_wanted(ctx: Any, index: int) -> bool:
    """Whether this run of the engine will use the gradient of the Function's argument number ``index``.

    ``ctx.needs_input_grad`` only says whether the argument requires a gradient at all: it is True for every weight
    while ``torch.autograd.grad(output, x)`` runs, and a weight gradient computed there is thrown away.

    The arguments before ``index`` must be tensors. For a leaf the engine cannot say, and the answer is True.
    """
    if not ctx.needs_input_grad[index]:
        return False
    node = ctx.next_functions[index][0]
    if node is None or node.name() == "torch::autograd::AccumulateGrad":
        return True
    return torch._C._will_engine_execute_node(node)
