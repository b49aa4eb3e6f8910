"""How a fused kernel becomes a ``torch.library`` operation under ``rds_fast::``.

Its last argument names the backend that runs it. An operation that works row by row (dimension 0 of each tensor
argument and of each result counts samples) has a batching rule, the same for all. The others, which the public
functions never call inside a transformation of ``torch.func``, have none.

The dispatcher's way to a kernel written in Python leads through Python twice and converts every argument four times,
which takes longer than many a kernel. So the Functions beside an operation go past it where nobody would notice.
"""

from __future__ import annotations

import functools
import importlib
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ..backends import PLAIN_TENSORS
from .function import Function

_library = torch.library.Library("rds_fast", "DEF")

# The vmap of torch.autograd.grad, which is older than torch.func's. Parsed once, since that takes long.
_VMAP_OF_AUTOGRAD: Any = torch._C._parse_dispatch_key("VmapMode")

_NUMBERS = frozenset((bool, int, float, str, type(None)))


def _bits(*keys: str) -> int:
    sets: Any = (torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key)) for key in keys)
    return int(functools.reduce(operator.or_, sets).raw_repr())


# What the dispatcher adds to an operation's own keys where no mode, transformation or tracer is at work; and the keys
# of tensors that are no more than memory: those that are still to be negated, zeros without memory, wrappers that a
# transformation left behind and whatever else the dispatcher makes into such tensors have others.
_NOBODY_ELSE = _bits("BackendSelect", "ADInplaceOrView")
_MEMORY = _bits("CPU", "AutogradCPU", "AutocastCPU", "CUDA", "AutogradCUDA", "AutocastCUDA", "ADInplaceOrView")


@functools.cache
def _kernel(file: str, name: str, backend: str) -> Callable[..., Any]:
    """The kernel ``name`` of a backend: it has the same name, in a file of the same name, in every layer."""
    if backend == "native":
        try:
            return getattr(torch.ops.rds_fast_native, name).default
        except AttributeError:
            raise RuntimeError(
                f"the native library has no operation {name!r}, so it was built from an older version of the sources; "
                "build it again (see 'Building' in README.md)"
            ) from None
    if backend == "triton":
        return getattr(importlib.import_module(f"rds_fast.kernels.{file}"), name)
    raise ValueError(f"backend is {backend!r}; a fused operation runs on 'native' or 'triton'")


def register(file: str, schema: str, fake: Callable[..., Any], *, row_wise: bool = True) -> Any:
    """Define one fused operation.

    Args:
        file: the name of the file, without its suffix, that holds the kernels in each layer.
        schema: ``name(Tensor x, …, str backend) -> …``.
        fake: allocates the results without computing them; it takes the schema's arguments.
        row_wise: whether it works row by row, and so has a batching rule.

    Returns:
        A function of the schema's arguments that runs the operation. The operation has no derivative of its own: it
        raises when differentiated. The derivatives are the autograd Functions beside it.
    """
    name = schema.partition("(")[0]
    _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    qualified_name = f"rds_fast::{name}"

    def run(*arguments: Any) -> Any:
        return _kernel(file, name, arguments[-1])(*arguments[:-1])

    def refuse(*_: Any) -> None:
        raise RuntimeError(
            f"{qualified_name} has no derivative of its own; call the public operation of rds_fast, which has two"
        )

    _library.impl(name, run, "CPU")
    _library.impl(name, run, "CUDA")
    torch.library.register_fake(qualified_name, fake, lib=_library)
    operation = getattr(torch.ops.rds_fast, name).default
    if operation._schema.is_mutable:
        _library.impl(name, functools.partial(_run_mutating, operation, refuse), "Autograd")
    else:
        torch.library.register_autograd(qualified_name, refuse, lib=_library)
    if row_wise:
        torch.library.register_vmap(qualified_name, functools.partial(_run_batched, operation), lib=_library)

    def call(*arguments: Any) -> Any:
        if forward_ad._current_level >= 0:
            _refuse_tangents(arguments)
        if _is_unwatched(arguments):
            return _kernel(file, name, arguments[-1])(*arguments[:-1])
        return operation(*arguments)

    return call


