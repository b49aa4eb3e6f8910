"""A run of a model's layers as a chain: which layers can be in one, and the call that runs them.

A run is a tuple of modules in the order of their calls; ``"add"`` and ``"iadd"`` in it stand for the addition of a
residual (the second in place), and ``"relu"`` for the function. What the modules are is looked up in every call, so one
that was exchanged, got hooks or was parametrised since is seen: then each is called for itself.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..backends import PLAIN_TENSORS, select_for_layer
from ..ops.batch_norm import BatchNorm, has_kernel
from ..ops.chain import Chain, Stage, append, run
from ..ops.convolution import Geometry
from ..ops.inputs import DTYPES
from ..ops.linear import Linear
from ..ops.logsumexp import autocast_enabled
from ..ops.piecewise_linear import Rectified
from .meaning import layers_after_norm, returns_its_argument

Layer = nn.Module | str

ADDITIONS = ("add", "iadd")
RELU = "relu"

# The number of spatial dimensions.
_CONVOLUTIONS: dict[type[nn.Module], int] = {
    nn.Conv1d: 1,
    nn.Conv2d: 2,
    nn.Conv3d: 3,
    nn.ConvTranspose1d: 1,
    nn.ConvTranspose2d: 2,
    nn.ConvTranspose3d: 3,
}
# The numbers of dimensions that an input may have.
_NORMS: dict[type[nn.Module], tuple[int, ...]] = {
    nn.BatchNorm1d: (2, 3),
    nn.BatchNorm2d: (4,),
    nn.BatchNorm3d: (5,),
}
_DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)


_KNOWN: list[type[nn.Module]] = [*_CONVOLUTIONS, *_NORMS, *_DROPOUTS, nn.Linear, nn.ReLU, nn.Identity]
# What a call of a layer runs, and somebody may replace for the whole class.
_KNOWN_FORWARDS = {kind: (kind.forward, getattr(kind, "_conv_forward", None)) for kind in _KNOWN}


def is_watched(module: nn.Module) -> bool:
    """Whether somebody watches the calls of a module, so that they must happen, or has set a forward on it."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__
        or "_conv_forward" in module.__dict__
    )


def is_product(layer: Layer) -> bool:
    return type(layer) in _CONVOLUTIONS or type(layer) is nn.Linear


def is_norm(layer: Layer) -> bool:
    return type(layer) in _NORMS or (
        isinstance(layer, _BatchNorm) and type(layer) not in _KNOWN_FORWARDS and layers_after_norm(layer) is not None
    )


def is_activation(layer: Layer) -> bool:
    return layer == RELU or type(layer) is nn.ReLU


def does_nothing(layer: Layer) -> bool:
    """Whether a layer, as it is now, returns what it gets."""
    if type(layer) in _DROPOUTS:
        return not layer.training  # type: ignore[union-attr]
    if isinstance(layer, str) or type(layer) in _KNOWN_FORWARDS:
        return type(layer) is nn.Identity
    return returns_its_argument(layer) is True


def expanded(layers: Sequence[Layer]) -> Sequence[Layer]:
    """The layers, with those that a batch norm of another library calls behind it."""
    found: list[Layer] = []
    for layer in layers:
        found.append(layer)
        if isinstance(layer, _BatchNorm) and type(layer) not in _NORMS:
            found += [layer._modules[name] for name in layers_after_norm(layer) or ()]  # type: ignore[misc]
    return found


class _Places(NamedTuple):
    """Where in a run the layers of one stage are; None: there is none."""

    product: int | None = None
    norm: int | None = None
    addition: int | None = None
    activation: int | None = None


def stages_of(layers: Sequence[Layer]) -> tuple[_Places, ...] | None:
    """The stages of a run, as its layers are now; None where they are not such as a chain is made of."""
    kinds: list[Any] = []
    for layer in layers:
        kind: Any = type(layer)
        if kind is str:
            kinds.append(layer)
            continue
        if is_watched(layer):  # type: ignore[arg-type]
            return None
        if kind in _KNOWN_FORWARDS:
            if (kind.forward, getattr(kind, "_conv_forward", None)) != _KNOWN_FORWARDS[kind]:
                return None
            kinds.append(nn.Identity if kind in _DROPOUTS and not layer.training else kind)  # type: ignore[union-attr]
        elif issubclass(kind, _BatchNorm) and layers_after_norm(layer) is not None:  # type: ignore[arg-type]
            kinds.append(next(norm for norm in _NORMS if issubclass(kind, norm)))
        elif returns_its_argument(layer):  # type: ignore[arg-type]
            kinds.append(nn.Identity)
        else:
            return None
    return _stages_of_kinds(tuple(kinds))


