"""Batch norm at every order, by the raw kernels of a layer and by the definition in float64."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from rds_fast.reference import accumulation_dtype
from tests import criteria


class Inputs(NamedTuple):
    """Arguments of the operation and the cotangents of its results, as the raw kernels take them."""

    x: Tensor
    residual: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    mean: Tensor  # of eval mode
    var: Tensor
    u: Tensor
    other_u: Tensor | None  # goes with a residual and a ReLU
    x_cotangent: Tensor | None
    v: Tensor | None
    vweight: Tensor | None
    vbias: Tensor | None
    vresidual: Tensor | None


OPTIONAL = ("residual", "other_u", "weight", "bias", "x_cotangent", "v", "vweight", "vbias", "vresidual")


def inputs(
    shape: tuple[int, ...],
    dtype: torch.dtype,
    memory_format: torch.memory_format = torch.contiguous_format,
    device: str = "cpu",
    without: tuple[str, ...] = (),
    parameter_dtype: torch.dtype | None = None,
) -> Inputs:
    """Normal values; of OPTIONAL, those named in ``without`` are absent."""
    parameter_dtype = parameter_dtype or accumulation_dtype(dtype)
    generator = torch.Generator().manual_seed(0)

    def like_x() -> Tensor:
        t = torch.randn(shape, generator=generator, dtype=torch.float64)
        return t.to(device, dtype).contiguous(memory_format=memory_format)

    def channels() -> Tensor:
        return torch.randn(shape[1], generator=generator, dtype=torch.float64).to(device, parameter_dtype)

    of_channels = {"weight", "bias", "mean", "var", "vweight", "vbias"}
    values = {name: (channels if name in of_channels else like_x)() for name in Inputs._fields}
    values["x"] = 2 * values["x"] + 1
    values["var"] = values["var"].abs() + 0.1
    return Inputs(**values)._replace(**dict.fromkeys(without))


def by_kernels(kernels: Any, i: Inputs, training: bool, eps: float, relu: bool) -> dict[str, Tensor]:
    """Every result of the operations of a layer, one called on what the one before gave."""
    if training:
        y, mean, var = kernels.batch_norm(i.x, i.weight, i.bias, i.residual, None, None, 0.1, eps, relu)
    else:
        mean, var = i.mean, i.var
        y = kernels.batch_norm_inference(i.x, mean, var, i.weight, i.bias, i.residual, eps, relu)
    source = y if relu and i.residual is not None else None  # of the mask
    affine = (i.weight, i.bias, mean, var)
    gx, gweight, gbias, gresidual, sums_of_u = kernels.batch_norm_backward(
        i.u, None if source is None else i.other_u, i.x, source, *affine, i.x_cotangent, training, eps, relu
    )
    u = i.u if source is None else gresidual
    of_second = (i.v, i.vweight, i.vbias, i.vresidual, u, i.x, source, *affine, training, eps, relu)
    du, dx, dweight, none = kernels.batch_norm_double_backward(*of_second, False)
    du_beside, dx_beside, dweight_beside, gx_beside = kernels.batch_norm_double_backward(*of_second, True)
    assert none.numel() == 0
    mask_from_x = relu and source is None
    again = kernels.batch_norm_input_gradient(u, i.x, *affine, sums_of_u, training, eps, mask_from_x)
    assert torch.equal(again, gx) or i.x_cotangent is not None
    assert gresidual.numel() == (0 if source is None else i.x.numel())
    assert dx.numel() == (i.x.numel() if training or i.vweight is not None else 0)
    results = {"y": y, "gx": gx, "again": again, "gresidual": gresidual, "du": du, "dx": dx}
    results |= {"gx_beside": gx_beside, "du_beside": du_beside, "dx_beside": dx_beside}
    results = {name: t for name, t in results.items() if t.numel()}
    for name, t in results.items():
        assert t.dtype == i.x.dtype, name
        assert t.stride() == i.x.stride(), name
    sums = {"gweight": gweight, "gbias": gbias, "dweight": dweight, "dweight_beside": dweight_beside}
    if training:
        sums |= {"mean": mean, "var": var}
    of = {"gweight": i.weight, "gbias": i.bias, "dweight": i.weight, "dweight_beside": i.weight}
    for name, t in sums.items():
        parameter = of.get(name)
        assert t.dtype == (accumulation_dtype(i.x.dtype) if parameter is None else parameter.dtype), name
        assert t.shape == (i.x.shape[1],), name
    for unrounded, t in zip(sums_of_u, (gbias, gweight), strict=True):
        torch.testing.assert_close(t, unrounded.to(t.dtype), rtol=0, atol=0, equal_nan=True)
    return results | sums


def by_definition(i: Inputs, training: bool, eps: float, open_relu: Tensor | None) -> tuple[dict, dict]:
    """The same by autograd in float64, ``open_relu`` being the mask; and the size of the terms of each sum."""
    both = i.other_u is not None and i.residual is not None and open_relu is not None
    u = (i.u + i.other_u if both else i.u).double().detach().requires_grad_()
    x = i.x.double().detach().requires_grad_()
    shape = [1, -1] + [1] * (x.dim() - 2)
    dims = [0, *range(2, x.dim())]

    def leaf(t: Tensor | None, default: float, like: Tensor) -> Tensor:
        return (torch.full_like(like, default) if t is None else t).double().detach().requires_grad_()

    weight, bias = leaf(i.weight, 1.0, i.mean), leaf(i.bias, 0.0, i.mean)
    residual = leaf(i.residual, 0.0, i.x)
    mean, var = (x.mean(dims), x.var(dims, correction=0)) if training else (i.mean.double(), i.var.double())
    r = (var + eps) ** -0.5
    normalised = (x - mean.view(shape)) * r.view(shape)
    y = normalised * weight.view(shape) + bias.view(shape) + residual
    if open_relu is not None:
        assert (y[open_relu] > -1e-2).all()  # ours and the true mask differ in rounding alone
        assert (y[~open_relu] < 1e-2).all()
        y = torch.where(open_relu, y, 0.0)
    primals = (x, weight, bias, residual)
    gradients = torch.autograd.grad(y, primals, u, create_graph=True)
    cotangents = (i.v, i.vweight, i.vbias, i.vresidual)
    given = [(g, c.double()) for g, c in zip(gradients, cotangents, strict=True) if c is not None and g.requires_grad]
    du, dx, dweight = (torch.zeros_like(t) for t in (u, x, weight))
    if given:
        outputs, directions = zip(*given, strict=True)
        du, dx, dweight = torch.autograd.grad(outputs, (u, x, weight), directions, materialize_grads=True)
    gx = gradients[0] if i.x_cotangent is None else gradients[0] + i.x_cotangent.double()
    truth = {"y": y, "gx": gx, "again": gradients[0], "gresidual": gradients[3], "du": du, "dx": dx}
    truth |= {"gx_beside": gradients[0], "du_beside": du, "dx_beside": dx, "dweight_beside": dweight}
    truth |= {"gweight": gradients[1], "gbias": gradients[2], "dweight": dweight, "mean": mean, "var": var}
    masked = gradients[3]  # u'
    v = torch.zeros_like(x) if i.v is None else i.v.double()
    terms = {"gweight": masked * normalised, "gbias": masked, "dweight": r.view(shape) * masked * v, "mean": x}
    sizes = {name: t.detach().square().sum(dims).sqrt() for name, t in terms.items()}
    sizes["dweight_beside"] = sizes["dweight"]
    sizes["mean"] = sizes["mean"] / (x.numel() / x.shape[1]) ** 0.5
    return {name: t.detach() for name, t in truth.items()}, sizes


def check(kernels: Any, i: Inputs, training: bool, eps: float, relu: bool) -> dict[str, Tensor]:
    """Every result within the stated tolerance of the truth, relative to the largest of its channel; the results."""
    ours = by_kernels(kernels, i, training, eps, relu)
    open_relu = ours["y"] > 0
    if i.residual is None:
        # Computed again from x, the mask knows y before it is rounded, and a float16 y may be positive and round to 0.
        open_relu = open_relu | (ours["du"] != 0)
    truth, sizes = by_definition(i, training, eps, open_relu if relu else None)
    for name, our in ours.items():
        true = truth[name]
        if our.dim() > 1:
            our, true = (t.transpose(0, 1) for t in (our, true))
        try:
            criteria.assert_accurate(our, true.to(our.dtype), true, sizes.get(name))
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from None
    return ours
