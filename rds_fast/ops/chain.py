"""Chains: runs of layers as one autograd Function, differentiable twice.

A chain is a run of stages, and a stage is

    y = product(z)                        a convolution or a linear map, or nothing: then y is z
    z' = activation(norm(y) + residual)   each of the three may be missing; a residual comes in the last stage alone

One rule says what is kept for the backward passes: **what products write, in both directions, is kept; what norms and
activations write is computed again.** So the forward keeps each y, and the backward the cotangent u of each z' but the
last, which a product wrote too. All else is a local variable of the three loops below.

With g the cotangent of y, W the product's weight and w the derivatives by a bilinear product's arguments:

    backward           g = norm's backward of u,   u of the stage before = Wᵀ g,   gW = w(z, g)
    double backward    from the first stage to the last, v the cotangent of Wᵀ g and V that of gW:
                       t = W v + V z is the cotangent of g;   dW = w(v, g),   dz = Vᵀ g
                       the norm's double backward takes t to the next stage's v and to dy, the cotangent of y

The y's are results of the forward's node, so dy comes back to that node, and the last backward adds it to g. Mean and
variance of a norm are taken as functions of y, and z as one of the stage before, so dy is a total derivative.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from .engine import queryable, wanted_among
from .function import Function
from .registration import derivative, third_derivative

Gradients = tuple[Tensor | None, ...]


class Product(Protocol):
    """A map that is linear in x and in the weight."""

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """y."""

    def backward(
        self, g: Tensor, x: Tensor, weight: Tensor, wanted: Sequence[bool], onto: Tensor | None = None
    ) -> Gradients:
        """gx, gW and the bias's gradient, each None where it is not wanted; gx is added to ``onto``, a new tensor.

        Of x and the weight only the shape matters where the other one's gradient is not wanted.
        """


class Elementwise(Protocol):
    """What follows a product: a norm, the addition of a residual, an activation."""

    @property
    def reads_result_with_residual(self) -> bool:
        """Whether the backward with a residual reads z'."""

    def forward(
        self, y: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None, running: Any
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """z', y as the kernels want it, mean and variance. running: statistics to read or to update."""

    def again(self, y: Tensor, weight: Any, bias: Any, mean: Any, var: Any) -> Tensor:
        """z' without a residual."""

    def backward(
        self, u: Tensor, y: Tensor, z: Any, weight: Any, bias: Any, mean: Any, var: Any, dy: Tensor | None
    ) -> Gradients:
        """g + dy, the gradients of weight and bias, and u f' where it is had anyway.

        That is then the gradient of the residual, and what the double backward gets as u; else u itself is both.
        """

    def double_backward(
        self,
        cotangents: Gradients,
        u: Tensor,
        y: Tensor,
        z: Any,
        weight: Any,
        bias: Any,
        mean: Any,
        var: Any,
        wants_g: bool,
    ) -> Gradients:
        """du, dy, the weight's derivative, and g if it is wanted.

        cotangents: of g, of the gradients of weight and bias, and of the residual's; one of them at least is given.
        """


class Stage(NamedTuple):
    """One stage. The numbers are places among the tensors of the chain; −1 where there is none, the place of a None."""

    product: Product | None
    rest: Elementwise | None
    weight: int = -1
    bias: int = -1
    norm_weight: int = -1
    norm_bias: int = -1


class Chain(NamedTuple):
    """stages: from the first to the last. residual: its place among the tensors, 0 if it is the input itself, or −1."""

    stages: tuple[Stage, ...]
    residual: int = -1

    @property
    def reads_result(self) -> bool:
        """Whether the last stage's backward reads the result."""
        rest = self.stages[-1].rest
        return self.residual >= 0 and rest is not None and rest.reads_result_with_residual


class _Kept:
    """What the backward passes read: the chain's tensors, and of each stage what the forward found.

    tensors: the input, the parameters, None for a residual, which nothing reads, and None. z: the result, or None.
    """

    def __init__(self, chain: Chain, flat: Sequence[Any]) -> None:
        n = len(chain.stages)
        self.stages = chain.stages
        self.tensors = (*flat[: -3 * n - 1], None)
        self.z = flat[-3 * n - 1]
        self.ys, self.means, self.variances = flat[-3 * n : -2 * n], flat[-2 * n : -n], flat[-n:]

    def input(self, number: int) -> Any:
        """What enters a stage, computed again unless it is the chain's input."""
        if number == 0:
            return self.tensors[0]
        _, rest, _, _, weight, bias = self.stages[number - 1]
        assert rest is not None  # two products never follow each other within a chain
        before = number - 1
        tensors = self.tensors
        return rest.again(self.ys[before], tensors[weight], tensors[bias], self.means[before], self.variances[before])

    def shaped_as_input(self, number: int) -> Any:
        """A tensor of the shape and the strides of what enters a stage, of any values."""
        return self.tensors[0] if number == 0 else self.ys[number - 1]


class ChainForward(Function):
    """Tensors (the input first, the residual, if there is one besides, last) to z and what the backward needs."""

    @staticmethod
    def forward(*arguments: Any) -> Any:
        *tensors, chain, running = arguments
        tensors.append(None)
        z, last = tensors[0], len(chain.stages) - 1
        ys: list[Any] = []
        means: list[Any] = []
        variances: list[Any] = []
        for number, (product, rest, weight, bias, norm_weight, norm_bias) in enumerate(chain.stages):
            y = z if product is None else product.forward(z, tensors[weight], tensors[bias])
            kept = mean = var = None
            if rest is None:
                z = y
            else:
                residual = tensors[chain.residual] if number == last else None
                z, kept, mean, var = rest.forward(
                    y, tensors[norm_weight], tensors[norm_bias], residual, running[number]
                )
                if kept is tensors[0]:
                    kept = kept.detach()
            ys.append(kept)
            means.append(mean)
            variances.append(var)
        return z, *ys, *means, *variances

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        *tensors, chain, _ = inputs
        n = len(chain.stages)
        ctx.chain = chain
        ctx.mark_non_differentiable(*[statistic for statistic in output[n + 1 :] if statistic is not None])
        ctx.set_materialize_grads(False)
        if chain.residual > 0:
            tensors[chain.residual] = None
        ctx.save_for_backward(*tensors, output[0] if chain.reads_result else None, *output[1:])

    @staticmethod
    def backward(ctx: Any, u: Tensor | None, *cotangents: Any) -> Any:
        chain, kept = ctx.chain, ctx.saved_tensors
        n = len(chain.stages)
        count = len(kept) - 3 * n - 1
        wanted = wanted_among(ctx, count)
        return *derivative(ChainBackward, *kept, u, *cotangents[:n], chain, wanted)[:count], None, None


class ChainBackward(Function):
    """What the forward kept, u and the dy's to the gradients of the chain's tensors, and the u of each stage."""

    @staticmethod
    def forward(*arguments: Any) -> Any:
        *flat, chain, wanted = arguments
        n = len(chain.stages)
        kept, u, dys = _Kept(chain, flat[: -n - 1]), flat[-n - 1], flat[-n:]
        tensors = kept.tensors
        gradients: list[Any] = [None] * len(tensors)  # the last for what has no place
        us: list[Any] = [None] * n  # the last one only where it is not the argument
        residual_gradient = None
        for number in reversed(range(n)):
            product, rest, weight, bias, norm_weight, norm_bias = chain.stages[number]
            g = dys[number]
            if number < n - 1:
                us[number] = u
            if rest is None:
                g = u
            elif u is not None:
                z = kept.z if number == n - 1 else None
                affine = tensors[norm_weight], tensors[norm_bias], kept.means[number], kept.variances[number]
                g, gradients[norm_weight], gradients[norm_bias], masked_u = rest.backward(
                    u, kept.ys[number], z, *affine, g
                )
                if masked_u is not None:
                    us[number] = masked_u.view_as(masked_u)
                if number == n - 1 and chain.residual >= 0:
                    residual_gradient = u.view_as(u) if masked_u is None else masked_u
            u = g
            if product is not None and g is not None:
                asked = number > 0 or wanted[0], wanted[weight], bias >= 0 and wanted[bias]
                x = kept.input(number) if asked[1] else kept.shaped_as_input(number)
                onto = residual_gradient if number == 0 == chain.residual and asked[0] else None
                u, gradients[weight], gradients[bias] = product.backward(g, x, tensors[weight], asked, onto)
                if onto is not None:
                    residual_gradient = None
        gradients[0] = u
        if residual_gradient is not None:
            _put(gradients, chain.residual, residual_gradient)
        return *gradients[:-1], *us

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        *flat, ctx.chain, _ = inputs
        n = len(ctx.chain.stages)
        *kept, u = flat[:-n]
        us = output[-n:]
        ctx.mark_non_differentiable(*[tensor for tensor in us if tensor is not None])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*us[:-1], u if us[-1] is None else us[-1], *flat[-n:], *kept)

    @staticmethod
    def backward(ctx: Any, *cotangents: Any) -> Any:
        chain, saved = ctx.chain, ctx.saved_tensors
        n = len(chain.stages)
        count = len(saved) - 5 * n - 1
        wanted = wanted_among(ctx, count)
        found = derivative(ChainDoubleBackward, *cotangents[:count], *saved, chain, wanted)
        tensors, ys, u_and_dys = found[:count], found[count : count + n], found[count + n :]
        return *tensors, None, *ys, *(None,) * (2 * n), *u_and_dys, None, None


