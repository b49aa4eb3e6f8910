"""Cross-entropy and log-sum-exp of the same logits in one pass, both differentiable twice.

For each row: f the logits, l = log Σ exp f, s = exp(f − l), q' the smoothed target distribution, Q = Σ q' (1 for class
indices, 0 for an ignored row). With g_ce, g_lse the cotangents, v the cotangent of the backward's result, S = Σ v s,
T = Σ v q' and a = g_ce Q + g_lse:

    forward            cross-entropy = Q l − Σ q' f,   l
    backward           gx = a s − g_ce q'
    double backward    dg_ce = Q S − T,   dg_lse = S,   dlogits = a s (v − S)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import reference
from ..backends import select
from .function import Function
from .inputs import can_be_read, check_number, check_rows
from .logsumexp import LogSumExpBackward, at_full_precision, full_precision, saved_logsumexp, with_unit_column_stride
from .registration import derivative, register, third_derivative


def _forward_fake(
    logits: Tensor, target: Tensor, label_smoothing: float, ignore_index: int, full_precision: bool, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    accumulated = reference.accumulation_dtype(logits.dtype)
    dtype = accumulated if full_precision else logits.dtype
    rows = logits.shape[0]
    return (
        logits.new_empty(rows, dtype=dtype),
        logits.new_empty(rows, dtype=dtype),
        logits.new_empty((rows, 0 if dtype == accumulated else 1), dtype=accumulated),
    )


def _double_backward_fake(
    v: Tensor,
    g_ce: Tensor,
    g_lse: Tensor,
    logits: Tensor,
    target: Tensor,
    lse: Tensor,
    label_smoothing: float,
    ignore_index: int,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    return g_ce.new_empty(g_ce.shape), g_lse.new_empty(g_lse.shape), logits.new_empty(logits.shape)


# logits: (N, C) of unit column stride. target: int64 (N,), or probabilities (N, C) of the logits' or the accumulation
# dtype and unit column stride. Results: cross-entropy, log-sum-exp, saved; dtypes and saved as for logsumexp.
_forward = register(
    "cross_entropy",
    "cross_entropy(Tensor logits, Tensor target, float label_smoothing, int ignore_index, bool full_precision, "
    "str backend) -> (Tensor, Tensor, Tensor)",
    _forward_fake,
)
# g_ce, g_lse: (N,), both of the logits' dtype or both of the accumulation dtype. lse: (N,) of the accumulation dtype.
_backward = register(
    "cross_entropy",
    "cross_entropy_backward(Tensor g_ce, Tensor g_lse, Tensor logits, Tensor target, Tensor lse, "
    "float label_smoothing, int ignore_index, str backend) -> Tensor",
    lambda g_ce, g_lse, logits, *_: logits.new_empty(logits.shape),
)
_double_backward = register(
    "cross_entropy",
    "cross_entropy_double_backward(Tensor v, Tensor g_ce, Tensor g_lse, Tensor logits, Tensor target, Tensor lse, "
    "float label_smoothing, int ignore_index, str backend) -> (Tensor, Tensor, Tensor)",
    _double_backward_fake,
)


class CrossEntropyWithLogSumExp(Function):
    """(N, C) logits to their cross-entropy (N,) and log-sum-exp (N,)."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        logits: Tensor,
        target: Tensor,
        label_smoothing: float,
        ignore_index: int,
        full_precision: bool,
        backend: str,
    ) -> tuple[Tensor, Tensor, Tensor]:
        return _forward(logits, target, label_smoothing, ignore_index, full_precision, backend)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
        logits, target, ctx.label_smoothing, ctx.ignore_index, _, ctx.backend = inputs
        _, lse, saved = output
        ctx.mark_non_differentiable(saved)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(logits, target, saved_logsumexp(lse, saved))

    @staticmethod
    def backward(ctx: Any, g_ce: Tensor | None, g_lse: Tensor | None, _: Any) -> Any:
        logits, target, lse = ctx.saved_tensors
        lse = lse.detach()  # the double backward gives total derivatives
        if g_ce is None and g_lse is None:
            gradient = None
        elif g_ce is None:  # the inner pass of the density penalty: the target does not enter
            gradient = derivative(LogSumExpBackward, g_lse, logits, lse, ctx.backend)
        else:
            gradient = derivative(
                CrossEntropyBackward,
                g_ce,
                torch.zeros_like(g_ce) if g_lse is None else g_lse,
                logits,
                target,
                lse,
                ctx.label_smoothing,
                ctx.ignore_index,
                ctx.backend,
            )
        return gradient, None, None, None, None, None


