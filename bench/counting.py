"""What an operation moves, by rules that need no device: bytes, FLOPs, launches, and what a step keeps alive.

The rules, for every operation that reaches a backend (``aten::`` and others; composite ones as the parts that they
dispatch to):

- An operation whose results all lie in the storage of its arguments and which writes nothing is a view, and one that
  only allocates (``empty`` and its kin) runs nothing: neither counts.
- Each distinct tensor argument is read once and each result is written once. A dimension of stride 0 counts one
  element: what is expanded exists once. (Counting expanded tensors in full would give the eager penalty 1.6% more.) An
  argument written in place is read and written, by ``fill_``, ``zero_`` and ``copy_`` written only. Running statistics,
  which batch norm's schema does not declare written, are read only.
- PyTorch's batch norm reads its inputs of N, C and more dimensions twice where it needs sums over a channel: in the
  forward with the batch's statistics, and in the backward.
- An operation of ``rds_fast::`` counts what its kernels do, by the table in ``rds_fast/ops/costs.py``. Of the others
  one launch each is known, the least there can be.
- FLOPs: two for a multiplication with its addition, of convolutions and matrix products only, by the formulas of
  ``torch.utils.flop_counter``; a fused operation has none there and counts 0.
"""

from __future__ import annotations

import gc
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import conv_flop_count, flop_registry

from rds_fast.ops.costs import Cost, cost

aten = torch.ops.aten

ALLOCATIONS = {
    aten.empty,
    aten.empty_like,
    aten.empty_permuted,
    aten.empty_strided,
    aten.new_empty,
    aten.new_empty_strided,
}
# In place, and without a look at what was there.
WRITE_ONLY = {aten.copy_, aten.fill_, aten.zero_}

_STATISTICS = Cost(reads={"input": 2})
_BACKWARD = Cost(reads=dict.fromkeys(("grad_out", "grad_output", "input"), 2))
BATCH_NORM: dict[Any, Cost] = {
    aten.native_batch_norm: _STATISTICS,
    aten._native_batch_norm_legit: _STATISTICS,
    aten._native_batch_norm_legit_functional: _STATISTICS,
    aten._batch_norm_with_update: _STATISTICS,
    aten._batch_norm_with_update_functional: _STATISTICS,
    aten.cudnn_batch_norm: _STATISTICS,
    aten.miopen_batch_norm: _STATISTICS,
    aten.native_batch_norm_backward: _BACKWARD,
    aten.batch_norm_backward: _BACKWARD,
    aten.cudnn_batch_norm_backward: _BACKWARD,
    aten.miopen_batch_norm_backward: _BACKWARD,
}


def cost_of(operation: Any, arguments: Mapping[str, Any]) -> Cost:
    """The launches of one call and its passes over each tensor, where they are not one each."""
    if operation.namespace == "rds_fast":
        return cost(operation._schema.name.removeprefix("rds_fast::"), arguments)
    declared = BATCH_NORM.get(operation.overloadpacket)
    if declared is _STATISTICS and not (arguments.get("training", True) or arguments.get("train", False)):
        return Cost()  # the running statistics are at hand
    return declared or Cost()


def size_in_bytes(tensor: Tensor) -> int:
    """Of the elements that exist: a dimension of stride 0 is one of them."""
    elements = 1
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        elements *= size if stride or not size else 1
    return elements * tensor.element_size()


def _same(tensor: Tensor) -> tuple[Any, ...]:
    return (_storage(tensor), tensor.storage_offset(), tensor.shape, tensor.stride(), tensor.dtype)


