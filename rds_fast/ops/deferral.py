"""Weight gradients that wait until another operation's kernel has written what they need.

The double backward of a convolution takes dw = W(v, g) from g, the cotangent of its result, which was not kept where a
batch norm follows: its ingredients were (see ``recompute``), and to compute it again takes a pass over two of them and
one that writes. The engine comes to that batch norm next. Its double backward reads all that g is made of, and writes
g too for one pass more. So the convolution leaves dw to it. Its result goes into the graph where the engine comes by
later in the same run: at the convolution's forward, whose own gradient of the same weight it is added to.

    forward      convolution ── y ── batch norm
    backward     convolution's ── g ── batch norm's         the nodes of their derivatives: the double backward runs
                                                            left to right here, then right to left above

The edges show that the engine will come to these nodes, and in this order: each of them leads to the next and so to the
weight whose gradient is wanted. Where they are joined in another way (a sum, a cast, a second use of y), or the graph
of dw itself is wanted, which leads through g, dw is computed at once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor


class _Waiting(NamedTuple):
    """A weight gradient W(v, g) = ``compute(v, g)`` for the node of a convolution's forward.

    version: v's, which nobody may change meanwhile. Nothing of it may lead to a node of the double backward: if the run
    breaks off, the node where it waits would keep itself alive, by edges that Python's garbage collector cannot see.
    """

    compute: Callable[[Tensor, Tensor], Tensor]
    v: Tensor
    version: int
    convolution: Any


def write_for(ctx: Any, edge: int) -> None:
    """Offer, in the node of a backward, to write its first result g again when it is differentiated.

    edge: the position among its tensor arguments of a result of the forward, whose first argument y is.
    """
    ctx.edge_to_forward = edge


def take_for(ctx: Any, edge: int) -> None:
    """Offer, in the node of a convolution, to take gradients of its weight, its tensor argument number ``edge``."""
    ctx.edge_to_weight = edge


def leave(ctx: Any, edge: int, v: Tensor, compute: Callable[[Tensor, Tensor], Tensor]) -> bool:
    """Whether dw = compute(v, g) is left to the node of the operation that gave g, and the caller is to return none.

    Args:
        ctx: the node of a convolution's backward, now being differentiated; its first argument is g.
        edge: the position among its tensor arguments of the weight, whose gradient is wanted.
        v: what came to ``ctx``.
        compute: dw from v and g. It must not hold ``ctx``.
    """
    source = ctx.next_functions[0][0]
    convolution = _node_before(source)
    if convolution is None or torch.is_grad_enabled():
        return False
    if convolution.next_functions[convolution.edge_to_weight] != ctx.next_functions[edge]:
        return False
    version = 0 if v.is_inference() else v._version
    _left(source, "waiting").append(_Waiting(compute, v.detach() if v.requires_grad else v, version, convolution))
    return True


def _node_before(source: Any) -> Any:
    """The node of the convolution whose result y the operation took whose backward is ``source``, if it is one."""
    edge = getattr(source, "edge_to_forward", None)
    operation = None if edge is None else source.next_functions[edge][0]
    before = None if operation is None else operation.next_functions[0][0]
    return before if hasattr(before, "edge_to_weight") else None


def _left(node: Any, name: str) -> list[Any]:
    """What the present run of the engine has left at a node; to be added to.

    Other runs may be under way on the same graph, nested in this one or on other threads. A run that breaks off leaves
    it there for as long as the node lives.
    """
    runs: dict[int, list[Any]] = vars(node).setdefault(name, {})
    return runs.setdefault(torch._C._current_graph_task_id(), [])


def _take(node: Any, name: str) -> list[Any]:
    """The same, and it is no longer there."""
    return getattr(node, name, {}).pop(torch._C._current_graph_task_id(), [])


def is_awaited(ctx: Any) -> bool:
    """Whether the node of a backward, now being differentiated, is to write g."""
    return torch._C._current_graph_task_id() in getattr(ctx, "waiting", {})


def deliver(ctx: Any, g: Tensor) -> None:
    """Compute what waits at a node for g, and bring it to the convolutions."""
    for waiting in _take(ctx, "waiting"):
        if not waiting.v.is_inference() and waiting.v._version != waiting.version:
            raise RuntimeError(
                "the cotangent of a convolution's input gradient was changed in place, by a hook, before the gradient "
                "of the convolution's weight was computed from it; let the hook change and return a copy"
            )
        _left(waiting.convolution, "arrived").append(waiting.compute(waiting.v, g))


def collect(ctx: Any, gradient: Tensor | None) -> Tensor | None:
    """``gradient`` of a convolution's weight, and what has arrived at its node besides."""
    for arrived in _take(ctx, "arrived"):
        gradient = arrived if gradient is None else gradient + arrived
    return gradient