class ChainDoubleBackward(Function):
    """The cotangents of the gradients, and what the backward kept, to the derivatives: the last ones."""

    @staticmethod
    def forward(*arguments: Any) -> Any:
        *flat, chain, wanted = arguments
        n, count = len(chain.stages), len(wanted)
        cotangents, us, dys = (*flat[:count], None), flat[count : count + n], flat[count + n : count + 2 * n]
        kept = _Kept(chain, flat[count + 2 * n :])
        tensors = kept.tensors
        derivatives: list[Any] = [None] * len(tensors)  # the last for what has no place
        of_ys: list[Any] = [None] * n
        of_dys: list[Any] = [None] * n
        v = cotangents[0]
        for number, (product, rest, weight, _, norm_weight, norm_bias) in enumerate(chain.stages):
            is_last = number == n - 1
            weight_cotangent = cotangents[weight]
            t = v if product is None else _cotangent_of_g(product, kept, number, v, cotangents)
            wants_weight = product is not None and v is not None and wanted[weight]
            wants_g = wants_weight or weight_cotangent is not None
            u = us[number]
            g = du = None
            if rest is None:
                g, du = u, t
            elif u is not None:
                a, b = cotangents[norm_weight], cotangents[norm_bias]
                of_residual = cotangents[chain.residual] if is_last else None
                if not (t is a is b is of_residual is None):
                    affine = tensors[norm_weight], tensors[norm_bias], kept.means[number], kept.variances[number]
                    z = kept.z if is_last else None
                    du, of_ys[number], derivatives[norm_weight], g = rest.double_backward(
                        (t, a, b, of_residual), u, kept.ys[number], z, *affine, wants_g
                    )
            if dys[number] is not None:
                of_dys[number] = t
                g = dys[number] if g is None else g + dys[number]
            if wants_weight and g is not None:
                _put(derivatives, weight, product.backward(g, v, tensors[weight], (False, True, False))[1])
            if weight_cotangent is not None and g is not None:
                like = kept.shaped_as_input(number)
                dz = product.backward(g, like, weight_cotangent, (True, False, False))[0]
                _take_to_stage_before(chain, kept, number, dz, derivatives, of_ys)
            v = du
        return *derivatives[:-1], *of_ys, v, *of_dys

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        raise third_derivative("batch norm or of a chain of fused layers")


