"""What PyTorch's wrappers for several processes allow: a penalty's step has two backwards, and they count on one.

DistributedDataParallel with a static graph averages gradients when the first backward ends. ``fully_shard`` and
FullyShardedDataParallel free a module's gathered weights then, which the second backward, through the first, reads.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

# The node through which fully_shard hands a module its inputs; when a backward comes to it, it is done with the module.
_END_OF_BACKWARD = "RegisterPostBackwardFunctionBackward"


def in_use() -> bool:
    """Whether this process is one of several, or a group of its own; else no model is spread."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def is_sharded(model: torch.nn.Module) -> bool:
    """Whether the weights are spread over processes, so that the parameters are not what the modules compute with."""
    if not in_use():
        return False
    from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel

    return any(isinstance(module, (FSDPModule, FullyShardedDataParallel)) for module in model.modules())


def refuse_static_graph(module: Any) -> None:
    """Raise ValueError if a module is a DistributedDataParallel that takes the first backward for the last."""
    if isinstance(module, DistributedDataParallel) and module.static_graph:
        raise ValueError(
            "the model is a DistributedDataParallel with static_graph=True, which averages the gradients when its "
            "first backward ends: that is the penalty's own, with respect to x, before there are any. Leave "
            "static_graph out"
        )


def refuse_freed_weights(tensors: Iterable[Any]) -> None:
    """Raise RuntimeError if a layer called with these tensors is of a module that frees its weights too early.

    Its input, or that of a module around it, comes from fully_shard's node; for FullyShardedDataParallel, its weight is
    a view of the parameter into which everything is gathered.
    """
    for tensor in tensors:
        if not isinstance(tensor, Tensor):
            continue
        if hasattr(tensor._base, "_is_flat_param"):
            if hasattr(tensor._base, "_full_param_padded"):
                raise RuntimeError(_FREED.format("is a FullyShardedDataParallel", _OTHERS))
            continue  # such a view may not be asked for its node, once others wrote into its base
        node: Any = tensor.grad_fn
        while type(node).__name__ == _END_OF_BACKWARD:
            if node.param_group.reshard_after_backward:
                raise RuntimeError(_FREED.format("is sharded by fully_shard", _REMEDY))
            node = node.next_functions[0][0]


def refuse_freed_weights_behind(output: Tensor) -> None:
    """The same of what a module returned outside: fully_shard's hook on it leads to the weights."""
    for hook in (output._backward_hooks or {}).values():
        state = getattr(hook, "__self__", None)
        groups = getattr(state, "_fsdp_param_groups", None) or [getattr(state, "_fsdp_param_group", None)]
        if any(group is not None and group.reshard_after_backward for group in groups):
            raise RuntimeError(_FREED.format("is sharded by fully_shard", _REMEDY))


_FREED = (
    "the model {}, which frees a module's weights when the first backward ends: that is the one with respect to x, and "
    "the training step's backward needs them again. {}, or use DensityPenalty(method='finite_difference'), which works "
    "as it is"
)
_REMEDY = (
    "Call model.set_reshard_after_backward(False), which makes it exact; and after the backward of each step, before "
    "the optimizer's, reshard() of each torch.distributed.fsdp.FSDPModule in model.modules(), without which the next "
    "forward would run on old weights"
)
_OTHERS = "Shard it by fully_shard instead, and call set_reshard_after_backward(False)"
