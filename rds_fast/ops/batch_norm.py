"""Batch norm, with a sum and a ReLU after it if wanted, differentiable twice.

For a channel with M values, means over the channel, r = (var + ε)^−½, x̂ = (x − mean) r and

    z = γ x̂ + β + residual,   y = z, or y = m z with the mask m = [z > 0] where a ReLU follows;

u the cotangent of y, u' = m u, and P(t) = t − mean(t) − x̂ mean(t x̂):

    backward           gx = γ r P(u'),   gγ = Σ u' x̂,   gβ = Σ u',   gresidual = u'
    double backward    for v, the cotangent of gx, cᵤ = mean(u' x̂), cᵥ = mean(v x̂),
                       cᵤᵥ = mean(u' v) − mean(u') mean(v) − cᵤ cᵥ:
                       du = m γ r P(v),   dγ = r M cᵤᵥ,   dx = −γ r² (cᵤᵥ x̂ + cᵥ P(u') + cᵤ P(v))
                       for a, b and c, the cotangents of gγ, gβ and gresidual:
                       du += m (a x̂ + b + c),   dx += a r P(u')

In eval mode mean and r are constants: P drops out, dγ = r Σ u' v and dx = a r u' alone.

The mask is not stored: it is recomputed from x or, where a residual was added, read off y. The derivatives are those of
a chain (see ``chain``), of which a batch norm alone is the shortest: there x, y and z are called y, z and the sum.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from .. import reference
from ..backends import in_transformation, select_for_layer
from ..reference import accumulation_dtype
from .chain import Chain, Stage, append, run
from .registration import register


def _statistics_like(x: Tensor, parameter: Tensor | None = None) -> Tensor:
    """(C,), in the dtype of a parameter if there is one, else in the accumulation dtype."""
    dtype = accumulation_dtype(x.dtype) if parameter is None else parameter.dtype
    return x.new_empty(x.shape[1], dtype=dtype)


# x: (N, C, ...), contiguous or channels-last; every other argument of its shape has its dtype and strides, and so have
# such results. All that is (C,) is contiguous; parameters and running statistics are of any floating dtype, and their
# gradients of the same; mean and var are of the accumulation dtype where the operation computes them.
_forward = register(
    "batch_norm",
    "batch_norm(Tensor x, Tensor? weight, Tensor? bias, Tensor? residual, Tensor(a!)? running_mean, "
    "Tensor(b!)? running_var, float momentum, float eps, bool relu, str backend) "
    "-> (Tensor y, Tensor mean, Tensor var)",
    lambda x, *_: (torch.empty_like(x), _statistics_like(x), _statistics_like(x)),
    row_wise=False,
)

_inference = register(
    "batch_norm",
    "batch_norm_inference(Tensor x, Tensor mean, Tensor var, Tensor? weight, Tensor? bias, Tensor? residual, "
    "float eps, bool relu, str backend) -> Tensor",
    lambda x, *_: torch.empty_like(x),
    row_wise=False,
)


def _backward_fake(
    u: Tensor, other_u: Any, x: Tensor, y: Tensor | None, weight: Tensor | None, bias: Tensor | None, *_: Any
) -> tuple[Tensor, ...]:
    gresidual = x.new_empty(0) if y is None else torch.empty_like(x)
    sums = x.new_empty((2, x.shape[1]), dtype=accumulation_dtype(x.dtype))
    return torch.empty_like(x), _statistics_like(x, weight), _statistics_like(x, bias), gresidual, sums


# y is given where a residual was added before the ReLU; then the cotangent of y may come in two parts, u and other_u.
# gresidual has no elements where y is not given. sums, (2, C) in the accumulation dtype: Σ u' and Σ u' x̂.
_backward = register(
    "batch_norm",
    "batch_norm_backward(Tensor u, Tensor? other_u, Tensor x, Tensor? y, Tensor? weight, Tensor? bias, Tensor mean, "
    "Tensor var, Tensor? x_cotangent, bool training, float eps, bool relu, str backend) "
    "-> (Tensor gx, Tensor gweight, Tensor gbias, Tensor gresidual, Tensor sums)",
    _backward_fake,
    row_wise=False,
)


def _double_backward_fake(
    v: Tensor | None, vweight: Tensor | None, vbias: Any, vresidual: Any, u: Tensor, x: Tensor, *rest: Any
) -> tuple[Tensor, ...]:
    weight, training = rest[1], rest[5]
    dx = torch.empty_like(x) if training or vweight is not None else x.new_empty(0)
    gx = torch.empty_like(x) if rest[-2] else x.new_empty(0)
    return torch.empty_like(x), dx, _statistics_like(x, weight), gx


# u is gresidual where y is given. dx has no elements in eval mode without vweight; gx, the backward's without
# x_cotangent, has none unless input_gradient.
_double_backward = register(
    "batch_norm",
    "batch_norm_double_backward(Tensor? v, Tensor? vweight, Tensor? vbias, Tensor? vresidual, Tensor u, Tensor x, "
    "Tensor? y, Tensor? weight, Tensor? bias, Tensor mean, Tensor var, bool training, float eps, bool relu, "
    "bool input_gradient, str backend) -> (Tensor du, Tensor dx, Tensor dweight, Tensor gx)",
    _double_backward_fake,
    row_wise=False,
)


# gx again, in one pass, from the sums that the backward found. relu: u is to be masked, by x.
_input_gradient = register(
    "batch_norm",
    "batch_norm_input_gradient(Tensor u, Tensor x, Tensor? weight, Tensor? bias, Tensor mean, Tensor var, "
    "Tensor sums, bool training, float eps, bool relu, str backend) -> Tensor gx",
    lambda u, x, *_: torch.empty_like(x),
    row_wise=False,
)


class BatchNorm(NamedTuple):
    """Batch norm, with or without a ReLU, as what follows a product in a chain; see ``chain`` for its methods."""

    training: bool
    momentum: float
    eps: float
    relu: bool
    backend: str

    @property
    def reads_result_with_residual(self) -> bool:
        return self.relu

    def forward(
        self, y: Tensor, weight: Any, bias: Any, residual: Tensor | None, running: Any
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        y = y.contiguous(memory_format=memory_format(y))
        if residual is not None:
            residual = laid_out_like(residual, y)
        if not self.training:
            mean, var = running
            z = _inference(y, mean, var, weight, bias, residual, self.eps, self.relu, self.backend)
            return z, y, mean.clone(), var.clone()  # a later step in train mode may update them
        if y.numel() == y.shape[1]:  # PyTorch's error
            torch.nn.functional.batch_norm(y, None, None, training=True)
        mean, var = running
        if mean is not None:
            # .data: as in PyTorch, no version counter tells of the update. Graphs that PyTorch's own batch norm made
            # before hold these tensors, unread, and would raise.
            mean, var = mean.data, var.data
        z, mean, var = _forward(y, weight, bias, residual, mean, var, self.momentum, self.eps, self.relu, self.backend)
        return z, y, mean, var

    def again(self, y: Tensor, weight: Any, bias: Any, mean: Any, var: Any) -> Any:
        return _inference(y, mean, var, weight, bias, None, self.eps, self.relu, self.backend)

    def backward(
        self, u: Tensor, y: Tensor, z: Any, weight: Any, bias: Any, mean: Any, var: Any, dy: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        u = laid_out_like(u, y)
        if dy is not None:
            dy = laid_out_like(dy, y)
        g, gweight, gbias, gresidual, _ = _backward(
            u, None, y, z, weight, bias, mean, var, dy, self.training, self.eps, self.relu, self.backend
        )
        return g, gweight, gbias, None if z is None else gresidual

    def double_backward(
        self,
        cotangents: Sequence[Tensor | None],
        u: Tensor,
        y: Tensor,
        z: Any,
        weight: Any,
        bias: Any,
        mean: Any,
        var: Any,
        wants_g: bool,
    ) -> tuple[Tensor | None, ...]:
        u = laid_out_like(u, y)
        v, vweight, vbias, vresidual = cotangents
        v = None if v is None else laid_out_like(v, y)
        vresidual = None if vresidual is None else laid_out_like(vresidual, y)
        vweight = None if vweight is None else vweight.contiguous()  # it may be expanded, for a sum
        vbias = None if vbias is None else vbias.contiguous()
        options = self.training, self.eps, self.relu, wants_g, self.backend
        du, dy, dweight, g = _double_backward(v, vweight, vbias, vresidual, u, y, z, weight, bias, mean, var, *options)
        return du, dy if dy.numel() else None, dweight, g if wants_g else None


def memory_format(x: Tensor) -> torch.memory_format:
    """The format of the kernels that is nearest to x: channels-last if x is dense in it alone, else contiguous.

    Inside a transformation of ``torch.func`` it is contiguous: vmap cannot tell of another.
    """
    channels_last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(x.dim())
    if channels_last is None or x.is_contiguous() or in_transformation():
        return torch.contiguous_format
    if not x.is_contiguous(memory_format=channels_last):
        return torch.contiguous_format
    return channels_last


def laid_out_like(t: Tensor, x: Tensor) -> Tensor:
    """t in the dtype and memory format of x; t itself where it is that already."""
    if t.dtype == x.dtype and t.stride() == x.stride():  # nearly always
        return t
    return t.to(x.dtype).contiguous(memory_format=memory_format(x))


def batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    residual: Tensor | None = None,
    relu: bool = False,
) -> Tensor:
    """``torch.nn.functional.batch_norm`` and, in the same pass, ``+ residual`` and ReLU.

    Differentiable twice in reverse mode; a third derivative raises. Where the fused operation does not apply (no kernel
    for the device, transformations of ``torch.func``, forward mode) the plain formula runs, which has all orders.

    Args:
        input: (N, C, ...); float64, float32, bfloat16 or float16. Statistics and sums are kept in float32 (float64 for
            float64).
        running_mean, running_var: (C,), updated in place in train mode, or None.
        weight, bias: γ and β, (C,), or None.
        training: normalise by the batch's own statistics.
        momentum: the share of the batch in the running statistics.
        eps: ε, added to the variance.
        residual: of input's shape; added after β.
        relu: whether a ReLU comes last.

    Returns:
        Of input's shape and dtype.

    Raises:
        As ``torch.nn.functional.batch_norm``. ValueError: the residual is not of input's shape, dtype and device.
    """
    tensors = (input, running_mean, running_var, weight, bias, residual)
    if has_torch_function(tensors):  # function modes see one call, not each attribute that is looked at below
        given = [t for t in tensors if t is not None]
        plain = (input, running_mean, running_var, weight, bias, training, momentum, eps)
        options: dict[str, Any] = {"residual": residual, "relu": relu}
        fused: Tensor = handle_torch_function(batch_norm, given, *plain, **options)
        return fused
    if residual is not None and (
        residual.shape != input.shape or residual.dtype != input.dtype or residual.device != input.device
    ):
        raise ValueError(
            f"residual is {tuple(residual.shape)} of {residual.dtype} on {residual.device}; it must be as the input, "
            f"{tuple(input.shape)} of {input.dtype} on {input.device}"
        )
    backend = select_for_layer(input)
    if backend == "reference" or not _has_kernel(input, running_mean, running_var, weight, bias, training, eps):
        x = input.contiguous(memory_format=memory_format(input))
        y = reference.batch_norm(x, running_mean, running_var, weight, bias, training, momentum, eps)
        y = y if residual is None else y + residual
        return torch.relu(y) if relu else y
    # Such a tensor is contiguous but for tricks; the kernels must be able to write the running statistics.
    weight, bias = (None if t is None else t.contiguous() for t in (weight, bias))
    among = [input]
    *places, place = (append(among, tensor) for tensor in (weight, bias, residual))
    stage = Stage(None, BatchNorm(training, momentum, eps, relu, backend), -1, -1, *places)
    return run(Chain((stage,), place), [(running_mean, running_var)], *among)


def _has_kernel(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
    eps: float,
) -> bool:
    """Whether the arguments are such as the kernels take; PyTorch's function sees to the errors of all others."""
    if not (2 <= input.dim() <= 5 and input.numel() > 0 and input.is_floating_point()):
        return False
    if training and input.numel() == input.shape[1]:
        return False
    return has_kernel(input.shape[1], input.device, running_mean, running_var, weight, bias, training, eps)


def has_kernel(
    channels: int,
    device: torch.device,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
    eps: float,
) -> bool:
    """Whether the kernels take what belongs to the norm, for an input of so many channels."""
    for t in (running_mean, running_var, weight, bias):
        if t is not None and not (t.is_floating_point() and t.shape == (channels,) and t.device == device):
            return False
    if (running_mean is None) != (running_var is None):
        return False
    for t in (running_mean, running_var):
        if t is not None and (t.requires_grad or not t.is_contiguous()):
            return False
    return eps > 0 if training else (running_mean is not None and eps >= 0)