@functools.cache
def _stages_of_kinds(kinds: tuple[Any, ...]) -> tuple[_Places, ...] | None:
    """product → norm → addition → activation, each of which may be missing.

    But an addition follows a norm and ends the chain, together with its activation; and only the first stage has no
    product, and only the last nothing behind it.
    """
    stages: list[_Places] = []
    stage = _Places()
    for place, kind in enumerate(kinds):
        has_rest = stage.norm is not None or stage.activation is not None
        if kind is nn.Identity:
            continue
        if kind in _CONVOLUTIONS or kind is nn.Linear:
            if stage.addition is not None or (stage.product is not None and not has_rest):
                return None
            if has_rest:
                stages.append(stage)
            stage = _Places(place)
        elif kind in _NORMS:
            if has_rest:
                return None
            stage = stage._replace(norm=place)
        elif kind in ADDITIONS:
            if stage.norm is None or stage.activation is not None or stage.addition is not None:
                return None
            stage = stage._replace(addition=place)
        elif kind in (RELU, nn.ReLU):
            if stage.activation is not None or (stage.product is None and stage.norm is None):
                return None
            stage = stage._replace(activation=place)
        else:
            return None
    return (*stages, stage)


def chain(layers: tuple[Layer, ...], input: Any, residual: Any = None) -> Any:
    """The layers one after the other: as one chain, or each for itself where there is more to a call than a result."""
    if torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None:
        return _one_by_one(layers, input, residual)
    with torch._C.DisableTorchFunction():  # no function mode sees what is looked at
        prepared = _Preparation(input, residual).of(layers)
    return _one_by_one(layers, input, residual) if prepared is None else run(*prepared)


def _one_by_one(layers: tuple[Layer, ...], value: Any, residual: Any) -> Any:
    for layer in layers:
        if layer == "add":
            value = value + residual
        elif layer == "iadd":
            value += residual  # as the model had it: the sum has the value's shape and dtype, or it is an error
        elif isinstance(layer, str):
            value = getattr(torch, layer)(value)
        else:
            value = layer(value)
    return value


