"""The inner pass: the gradient with respect to x that a penalty is the norm of.

Per-sample gradients come from one backward of the sum over samples, which is right only if samples do not interact.
Batch norm in train mode couples them: the gradient of sample n then holds what x_n does to the other samples' outputs
through the batch statistics.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.jit import ScriptModule
from torch.nn.modules.batchnorm import _BatchNorm

from ..backends import use_backend
from ..compilation import modules_of
from ..double_backward import fast_double_backward
from ..ops.logsumexp import autocast_enabled, without_autocast
from .checks import (
    check_autograd,
    check_input,
    check_logits,
    check_model,
    no_path,
)

# The cotangent of the inner pass where it may run in float16. It lifts what lies below 6e-8, float16's least number,
# and leaves room below 65504 for gradients of up to 255. A power of two, so that undoing it in float32 is exact. It is
# no larger because an overflow here would last: the gradient scaler cannot lower it.
FLOAT16_COTANGENT = 2.0**8


def implementation(fast: bool) -> AbstractContextManager[None]:
    """``fast=False``: the operations inside, and the model's layers, run on plain PyTorch."""
    return nullcontext() if fast else use_backend("reference")


def differentiable_input(x: Tensor, name: str = "x") -> Tensor:
    """An alias of x to differentiate with respect to.

    The inner pass leaves no trace on x: neither ``x.grad``, nor its hooks, nor ``requires_grad`` see it. If x itself
    requires a gradient the alias is a view, so that the penalty stays differentiable with respect to x.
    """
    check_input(x, name)
    check_autograd()
    return x.view_as(x) if x.requires_grad else x.detach().requires_grad_()


def logits_of(model: Callable[..., Tensor], x: Any) -> Tensor:
    """The model's logits, checked. A tuple of inputs goes to ``model(*x)``, a dict to ``model(**x)``."""
    check_model(model)
    logits = model(*x) if isinstance(x, tuple) else model(**x) if isinstance(x, dict) else model(x)
    check_logits(logits, x)
    return logits


def forward(model: Callable[..., Tensor], x: Any, *, twice_differentiable: bool = True) -> Tensor:
    """The same, where they require a gradient; with a fast double backward if they are to be differentiated twice."""
    with fast_double_backward() if twice_differentiable else nullcontext():
        logits = logits_of(model, x)
    if not logits.requires_grad:
        raise no_path()
    return logits


def input_gradients(
    output: Tensor,
    inputs: Sequence[Tensor],
    *,
    cotangent: float = 1.0,
    create_graph: bool = False,
    names: Sequence[str] = ("x",),
) -> tuple[Tensor, ...]:
    """The gradient of Σ cotangent · output with respect to each of the inputs, outside autocast, which is for forwards.

    Without ``create_graph`` the graph of the output is kept for the training step's own backward, and none is added.
    """
    if not output.requires_grad:
        raise no_path()
    cotangents = torch.full((), cotangent, dtype=output.dtype, device=output.device).expand_as(output)
    with without_autocast(inputs[0].device):
        gradients = torch.autograd.grad(
            output, inputs, cotangents, create_graph=create_graph, retain_graph=True, allow_unused=True
        )
    for gradient, name in zip(gradients, names, strict=True):
        if gradient is None:
            raise no_path(name)
    return gradients


def guarded_input_gradient(output: Tensor, x: Tensor, *, create_graph: bool = True) -> Tensor:
    """The gradient of Σ output with respect to x; where it may run in float16, with a cotangent undone in float32."""
    cotangent = cotangent_of(output, (x,))
    (gradient,) = input_gradients(output, (x,), cotangent=cotangent, create_graph=create_graph)
    return gradient if cotangent == 1.0 else gradient.float() / cotangent


def cotangent_of(output: Tensor, inputs: Sequence[Tensor]) -> float:
    """What the inner pass begins with: 1, or more where it may run in float16."""
    if torch.float16 in (output.dtype, *(x.dtype for x in inputs)):
        return FLOAT16_COTANGENT
    device = inputs[0].device
    in_float16 = autocast_enabled(device) and torch.get_autocast_dtype(device.type) == torch.float16
    return FLOAT16_COTANGENT if in_float16 else 1.0


class RandomState:
    """The state of the generators that a model on x's device draws from, to draw the same numbers again."""

    def __init__(self, device: torch.device) -> None:
        self._accelerator = None if device.type in ("cpu", "meta") else device
        self._cpu_state = torch.get_rng_state()
        if self._accelerator is not None:
            self._module = torch.get_device_module(device)
            self._accelerator_state = self._module.get_rng_state(device)

    @contextmanager
    def replayed(self) -> Iterator[None]:
        """Draw inside what was drawn since; afterwards the generators are as before the block."""
        devices = [] if self._accelerator is None else [self._accelerator]
        device_type = "cuda" if self._accelerator is None else self._accelerator.type
        with torch.random.fork_rng(devices, device_type=device_type):
            torch.set_rng_state(self._cpu_state)
            if self._accelerator is not None:
                self._module.set_rng_state(self._accelerator_state, self._accelerator)
            yield


@contextmanager
def frozen_statistics(model: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Forwards inside leave the model's buffers alone: running statistics and the counts of batches seen.

    Normalisation still uses the batch's own statistics in train mode. Batch norm is told not to track, which costs
    nothing. Other modules that are training get copies of their buffers, and the originals back afterwards: copying
    values back would spoil the graph of a forward that read them.
    """
    training = [module for module in modules_of(model) if is_training(module) and module._buffers]
    tracking = [m for m in training if _is_batch_norm(m) and m.track_running_stats]
    buffers = [(m, m._buffers) for m in training if not _is_batch_norm(m) and not isinstance(m, ScriptModule)]
    scripted = [(m, dict(m._buffers.items())) for m in training if isinstance(m, ScriptModule)]
    try:
        for module in tracking:
            module.track_running_stats = False
        for module, original in buffers:
            module._buffers = _copies(original)
        for module, original in scripted:  # whose dict of buffers is a view of what the script holds
            _set(module, _copies(original))
        yield
    finally:
        for module in tracking:
            module.track_running_stats = True
        for module, original in buffers:
            module._buffers = original
        for module, original in scripted:
            _set(module, original)


def _copies(buffers: Mapping[str, Tensor | None]) -> dict[str, Tensor | None]:
    return {name: None if buffer is None else buffer.detach().clone() for name, buffer in buffers.items()}


def _set(module: torch.nn.Module, buffers: Mapping[str, Tensor | None]) -> None:
    for name, buffer in buffers.items():
        setattr(module, name, buffer)


def is_training(module: torch.nn.Module) -> bool:
    """Whether a module is in train mode."""
    return getattr(module, "training", False)  # what torch.jit.freeze makes has no mode


def samples_interact(model: Callable[[Tensor], Tensor]) -> bool:
    """Whether one forward of several batches may differ from a forward of each, in its result or in the buffers.

    In train mode, by batch statistics or any buffers. What is no module cannot be looked into, and counts as such.
    """
    if not isinstance(model, torch.nn.Module):
        return True
    return any(
        (is_training(module) and any(buffer is not None for buffer in module._buffers.values()))
        or (isinstance(module, _BatchNorm) and module.running_mean is None)
        for module in modules_of(model)
    )


def _is_batch_norm(module: torch.nn.Module) -> bool:
    """Whether a module's forward is PyTorch's own, which obeys ``track_running_stats``; a subclass's need not."""
    return isinstance(module, _BatchNorm) and type(module).forward in (
        _BatchNorm.forward,
        torch.nn.SyncBatchNorm.forward,
    )
