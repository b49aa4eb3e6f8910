"""Which layers of a model ``fast_double_backward`` covers, found by running its forward on the meta device."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from .double_backward import fast_double_backward, replacement_of


@dataclass
class LayerCoverage:
    """One module that computes something itself.

    ours: the functions that run on operations of this library; plain: the differentiable ones that are PyTorch's own.
    """

    path: str
    kind: str
    ours: dict[str, int] = field(default_factory=dict)
    plain: dict[str, int] = field(default_factory=dict)

    def __str__(self) -> str:
        parts = [f"fast: {_names(self.ours)}"] if self.ours else []
        parts += [f"PyTorch's own: {_names(self.plain)}"] if self.plain else []
        return f"{self.path or '(the model itself)'} ({self.kind})  {'; '.join(parts)}"


def _names(counts: dict[str, int]) -> str:
    return ", ".join(name if count == 1 else f"{name} ×{count}" for name, count in counts.items())


class _Recorder(fast_double_backward):
    """Notes, for the module whose forward is running, what ran in whose place."""

    def __init__(self) -> None:
        super().__init__()
        self.running: list[LayerCoverage] = []

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = super().__torch_function__(func, types, args, kwargs)
        name = getattr(func, "__name__", str(func)).strip("_")
        if replacement_of(func) is not None:
            _count(self.running[-1].ours, name)
        elif getattr(func, "__module__", None) != nn.functional.__name__ and _computes(result, args):
            _count(self.running[-1].plain, name)
        return result


def _count(counts: dict[str, int], name: str) -> None:
    counts[name] = counts.get(name, 0) + 1


def _computes(results: Any, args: tuple[Any, ...]) -> bool:
    """Whether a differentiable result has memory of its own: a view of an argument is no work."""
    given = {t.untyped_storage()._cdata for t in tree_leaves(args) if isinstance(t, Tensor)}
    return any(
        isinstance(result, Tensor) and result.grad_fn is not None and result.untyped_storage()._cdata not in given
        for result in tree_leaves(results)
    )


def layer_coverage(model: nn.Module, input_shape: tuple[int, ...]) -> list[LayerCoverage]:
    """What runs each layer of ``model`` under ``fast_double_backward``. The model is left as it is.

    Args:
        model: on the meta device, so that nothing is computed.
        input_shape: of a batch, such as (2, 3, 224, 224).

    Returns:
        The modules that call differentiable functions themselves, in the order in which they first run.
    """
    recorder = _Recorder()
    layers: dict[str, LayerCoverage] = {}
    handles = []
    for path, module in model.named_modules():
        layer = LayerCoverage(path, type(module).__name__)

        def enter(module: nn.Module, args: Any, layer: LayerCoverage = layer) -> None:
            layers.setdefault(layer.path, layer)
            recorder.running.append(layer)

        def leave(module: nn.Module, args: Any, output: Any) -> None:
            recorder.running.pop()

        handles += [module.register_forward_pre_hook(enter), module.register_forward_hook(leave)]
    try:
        with recorder:
            model(torch.randn(input_shape, device="meta", requires_grad=True))
    finally:
        for handle in handles:
            handle.remove()
    return [layer for layer in layers.values() if layer.ours or layer.plain]