class _Preparation:
    """The tensors and the shapes that a run of layers meets, followed from layer to layer."""

    def __init__(self, input: Any, residual: Any) -> None:
        self.input, self.residual = input, residual
        self.tensors: list[Tensor] = [input]
        self.stages: list[Stage] = []
        self.running: list[Any] = []
        self.counters: list[Tensor] = []

    def of(self, layers: tuple[Layer, ...]) -> tuple[Any, ...] | None:
        """The arguments of ``ops.chain.run``; None where PyTorch's own functions are to run."""
        x = self.input
        if type(x) not in PLAIN_TENSORS or x.dtype not in DTYPES or x.layout is not torch.strided or x.numel() == 0:
            return None
        flat = expanded(layers)
        found = stages_of(flat)
        self.backend = select_for_layer(x)
        if found is None or self.backend == "reference":
            return None
        self.shape: tuple[int, ...] = x.shape
        self.dtype, self.device = x.dtype, x.device
        self.autocast = None
        if autocast_enabled(x.device) and x.dtype != torch.float64:
            self.autocast = torch.get_autocast_dtype(x.device.type)
        for product, norm, addition, activation in found:
            if product is not None and not self._multiply(flat[product]):
                return None
            if norm is not None:
                if not self._normalise(flat[norm], relu=activation is not None):
                    return None
            elif activation is not None:
                self._follow(_RECTIFIED, None, (-1, -1))
            if addition is not None and not self._add():
                return None
        if self.counters:
            torch._foreach_add_(self.counters, 1)
        return Chain(tuple(self.stages), self.place_of_residual), self.running, *self.tensors

    place_of_residual = -1

    def _parameters(self, module: Any, dtype: torch.dtype | None) -> tuple[int, int]:
        """The places of a module's weight and bias, cast if autocast does so."""
        tensors, parameters = self.tensors, module._parameters
        places = []
        for parameter in (parameters["weight"], parameters["bias"]):
            places.append(-1 if parameter is None else len(tensors))
            if parameter is not None:
                tensors.append(parameter if dtype is None else parameter.to(dtype))
        return places[0], places[1]

    def _multiply(self, module: Any) -> bool:
        """A product; the shape is that of its result from then on."""
        if not _has(module._parameters, "weight", "bias"):
            return False
        weight, bias = module._parameters["weight"], module._parameters["bias"]
        if self.autocast is not None and self.dtype != self.autocast:
            if self.stages:
                return False
            self.dtype = self.autocast
            self.tensors[0] = self.tensors[0].to(self.autocast)
        for parameter in (weight, bias):
            if parameter is not None and (
                type(parameter) not in PLAIN_TENSORS
                or parameter.device != self.device
                or (self.autocast is None and parameter.dtype != self.dtype)
            ):
                return False
        product: Any
        if type(module) is nn.Linear:
            if len(self.shape) < 2 or self.shape[-1] != weight.shape[1]:
                return False
            self.shape = (*self.shape[:-1], weight.shape[0])
            product = _LINEAR
        else:
            sizes: Any = (module.stride, module.padding, module.dilation, module.output_padding, module.kernel_size)
            if list in map(type, sizes):  # somebody set it
                return False
            kind: Any = type(module)
            product = _geometry(kind, *sizes, module.groups, module.padding_mode)
            if product is None or len(self.shape) != weight.dim():
                return False
            if self.shape[1] != (weight.shape[0] if product.transposed else weight.shape[1] * product.groups):
                return False
            self.shape = product.shape(self.shape, weight.shape)
            if min(self.shape) <= 0:
                return False
        self.stages.append(_STAGE(product, None, *self._parameters(module, self.autocast)))
        self.running.append(None)
        return True

    def _normalise(self, module: Any, *, relu: bool) -> bool:
        affine, buffers = module._parameters, module._buffers
        if not (_has(affine, "weight", "bias") and _has(buffers, "running_mean", "running_var", "num_batches_tracked")):
            return False
        mean, var = buffers["running_mean"], buffers["running_var"]
        weight, bias = affine["weight"], affine["bias"]
        training = module.training or (mean is None and var is None)
        if module.training and not module.track_running_stats:
            mean = var = None
        for tensor in (weight, bias, mean, var):
            if tensor is not None and type(tensor) not in PLAIN_TENSORS:
                return False
        if len(self.shape) not in _dimensions(module.__class__) or not has_kernel(
            self.shape[1], self.device, mean, var, weight, bias, training, module.eps
        ):
            return False
        counter = buffers["num_batches_tracked"] if module.training and module.track_running_stats else None
        share = module.momentum
        if share is None:
            share = 0.0 if counter is None else 1.0 / (float(counter) + 1)
        if counter is not None:
            self.counters.append(counter)
        rest = _BATCH_NORM(training, share, module.eps, relu, self.backend)
        self._follow(rest, (mean, var), self._parameters(module, None))
        return True

    def _follow(self, rest: Any, running: Any, places: tuple[int, int]) -> None:
        """Put what follows a product behind it, or first in the chain."""
        if self.stages and self.stages[-1][1] is None:
            product: Any
            product, _, weight, bias, *_ = self.stages.pop()
            self.running.pop()
            self.stages.append(_STAGE(product, rest, weight, bias, *places))
        else:
            self.stages.append(_STAGE(None, rest, -1, -1, *places))
        self.running.append(running)

    def _add(self) -> bool:
        """A residual, unless the addition broadcasts or converts."""
        residual = self.residual
        if (
            type(residual) not in PLAIN_TENSORS
            or residual.shape != self.shape
            or residual.dtype != self.dtype
            or residual.device != self.device
            or residual.layout is not torch.strided
        ):
            return False
        self.place_of_residual = 0 if residual is self.tensors[0] else append(self.tensors, residual)
        return True


def _has(tensors: Any, *names: str) -> bool:
    """Whether a layer's tensors are where it was made with them: some wrappers put plain attributes in their place."""
    return all(name in tensors for name in names)


@functools.cache
def _dimensions(kind: Any) -> tuple[int, ...]:
    return next(dimensions for norm, dimensions in _NORMS.items() if issubclass(kind, norm))


# What does not change from step to step is made once: a NamedTuple's constructor is Python. Told apart by type too, as
# tuples of two classes are equal if they hold the same: two kinds of activation, for example. A chain is made anew: in
# the stages that it holds, types would not be compared.
_STAGE = functools.lru_cache(4096, typed=True)(Stage)
_BATCH_NORM = functools.lru_cache(4096)(BatchNorm)
_LINEAR, _RECTIFIED = Linear(), Rectified()


@functools.lru_cache(4096)
def _geometry(
    kind: type[nn.Module],
    stride: Any,
    padding: Any,
    dilation: Any,
    output_padding: Any,
    kernel_size: Any,
    groups: int,
    padding_mode: str,
) -> Geometry | None:
    """How a convolution goes over its input, or None where PyTorch pads it first."""
    rank = _CONVOLUTIONS[kind]
    transposed = issubclass(kind, nn.modules.conv._ConvTransposeNd)
    if padding_mode != "zeros":
        return None
    if isinstance(padding, str):
        reach = [d * (size - 1) for d, size in zip(dilation, kernel_size, strict=True)]
        if padding == "same" and any(total % 2 for total in reach):
            return None
        padding = tuple(total // 2 if padding == "same" else 0 for total in reach)
    output_padding = output_padding if transposed else (0,) * rank
    numbers = (stride, padding, dilation, output_padding)
    if not all(isinstance(number, tuple) and len(number) == rank for number in numbers):
        return None
    return Geometry(stride, padding, dilation, transposed, output_padding, groups)