class CrossEntropyBackward(Function):
    """gx = a s − g_ce q'. The double backward's dlogits is the total derivative, through l too."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        g_ce: Tensor,
        g_lse: Tensor,
        logits: Tensor,
        target: Tensor,
        lse: Tensor,
        label_smoothing: float,
        ignore_index: int,
        backend: str,
    ) -> Tensor:
        return _backward(g_ce, g_lse, logits, target, lse, label_smoothing, ignore_index, backend)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        *tensors, ctx.label_smoothing, ctx.ignore_index, ctx.backend = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: Any, v: Tensor | None) -> Any:
        if v is None:
            return (None,) * 8
        derivatives = derivative(
            CrossEntropyDoubleBackward, v, *ctx.saved_tensors, ctx.label_smoothing, ctx.ignore_index, ctx.backend
        )
        return (*derivatives, None, None, None, None, None)


class CrossEntropyDoubleBackward(Function):
    """dg_ce = Q S − T, dg_lse = S, dlogits = a s (v − S): the last derivative."""

    generate_vmap_rule = True

    @staticmethod
    def forward(v: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
        return _double_backward(with_unit_column_stride(v), *arguments)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        raise third_derivative("rds_fast.cross_entropy_with_logsumexp")


def cross_entropy_with_logsumexp(
    logits: Tensor, target: Tensor, *, label_smoothing: float = 0.0, ignore_index: int = -100
) -> tuple[Tensor, Tensor]:
    """The cross-entropy and the log-sum-exp of each row of logits, from one read of them.

    The log-sum-exp is the log density of the input up to a constant; training with its gradient's penalty needs both.
    Both results are differentiable twice in reverse mode (a third derivative raises), with one fused backward where
    both are used; in forward mode, and in any mix that holds it, the plain formula runs.

    Args:
        logits: (N, C); float64, float32, bfloat16 or float16.
        target: class indices (N,), int64 in [0, C) or ``ignore_index``; or class probabilities (N, C), floating point,
            used as given (they need not sum to 1). Probabilities that require a gradient get it, by the plain formula.
        label_smoothing: ε in [0, 1]; the target becomes (1 − ε) target + ε / C.
        ignore_index: the index whose rows have cross-entropy 0 and no gradient from it; unused with probabilities.

    Returns:
        ``(cross_entropy, logsumexp)``, each (N,), unreduced, in the dtype of ``logits``; float32 for 16-bit logits
        under autocast.

    Raises:
        TypeError: ``logits`` or ``target`` is not a dense tensor or has the wrong dtype, or ``label_smoothing`` is not
            a number.
        ValueError: a shape does not fit, or ``label_smoothing`` is outside [0, 1].
        IndexError: on CPU, a class index is out of range; on CUDA a device assertion fails, as in PyTorch.
    """
    label_smoothing = check_number("label_smoothing", label_smoothing)
    _check(logits, target, label_smoothing)
    backend = select(logits)
    if target.is_floating_point():
        if any(layer.requires_grad for layer in _layers(target)):
            backend = "reference"
    elif not logits.is_cuda:
        check_class_indices(target, logits.shape[1], ignore_index)
    if backend == "reference" or logits.numel() == 0:
        return reference.cross_entropy_with_logsumexp(at_full_precision(logits), target, label_smoothing, ignore_index)
    if target.is_floating_point():
        target = with_unit_column_stride(target.to(reference.accumulation_dtype(logits.dtype)))
    else:
        target = target.contiguous()
    cross_entropy, lse, _ = derivative(
        CrossEntropyWithLogSumExp,
        with_unit_column_stride(logits),
        target,
        label_smoothing,
        ignore_index,
        full_precision(logits),
        backend,
    )
    return cross_entropy, lse


def _check(logits: Tensor, target: Tensor, label_smoothing: float) -> None:
    check_rows("logits", logits, "cross_entropy_with_logsumexp")
    check_rows("target", target, "cross_entropy_with_logsumexp", integers=True)
    if logits.dim() != 2:
        raise ValueError(f"logits have shape {tuple(logits.shape)}; they must be (N, C). Flatten further dimensions")
    if target.dtype != torch.int64 and not target.is_floating_point():
        raise TypeError(
            f"target is {target.dtype}; class indices must be torch.int64 (target.long()), probabilities floating point"
        )
    expected = logits.shape if target.is_floating_point() else logits.shape[:1]
    if target.shape != expected:
        kind = "probabilities" if target.is_floating_point() else "class indices"
        raise ValueError(
            f"target has shape {tuple(target.shape)}; {kind} for logits of shape {tuple(logits.shape)} must have "
            f"shape {tuple(expected)}"
        )
    if target.device != logits.device:
        raise ValueError(f"target is on {target.device} and logits on {logits.device}; move one to the other's device")
    if not 0.0 <= label_smoothing <= 1.0:
        raise ValueError(f"label_smoothing is {label_smoothing}; it must be in [0, 1]")


def check_class_indices(target: Tensor, classes: int, ignore_index: int | None = None) -> None:
    """Raise IndexError if a class index is outside [0, classes) and is not ``ignore_index``.

    It reads values, so it is for CPU tensors; under ``torch.func`` transforms it reads those of the whole batch.
    Meta and fake tensors, and a trace by make_fx, have no values to read and pass.
    """
    if torch.compiler.is_compiling():  # before what the compiler cannot trace
        return
    target = _layers(target)[-1]
    if not can_be_read(target) or not target.numel():
        return
    lowest, highest = torch.aminmax(target)  # one pass, and nothing to allocate, where no row is ignored
    if lowest >= 0 and highest < classes:
        return
    bad = (target < 0) | (target >= classes)
    if ignore_index is not None:
        bad &= target != ignore_index
    if bad.any():
        position = tuple(bad.nonzero()[0].tolist())
        ignored = "" if ignore_index is None else f" or equal to ignore_index ({ignore_index})"
        raise IndexError(
            f"target[{', '.join(map(str, position))}] is {int(target[position])}; class indices must be in "
            f"[0, {classes}){ignored}"
        )


def _layers(tensor: Tensor) -> list[Tensor]:
    """The tensor and what each ``torch.func`` transform around it wraps, innermost last."""
    layers = [tensor]
    while torch._C._functorch.is_functorch_wrapped_tensor(layers[-1]):
        layers.append(torch._C._functorch.get_unwrapped(layers[-1]))
    return layers