def _tensors(values: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _storages(values: Any) -> set[int]:
    return {_storage(tensor) for tensor in _tensors(values)}


def named_arguments(operation: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a call by their names in the schema."""
    names = (argument.name for argument in operation._schema.arguments)
    return {**dict(zip(names, args, strict=False)), **kwargs}


def moved_bytes(operation: Any, arguments: Mapping[str, Any], results: Any) -> int:
    """The bytes that one call reads and writes."""
    passes_of = cost_of(operation, arguments)
    reads: dict[tuple[Any, ...], int] = {}
    writes: dict[tuple[Any, ...], int] = {}
    for argument in operation._schema.arguments:
        written = argument.is_write
        read = not (written and (argument.kwarg_only or operation.overloadpacket in WRITE_ONLY))
        for tensor in _tensors(arguments.get(argument.name)):
            if read:
                passes = passes_of.reads.get(argument.name, 1)
                reads[_same(tensor)] = max(reads.get(_same(tensor), 0), passes * size_in_bytes(tensor))
            if written:
                writes[_same(tensor)] = size_in_bytes(tensor)
    known = _storages(arguments)
    fresh = 0
    for number, result in enumerate(tree_leaves(results)):
        if isinstance(result, Tensor) and _storage(result) not in known:
            fresh += passes_of.writes.get(number, 1) * size_in_bytes(result)
    return sum(reads.values()) + sum(writes.values()) + fresh


def runs_nothing(operation: Any, arguments: Mapping[str, Any], results: Any) -> bool:
    """Whether a call is a view or an allocation."""
    if operation.overloadpacket in ALLOCATIONS:
        return True
    if operation._schema.is_mutable:
        return False
    return _storages(results) <= _storages(arguments)


def _convolution_backward(grad_output: Any, x: Any, weight: Any, *rest: Any, **_: Any) -> int:
    """Each gradient asked for costs what the forward does; ``torch``'s own formula forgets the groups."""
    transposed, mask = rest[4], rest[7]
    return conv_flop_count(x, weight, grad_output, transposed) * sum(mask[:2])


def flops(operation: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], results: Any) -> int:
    if operation.overloadpacket is aten.convolution_backward:
        args = tuple(arg.shape if isinstance(arg, Tensor) else arg for arg in args)
        return _convolution_backward(*args)
    formula = flop_registry.get(operation.overloadpacket)
    return 0 if formula is None else formula(*args, **kwargs, out_val=results)


class Count(NamedTuple):
    """What operations do: one of them, or the sum of many."""

    flops: int = 0
    bytes: int = 0
    operations: int = 0
    launches: int = 0


def total(counts: Iterable[Count]) -> Count:
    return Count(*map(sum, zip(Count(), *counts, strict=True)))


def _as_on_a_device(operation: Any, args: tuple[Any, ...], results: Any) -> Any:
    """The gradients of a convolution's input and weight come in the memory formats of these; the meta function forgets.

    They would then be copied into those formats, which no device does; in PyTorch 2.11 every weight gradient would be.
    """
    if operation is not aten.convolution_backward.default:
        return results
    *of_tensors, of_bias = results
    formatted = (
        torch.empty_like(tensor) if gradient is not None and gradient.is_meta else gradient
        for gradient, tensor in zip(of_tensors, args[1:3], strict=True)
    )
    return *formatted, of_bias


class Traffic(TorchDispatchMode):
    """Counts the operations inside its ``with`` block and watches the storages that they create.

    calls: (name in full, count) of each operation, in their order. peak: the most bytes of storages created inside that
    were alive after an operation.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, Count]] = []
        self.peak = 0
        self._storages: dict[StorageWeakRef, int] = {}

    def __torch_dispatch__(self, operation: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        results = _as_on_a_device(operation, args, operation(*args, **kwargs))
        arguments = named_arguments(operation, args, kwargs)
        self._watch(arguments, results)
        if not runs_nothing(operation, arguments, results):
            count = Count(
                flops(operation, args, kwargs, results),
                moved_bytes(operation, arguments, results),
                1,
                cost_of(operation, arguments).launches,
            )
            self.calls.append((operation._schema.name, count))
        return results

    def _watch(self, arguments: Mapping[str, Any], results: Any) -> None:
        known = _storages(arguments)
        for result in _tensors(results):
            if _storage(result) not in known:
                storage = result.untyped_storage()
                self._storages[StorageWeakRef(storage)] = storage.nbytes()
        self._storages = {ref: size for ref, size in self._storages.items() if not ref.expired()}
        self.peak = max(self.peak, sum(self._storages.values()))

    @property
    def total(self) -> Count:
        return total(count for _, count in self.calls)

    def by_name(self) -> dict[str, Count]:
        """The sums by operation."""
        names: dict[str, list[Count]] = {}
        for name, count in self.calls:
            names.setdefault(name, []).append(count)
        return {name: total(counts) for name, counts in names.items()}

    def alive(self, *results: Tensor) -> int:
        """The bytes of the storages created inside that are still alive, each once, but for those of ``results``.

        It does not matter what keeps them: saved tensors, attributes of ctx or a reference forgotten.
        """
        gc.collect()
        given = {StorageWeakRef(result.untyped_storage()) for result in results}
        return sum(size for ref, size in self._storages.items() if not ref.expired() and ref not in given)
