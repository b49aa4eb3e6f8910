"""Small networks, and the penalties written out in eager PyTorch: the truth of the tests beside this file."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

CLASSES = 5

Model = Callable[[Tensor], Tensor]


def mlp(dtype: torch.dtype = torch.float64, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Flatten(), nn.Linear(3 * 6 * 6, 16), nn.Softplus(), nn.Linear(16, 12), nn.Tanh(), nn.Linear(12, CLASSES)
    ).to(dtype)


def cnn(dtype: torch.dtype = torch.float64, *, training: bool, activation: type[nn.Module] = nn.Softplus) -> nn.Module:
    """Two convolutions with batch norm, whose running statistics are no longer the initial ones."""
    torch.manual_seed(1)
    model = nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1),
        nn.BatchNorm2d(6),
        activation(),
        nn.Conv2d(6, 8, 3, stride=2),
        nn.BatchNorm2d(8, momentum=None),  # a cumulative average: it uses the count of batches
        activation(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, CLASSES),
    ).to(dtype)
    model(batch(dtype, seed=7)[0])
    return model.train(training)


NETWORKS = {
    "mlp": mlp,
    "cnn-train": lambda dtype=torch.float64: cnn(dtype, training=True),
    "cnn-eval": lambda dtype=torch.float64: cnn(dtype, training=False),
}


def batch(dtype: torch.dtype = torch.float64, samples: int = 6, seed: int = 2) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(samples, 3, 6, 6, dtype=torch.float64, generator=generator).to(dtype)
    return x, torch.randint(CLASSES, (samples,), generator=generator)


def eager_norms(output: Tensor, x: Tensor, p: float, power: float) -> Tensor:
    """(N,), by autograd twice and ``torch.linalg.vector_norm``."""
    (gradient,) = torch.autograd.grad(output.sum(), x, create_graph=True)
    return torch.linalg.vector_norm(gradient.flatten(1), p, dim=1) ** power


def eager_density(model: Model, x: Tensor, p: float = 2.0, power: float = 1) -> Tensor:
    x = x if x.requires_grad else x.detach().requires_grad_()
    return eager_norms(torch.logsumexp(model(x), 1), x, p, power)


def eager_input_gradient(model: Model, x: Tensor, y: Tensor, of: str, p: float = 2.0, power: float = 1) -> Tensor:
    x = x if x.requires_grad else x.detach().requires_grad_()
    logits = model(x)
    output = -torch.log_softmax(logits, 1)[range(len(y)), y] if of == "cross_entropy" else logits[range(len(y)), y]
    return eager_norms(output, x, p, power)


def gradients(loss: Tensor, model: nn.Module, *others: Tensor, retain_graph: bool = False) -> list[Tensor]:
    """Of the parameters and of ``others``; where the loss does not depend on a tensor, zeros."""
    wanted = [*(p for p in model.parameters() if p.requires_grad), *others]
    return list(torch.autograd.grad(loss, wanted, allow_unused=True, materialize_grads=True, retain_graph=retain_graph))


def assert_same_gradients(ours: list[Tensor], truth: list[Tensor], tolerance: float = 1e-10) -> None:
    """Relative to the largest gradient of each tensor; all of the truth must not vanish."""
    assert max(t.abs().max() for t in truth) > 1e-8
    for one, other in zip(ours, truth, strict=True):
        assert (one.double() - other).abs().max() <= tolerance * max(1e-3, other.abs().max().item())
