"""What autograd's engine can tell a Function that it runs."""

from __future__ import annotations

from typing import Any, overload

import torch
from torch import Tensor


@overload
def queryable(leaf: Tensor) -> Tensor: ...
@overload
def queryable(leaf: Tensor | None) -> Tensor | None: ...
def queryable(leaf: Tensor | None) -> Tensor | None:
    """``leaf`` or, if it is one that requires a gradient, a view of it, about which ``is_wanted`` has an answer."""
    if leaf is None or not leaf.requires_grad or not leaf.is_leaf:
        return leaf
    return leaf.view_as(leaf)


def is_wanted(ctx: Any, index: int) -> bool:
    """Whether this run of the engine will use the gradient of the Function's argument number ``index``.

    ``ctx.needs_input_grad`` only says whether the argument requires a gradient at all: it is True for every weight
    while ``torch.autograd.grad(output, x)`` runs, and a weight gradient computed there is thrown away.

    The arguments before ``index`` must be tensors. For a leaf the engine cannot say, and the answer is True.
    """
    if not ctx.needs_input_grad[index]:
        return False
    node = ctx.next_functions[index][0]
    if node is None or isinstance(node, torch._C._functions.AccumulateGrad):  # type: ignore[attr-defined]  # the stubs lack it
        return True
    return torch._C._will_engine_execute_node(node)


def wanted_among(ctx: Any, count: int) -> tuple[bool, ...]:
    """``is_wanted`` of the Function's first arguments, all at once: tensors, but the last of them may be None."""
    edges, answers = ctx.next_functions, []
    for index, needed in enumerate(ctx.needs_input_grad[:count]):
        node = edges[index][0] if needed else None
        if node is not None and not isinstance(node, torch._C._functions.AccumulateGrad):  # type: ignore[attr-defined]
            needed = torch._C._will_engine_execute_node(node)
        answers.append(needed)
    return tuple(answers)
