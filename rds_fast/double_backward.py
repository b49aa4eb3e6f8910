"""``fast_double_backward``: a fast and exact double backward for any model, with no change to the model.

Under this function mode a network's layers run on the operations of ``rds_fast.ops``, whose backward is itself an
operation with a cheap backward. What is not in the table below runs as ever.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import CellType, FunctionType
from typing import Any

import torch
import torch.utils.checkpoint
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from .backends import PLAIN_TENSORS
from .compilation import pause_compiling, resume_compiling, uncompiled_alone
from .distributed import in_use, refuse_freed_weights
from .ops import activation, concatenation, convolution, pooling
from .ops.batch_norm import batch_norm
from .ops.group_norm import group_norm, instance_norm, layer_norm


class fast_double_backward(TorchFunctionMode):
    """A context manager: forwards inside have a fast double backward.

    It serves any loss that holds a gradient: the density penalty and its relatives, which enter it by themselves, and
    R1, WGAN-GP, force matching and the like. The derivatives are exact to second order; a third raises where the fused
    operation ends the chain, and exists elsewhere, and under ``use_backend("reference")`` everywhere. Only the forward
    must run inside. The mode holds for the thread that
    entered it, may be nested, and is left when an exception is raised.

    Convolutions of all kinds, batch, layer, group and instance norm, activations, pools and concatenations run on
    operations of this library; scaled dot product attention in its plain form, since PyTorch's fused ones cannot be
    differentiated twice. Everything else is left as it is, and so is all that runs under activation checkpointing,
    which is computed again outside the mode.

    Example, the R1 penalty (Mescheder, Geiger and Nowozin 2018)::

        with rds_fast.fast_double_backward():
            scores = discriminator(real)
        (gradient,) = torch.autograd.grad(scores.sum(), real, create_graph=True)
        penalty = gradient.square().flatten(1).sum(1).mean()
    """

    _in_distributed_use = False

    @uncompiled_alone
    def __enter__(self) -> Any:
        pause_compiling()
        self._in_distributed_use = in_use()  # asked once, since it takes as long as a small layer
        return super().__enter__()

    @uncompiled_alone
    def __exit__(self, *raised: Any) -> None:
        super().__exit__(*raised)
        resume_compiling()

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if self._in_distributed_use:
            refuse_freed_weights((*args, *kwargs.values()))
        replacement = replacement_of(func)
        if replacement is None and not _is_functional(func):  # nearly all calls: the attributes of tensors among them
            return func(*args, **kwargs)
        # nobody asks for a derivative; or a subclass has its own ways
        differentiated = torch.is_grad_enabled() or forward_ad._current_level >= 0
        if not (differentiated and PLAIN_TENSORS.issuperset(types)):
            return func(*args, **kwargs)
        if replacement is None:
            super().__enter__()  # of what ours does, nothing is to be done twice
            try:
                return _transparent(func)(*args, **kwargs)
            finally:
                super().__exit__(None, None, None)
        # autograd has no part in what is written to an ``out``, and NumPy's names of an input are PyTorch's alone
        if not _PYTORCHS_ALONE.isdisjoint(kwargs) or _is_checkpointed():
            return func(*args, **kwargs)
        return replacement(*args, **kwargs)


_PYTORCHS_ALONE = frozenset(("out", "x", "a", "x1"))


def _is_checkpointed() -> bool:
    """Whether what is saved for the backward passes is thrown away, and the forward run again when it is needed.

    That run is outside the mode as a rule, and what it saves must be what this one would have saved: PyTorch compares
    no more than shapes and dtypes, and of a batch norm without parameters it would take 1/σ for our σ².
    """
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
    return hooks is not None and hooks[0].__module__ == torch.utils.checkpoint.__name__


def _is_functional(function: Any) -> bool:
    return isinstance(function, FunctionType) and function.__module__ == functional.__name__


@functools.cache
def _transparent(function: FunctionType) -> Callable[..., Any]:
    """A copy of a Python function of ``torch.nn.functional`` that does not hand itself to the mode.

    Such a function gives itself to the mode first, as a whole; what it calls (the builtin batch norm, attention inside
    ``multi_head_attention_forward``) would then run outside the mode. The copy goes straight on to those calls. The
    max pools are closures over two such functions, which are copied too.
    """
    cells = (cell.cell_contents for cell in function.__closure__ or ())
    closure = tuple(CellType(_transparent(held) if _is_functional(held) else held) for held in cells)
    copy = FunctionType(function.__code__, _globals_without_check(), function.__name__, function.__defaults__, closure)
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy


@functools.cache
def _globals_without_check() -> dict[str, Any]:
    checks = ("has_torch_function", "has_torch_function_unary", "has_torch_function_variadic")
    return {**vars(functional), **dict.fromkeys(checks, lambda *_: False)}


def _batch_norm(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    cudnn_enabled: bool,
) -> Tensor:
    """The builtin's arguments, in their order, to ours."""
    return batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)


def _instance_norm(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    use_input_stats: bool,
    momentum: float,
    eps: float,
    cudnn_enabled: bool,
) -> Tensor:
    return instance_norm(input, running_mean, running_var, weight, bias, use_input_stats, momentum, eps)


def _layer_norm(
    input: Tensor,
    normalized_shape: list[int] | tuple[int, ...],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    cudnn_enable: bool = True,
) -> Tensor:
    return layer_norm(input, normalized_shape, weight, bias, eps)


def _group_norm(
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    cudnn_enabled: bool = True,
) -> Tensor:
    return group_norm(input, num_groups, weight, bias, eps)


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """PyTorch's composition of matrix products and a softmax, which it can differentiate to any order.

    But not under the compiler's tracer: what it compiles is differentiated once, of which the fused forms are capable.
    """
    if torch.compiler.is_compiling():
        return functional.scaled_dot_product_attention(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )
    return torch.ops.aten._scaled_dot_product_attention_math.default(
        query, key, value, attn_mask, dropout_p, is_causal, None, scale=scale, enable_gqa=enable_gqa
    )[0]


# PyTorch's functions and builtins, and what runs in their place.
_REPLACEMENTS: dict[Callable[..., Any], Callable[..., Any]] = {
    **{
        plain: functools.partial(ours, plain)
        for module in (convolution, pooling, concatenation)
        for plain, ours in module.REPLACEMENTS.items()
    },
    **activation.REPLACEMENTS,
    functional.batch_norm: batch_norm,
    torch.batch_norm: _batch_norm,
    functional.layer_norm: layer_norm,
    torch.layer_norm: _layer_norm,
    functional.group_norm: group_norm,
    torch.group_norm: _group_norm,
    functional.instance_norm: instance_norm,
    torch.instance_norm: _instance_norm,
    functional.scaled_dot_product_attention: _attention,
}


def replacement_of(function: Callable[..., Any]) -> Callable[..., Any] | None:
    """What runs in place of one of PyTorch's functions; None: the function itself."""
    try:
        return _REPLACEMENTS.get(function)
    except TypeError:  # others may hand a callable to the mode that has no hash
        return None
