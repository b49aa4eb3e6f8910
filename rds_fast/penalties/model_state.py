"""What a model changes as it runs, and how a forward beside the training step's own leaves it as it was."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.jit import ScriptModule
from torch.nn.modules.batchnorm import _BatchNorm

from ..compilation import modules_of


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


@contextmanager
def in_eval_mode(model: Callable[..., Tensor]) -> Iterator[None]:
    """A module's modules in eval mode inside, and each as it was afterwards."""
    training = [module for module in modules_of(model) if is_training(module)]
    try:
        for module in training:
            module.training = False
        yield
    finally:
        for module in training:
            module.training = True