def _cotangent_of_g(product: Product, kept: _Kept, number: int, v: Any, cotangents: Sequence[Any]) -> Any:
    """t = W v + V z, and the bias's cotangent for each value; None where all of them are."""
    stage = kept.stages[number]
    weight, of_weight, of_bias = kept.tensors[stage.weight], cotangents[stage.weight], cotangents[stage.bias]
    if of_weight is None:
        if v is None and of_bias is not None:
            v = torch.zeros_like(kept.shaped_as_input(number))
        return None if v is None else product.forward(v, weight, of_bias)
    t = product.forward(kept.input(number), of_weight, of_bias)
    return t if v is None else t + product.forward(v, weight, None)


def _take_to_stage_before(
    chain: Chain, kept: _Kept, number: int, dz: Any, derivatives: list[Any], of_ys: list[Any]
) -> None:
    """dz, a cotangent of what enters a stage, to that of the y before it and of that stage's norm."""
    if number == 0:
        _put(derivatives, 0, dz)
        return
    before = number - 1
    _, rest, _, _, norm_weight, norm_bias = chain.stages[before]
    assert rest is not None
    affine = kept.tensors[norm_weight], kept.tensors[norm_bias], kept.means[before], kept.variances[before]
    of_ys[before], dweight, dbias, _ = rest.backward(dz, kept.ys[before], None, *affine, of_ys[before])
    _put(derivatives, norm_weight, dweight)
    _put(derivatives, norm_bias, dbias)


def _put(gradients: list[Any], place: int, gradient: Tensor | None) -> None:
    """Add a gradient to the one that is there. What has no place may be of another shape than what was there."""
    if gradient is not None and place >= 0:
        present = gradients[place]
        gradients[place] = gradient if present is None else present + gradient


def append(tensors: list[Tensor], tensor: Tensor | None) -> int:
    """The place of a tensor that is put last; −1 if there is none."""
    if tensor is None:
        return -1
    tensors.append(tensor)
    return len(tensors) - 1


def run(chain: Chain, running: Sequence[Any], *tensors: Tensor) -> Tensor:
    """The result of a chain.

    Args:
        running: what each stage's norm reads or updates besides its parameters.
        tensors: the input, the parameters at their places, and the residual, last, unless it is the input.
    """
    if has_torch_function(tensors):  # function modes see one call, not each attribute that is looked at
        result: Tensor = handle_torch_function(run, tensors, chain, running, *tensors)
        return result
    z: Tensor = ChainForward.apply(*map(queryable, tensors), chain, running)[0]
    return z
