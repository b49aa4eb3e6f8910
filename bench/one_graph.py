"""A rival of the whole-step bench: the density penalty's step as one graph, torch.func composed and then compiled.

The gradient of the loss, which holds the gradient of the log-sum-exp with respect to x, is one function of parameters
and batch, so the compiler sees both orders at once and fuses over them. It is plain PyTorch throughout: compiled
autograd Functions under nested ``torch.func.grad`` are wrong without an error.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, grad_and_value, replace_all_batch_norm_modules_
from torch.nn.functional import cross_entropy

from bench.steps import WEIGHT


def loss_of_parameters(
    network: nn.Module, autocast: Callable[[], AbstractContextManager[Any]] = nullcontext
) -> Callable[..., Tensor]:
    """(parameters, x, y) -> cross-entropy + λ mean ‖∇ₓ l‖₂, as ``torch.func`` takes it; forwards in ``autocast()``."""

    def log_density(x: Tensor, parameters: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        with autocast():
            logits = functional_call(network, parameters, (x,))
            return torch.logsumexp(logits, 1).sum(), logits

    def loss(parameters: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        input_gradient, logits = grad(log_density, has_aux=True)(x, parameters)
        penalty = torch.linalg.vector_norm(input_gradient.flatten(1), dim=1).mean()
        with autocast():
            return cross_entropy(logits, y) + WEIGHT * penalty

    return loss


def one_graph_step(
    network: nn.Module, device: torch.device, autocast: torch.dtype | None
) -> Callable[[Tensor, Tensor], Tensor]:
    """A step that fills the gradients of ``network`` and returns the loss.

    ``torch.func`` refuses to write a buffer that it did not create, so in train mode batch norm does not keep running
    statistics here, which is a little less work than every other provider does.
    """
    graph = copy.deepcopy(network)
    if graph.training:
        replace_all_batch_norm_modules_(graph)
    region = (lambda: torch.autocast(device.type, autocast)) if autocast else nullcontext
    gradients_and_loss = torch.compile(grad_and_value(loss_of_parameters(graph, region)), fullgraph=True)
    parameters = dict(network.named_parameters())

    def step(x: Tensor, y: Tensor) -> Tensor:
        gradients, loss = gradients_and_loss({name: p.detach() for name, p in parameters.items()}, x, y)
        for name, parameter in parameters.items():
            parameter.grad = gradients[name]
        return loss

    return step