def _is_unwatched(arguments: tuple[Any, ...]) -> bool:
    """Whether the dispatcher would find the kernel, and do nothing else that anybody is known to want.

    The profiler is to see the operation, and so is whatever may intercept it: modes (of dispatch, vmap, tracing,
    functionalisation), subclasses of Tensor, devices without kernels. Autograd has to see it when gradients are
    enabled, in order to refuse. Function modes are for the public functions, and do not see it.
    """
    if torch.is_grad_enabled() or torch._C._autograd._profiler_enabled():
        return False
    if torch._C._dispatch_tls_local_include_set().raw_repr() != _NOBODY_ELSE:
        return False
    for argument in arguments:
        kind = type(argument)
        if kind in PLAIN_TENSORS:
            if torch._C._dispatch_keys(argument).raw_repr() & ~_MEMORY:
                return False
        elif kind not in _NUMBERS:
            return False
    return True


def _refuse_tangents(arguments: tuple[Any, ...]) -> None:
    """Raise if an argument may have a tangent of forward mode, which a fused operation would drop without a word.

    A forward inside forward mode runs the plain formula; what comes here is the backward of a forward before it. Of a
    tensor that a transformation of ``torch.func`` wraps, nobody can tell whether it has a tangent.
    """
    for argument in arguments:
        if isinstance(argument, Tensor) and (
            torch._C._functorch.is_functorch_wrapped_tensor(argument)
            or forward_ad.unpack_dual(argument).tangent is not None
        ):
            raise RuntimeError(
                "a backward of rds_fast was given a tangent of forward mode, which fused operations cannot carry on; "
                "run the forward inside forward mode as well, or under rds_fast.use_backend('reference')"
            )


def _run_mutating(operation: Any, refuse: Callable[..., None], *arguments: Any) -> Any:
    """The autograd kernel of an operation that writes to arguments, for which PyTorch registers none."""
    tensors = [argument for argument in arguments if isinstance(argument, Tensor)]
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        refuse()
    with torch._C._AutoDispatchBelowAutograd():
        results = operation(*arguments)
    for declared, argument in zip(operation._schema.arguments, arguments, strict=True):
        if declared.alias_info is not None and argument is not None:
            torch.autograd.graph.increment_version(argument)
    return results


def _run_batched(operation: Any, info: Any, in_dims: tuple[int | None, ...], *arguments: Any) -> Any:
    """The batching rule: a batch of B inputs of N rows is one input of B·N rows."""
    rows = 0
    flat = []
    for argument, in_dim in zip(arguments, in_dims, strict=True):
        if isinstance(argument, Tensor):
            batched = (
                argument.expand(info.batch_size, *argument.shape) if in_dim is None else argument.movedim(in_dim, 0)
            )
            rows = batched.shape[1]
            # contiguous: a view of a batch can have any strides, and the kernels need unit columns
            argument = batched.reshape(info.batch_size * rows, *batched.shape[2:]).contiguous()
        flat.append(argument)
    results = operation(*flat)
    if isinstance(results, Tensor):
        return results.reshape(info.batch_size, rows, *results.shape[1:]), 0
    return (
        tuple(result.reshape(info.batch_size, rows, *result.shape[1:]) for result in results),
        (0,) * len(results),
    )


def derivative(function: type[Function], *arguments: Any) -> Any:
    """Call an autograd Function; past autograd where no derivative of its result can be asked for.

    A backward runs with gradients enabled only if its own graph is wanted, and ``apply`` costs some 15 µs more than the
    operation alone.

    Raises:
        RuntimeError: inside ``torch.autograd.grad(..., is_grads_batched=True, create_graph=True)``, whose vmap drops
            the graph of every autograd Function without a word; or an argument has a tangent of forward mode.
    """
    if not torch.is_grad_enabled():
        return function.forward(*arguments)
    if forward_ad._current_level >= 0:
        _refuse_tangents(arguments)
    if torch._C._dispatch_tls_is_dispatch_key_included(_VMAP_OF_AUTOGRAD):
        raise RuntimeError(
            "a backward of rds_fast ran in torch.autograd.grad with is_grads_batched=True and create_graph=True, where "
            "PyTorch loses the second derivatives of custom functions; call torch.autograd.grad once a cotangent, or "
            "run the forward under rds_fast.use_backend('reference')"
        )
    return function.apply(*arguments)


def third_derivative(operation: str) -> RuntimeError:
    """The error that ends the chain of derivatives."""
    return RuntimeError(
        f"the third derivative of {operation} was asked for, and the fused operation has two; "
        "run the forward under rds_fast.use_backend('reference') for higher orders"
    )
