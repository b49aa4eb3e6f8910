"""The training steps that the benches of whole steps compare, and the networks that they train.

A step's loss is a function of (x, y); its backward fills the gradients of the parameters. The optimiser is not in it.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import cross_entropy, relu6
from torch.nn.modules.batchnorm import _BatchNorm

import rds_fast
from rds_fast.nn import fuse
from rds_fast.training import models

# λ of the penalty. The work does not depend on it.
WEIGHT = 0.1

T = TypeVar("T")
Loss = Callable[[Tensor, Tensor], Tensor]


class NotAvailable(Exception):
    """A provider cannot run here; the message says why."""


def attempt(provider: str, run: Callable[[], T]) -> T:
    """``run()``. A rival that fails is not available; our own failing is a failure."""
    try:
        return run()
    except Exception as error:
        if provider.startswith("ours"):
            raise
        reason = str(error).strip().partition("\n")[0]
        raise NotAvailable(f"{type(error).__name__}: {reason}") from error


class Case(NamedTuple):
    """A network and its batch. Small images take the models of ``rds_fast.training``, the others torchvision's."""

    model: str = "resnet18"
    image_size: int = 32
    batch_size: int = 32
    dtype: torch.dtype = torch.float32
    float32_norms: bool = False  # the parameters and buffers of batch norm, as mixed precision keeps them
    autocast: torch.dtype | None = None
    channels_last: bool = False
    mode: str = "train"

    @property
    def size(self) -> str:
        return f"{self.model} {self.image_size}x{self.image_size} x{self.batch_size}"

    @property
    def precision(self) -> str:
        name = str(self.dtype).removeprefix("torch.")
        if self.float32_norms:
            name += ", norms float32"
        return f"{name}, autocast {str(self.autocast).removeprefix('torch.')}" if self.autocast else name

    def network(self, device: torch.device) -> nn.Module:
        if self.image_size <= 64 and self.model in models.NAMES:
            network = models.build(self.model, (3, self.image_size, self.image_size), 10)
        else:
            network = models._torchvision_models().get_model(self.model, weights=None)
        # made on the CPU: there are models that compute their sizes by tensors, which the meta device does not hold
        network = network.to(device, self.dtype).train(self.mode == "train")
        for module in network.modules():
            if self.float32_norms and isinstance(module, _BatchNorm):
                module.float()
        return network.to(memory_format=torch.channels_last) if self.channels_last else network

    def batch(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Random images and classes."""
        x = torch.randn(self.batch_size, 3, self.image_size, self.image_size, device=device, dtype=self.dtype)
        classes = 10 if self.image_size <= 64 else 1000
        y = torch.randint(classes, (self.batch_size,), device=device)
        return (x.contiguous(memory_format=torch.channels_last) if self.channels_last else x), y

    def under_autocast(self, device: torch.device, loss: Loss) -> Loss:
        """The loss, computed under autocast where the case has one. The backward is outside, as is usual."""

        def computed(x: Tensor, y: Tensor) -> Tensor:
            with torch.autocast(device.type, self.autocast) if self.autocast else nullcontext():
                return loss(x, y)

        return computed


def stock(network: nn.Module) -> Loss:
    return lambda x, y: cross_entropy(network(x), y)


def penalized(network: nn.Module, *, fast: bool = True, method: str = "exact") -> Loss:
    loss = rds_fast.PenalizedLoss(rds_fast.DensityPenalty(method=method, fast=fast), WEIGHT, fast=fast)
    return lambda x, y: loss(network, x, y).total


def eager(network: nn.Module) -> Loss:
    """The penalised step as one writes it in PyTorch alone.

    Its fused attention and its hardsigmoid cannot be differentiated twice: their plain forms stand in.
    """
    for module in list(network.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.Hardsigmoid):
                setattr(module, name, _Hardsigmoid())

    def loss(x: Tensor, y: Tensor) -> Tensor:
        x = x.detach().requires_grad_()
        with sdpa_kernel(SDPBackend.MATH):
            logits = network(x)
        (gradient,) = torch.autograd.grad(logits.logsumexp(1).sum(), x, create_graph=True)
        return cross_entropy(logits, y) + WEIGHT * gradient.flatten(1).norm(dim=1).mean()

    return loss


class _Hardsigmoid(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return relu6(x + 3) / 6


# Each takes the network over: fuse changes it in place.
LOSSES: dict[str, Callable[[nn.Module], Loss]] = {
    "cross_entropy": stock,
    "cross_entropy_fused": lambda network: stock(fuse(network, inplace=True)),
    "eager": eager,
    "finite_difference": lambda network: penalized(network, method="finite_difference"),
    "ours": penalized,
    "ours_fused": lambda network: penalized(fuse(network, inplace=True)),
}
