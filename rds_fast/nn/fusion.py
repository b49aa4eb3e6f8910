"""``fuse`` and ``fusion_report``."""

from __future__ import annotations

import copy
from collections import Counter
from dataclasses import dataclass

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..compilation import compiled_part
from .modules import FusedForward
from .planning import Plan, why_not_plain


def fuse(model: nn.Module, *, inplace: bool = False) -> nn.Module:
    """Runs of convolution or linear map → batch norm → addition → ReLU, each of which may be missing, as chains.

    A chain is one operation at every order. For the backward passes it keeps what convolutions and linear maps write,
    and computes again what batch norm and ReLU write. Values, gradients, second derivatives and running statistics are
    the model's own, also those with respect to what hooks or feature extractors capture between its layers, which are
    then called one by one; third derivatives raise.

    Every module keeps its place, its parameters and buffers, and its meaning: the state dict is the same, and a layer
    called on its own does what it did. What changes is the forward of the modules that call layers (a residual block, a
    Sequential), which torch.fx traces one at a time; a chain never leaves it. What cannot be traced, or watches its
    layers by hooks, is left as it is; ``fusion_report`` says why. What a forward reads is fixed when it is traced. If
    the module's own attributes or submodules change later, the original forward runs; call ``fuse`` again to have it
    fused anew. Not noticed is what lies deeper: the contents of a list, dict or ModuleList, an attribute of a child
    that the parent's forward reads, a global. A forward that keeps what it computes is left as it is; but if it keeps
    it elsewhere than in its modules' attributes, in a global for example, a symbol of the trace stays there.

    Of two batch norms that are added (a residual block with a projection) one takes the addition in: the one called by
    the block itself before one at the end of a Sequential, else the one computed last. The other branch is computed
    before the whole chain then.

    Args:
        model: any module. A model that is fused already stays so.
        inplace: fuse the model itself; default: a copy, which shares nothing with the model.

    Returns:
        The fused model, in train or eval mode as the model is.

    Raises:
        TypeError: the model is not a torch.nn.Module.
        RuntimeError: it was compiled or scripted, wholly or in part.
    """
    _check(model)
    fused = model if inplace else copy.deepcopy(model)
    Plan(fused).apply()
    return fused


@dataclass(frozen=True)
class LayerReport:
    """One batch norm.

    name: its path. fusions: its stage of a chain, such as ``"convolution → batch norm → ReLU"``; mostly one, more where
    it is called in several places, and none where it is left. reason: why it, or one of its calls, is left; else empty.
    done: whether it is fused now; False: ``fuse`` would do so.
    """

    name: str
    fusions: tuple[str, ...]
    reason: str
    done: bool


@dataclass(frozen=True)
class FusionReport:
    """Every batch norm of a model, in the order of its modules; ``str`` gives a table."""

    layers: tuple[LayerReport, ...]

    @property
    def fused(self) -> tuple[LayerReport, ...]:
        """Those that are fused, or would be."""
        return tuple(layer for layer in self.layers if layer.fusions)

    @property
    def left(self) -> tuple[LayerReport, ...]:
        """Those that stay as they are."""
        return tuple(layer for layer in self.layers if not layer.fusions)

    def __str__(self) -> str:
        if not self.layers:
            return "no batch norm"
        width = max(len(layer.name) for layer in self.layers)
        lines = [f"{layer.name:{width}}  {_in_words(layer)}" for layer in self.layers]
        counts = Counter(fusion for layer in self.layers for fusion in layer.fusions)
        kinds = f" ({', '.join(f'{count} {fusion}' for fusion, count in counts.items())})" if counts else ""
        verb = "fused" if all(layer.done for layer in self.fused) else "nn.fuse would fuse"
        return "\n".join([*lines, f"{verb} {len(self.fused)} of {len(self.layers)} batch norms{kinds}"])


def _in_words(layer: LayerReport) -> str:
    if not layer.fusions:
        return f"left: {layer.reason}"
    words = ", ".join(layer.fusions) + ("" if layer.done else " (would be fused)")
    return f"{words}; one call left: {layer.reason}" if layer.reason else words


def fusion_report(model: nn.Module) -> FusionReport:
    """What ``fuse`` has done to a model, or would do, and what is left and why. Nothing is changed and nothing run.

    Args:
        model: a module, fused or not. What was changed since it was fused shows as not yet done.

    Raises:
        TypeError, RuntimeError: as ``fuse``.
    """
    _check(model)
    plan = Plan(model)
    layers = [(path, module) for path, module in model.named_modules() if isinstance(module, _BatchNorm)]
    return FusionReport(tuple(_layer(plan, path, module) for path, module in layers))


def _layer(plan: Plan, path: str, module: _BatchNorm) -> LayerReport:
    reason = why_not_plain(module)
    if reason is not None:
        return LayerReport(path, (), reason, False)
    calls = plan.calls[module]
    fusions = dict.fromkeys(call.run.around(module) for call in calls if call.run is not None)
    reasons = (
        dict.fromkeys(call.reason for call in calls if call.run is None)
        if calls
        else {plan.why_not_called(module): None}
    )
    callers = [call.caller for call in calls if call.run is not None]
    done = bool(callers) and all(isinstance(caller, FusedForward) and not caller.is_outdated() for caller in callers)
    return LayerReport(path, tuple(fusions), "; ".join(reasons), done)


def _check(model: object) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__name__}; it must be a torch.nn.Module")
    found, compiler = compiled_part(model)
    if compiler == "torch.compile":
        raise RuntimeError(
            f"the model {found} (torch.compile), whose forward is fixed; fuse the model first and compile it then "
            "(compiled_model._orig_mod is the model that was not compiled)"
        )
    if compiler == "torch.jit":
        raise RuntimeError(f"the model {found} (torch.jit), whose forward cannot be changed; fuse the Python model")
