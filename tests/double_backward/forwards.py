"""Models whose forwards do what users' forwards do: share layers, work in place, differentiate, checkpoint."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

from rds_fast.nn import fuse

X = torch.randn(4, 3, 7, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def small_network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Conv2d(4, 5, 3),
        nn.BatchNorm2d(5),
        nn.SiLU(),
        nn.AvgPool2d(2),
        nn.Flatten(),
        nn.Linear(5, 3),
    ).double()


class Block(nn.Module):
    """Layers that the forwards below use more than once."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.convolution = nn.Conv2d(3, 3, 3, padding=1)
        self.norm = nn.BatchNorm2d(3)
        self.linear = nn.Linear(3, 3)
        self.double()

    def features(self, x: Tensor) -> Tensor:
        return self.norm(self.convolution(x))


class Shared(Block):
    def forward(self, x: Tensor) -> Tensor:
        for _ in range(2):
            x = F.silu(self.features(x))
        return self.linear(x.mean((2, 3)))


class SharedInFused(Block):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(self.convolution, self.norm, nn.ReLU(), self.convolution, self.norm, nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.layers(self.layers(x)).mean((2, 3)))


class InPlace(Block):
    def forward(self, x: Tensor) -> Tensor:
        first = F.relu(self.features(x), inplace=True)
        second = self.features(first)
        second.add_(first)
        second = second.relu_() * 2
        second = self.convolution(second)
        second += first
        third = self.features(F.silu(second * 1.5, inplace=True)) * 1
        third[:, :1] = 0
        third[:, 1].tanh_()
        third = F.hardtanh_(third * 2, -0.7, 0.7)
        return self.linear(third.mean((2, 3)))


class NoGrad(Block):
    def forward(self, x: Tensor) -> Tensor:
        hidden = F.silu(self.features(x))
        with torch.no_grad():
            gate = torch.sigmoid(self.features(hidden))
        return self.linear((hidden * gate * torch.sigmoid(hidden.detach())).mean((2, 3)))


class Functional(Block):
    """torch.func inside the forward."""

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.features(x)
        slope = torch.func.vmap(torch.func.grad(lambda t: F.silu(t).square().sum()))(hidden)
        mapped = torch.func.vmap(lambda t: F.relu(self.convolution(t)))(hidden)
        return self.linear((slope + mapped).mean((2, 3)))


class Energy(Block):
    """torch.autograd.grad inside the forward."""

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.features(x)
        with torch.enable_grad():
            inner = hidden.detach().requires_grad_()
            (force,) = torch.autograd.grad(self.convolution(inner).square().sum(), inner, create_graph=True)
        return self.linear((hidden + force).mean((2, 3)))


class Checkpointed(Block):
    def forward(self, x: Tensor) -> Tensor:
        hidden = checkpoint(lambda t: F.silu(self.features(t)), self.convolution(x), use_reentrant=False)
        return self.linear(self.convolution(hidden).mean((2, 3)))


class CheckpointedWithoutParameters(Block):
    """PyTorch's check of what is recomputed, by shapes, cannot tell our saved tensors from its own here."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(3, affine=False, track_running_stats=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(checkpoint(self.norm, self.convolution(x), use_reentrant=False).square().mean((2, 3)))


class SavedOnCpu(Block):
    def forward(self, x: Tensor) -> Tensor:
        with torch.autograd.graph.save_on_cpu():
            return self.linear(F.silu(self.convolution(F.relu(self.features(x)))).mean((2, 3)))


class Complex(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.convolution = nn.Conv2d(3, 4, 3, dtype=torch.complex128)
        self.norm = nn.BatchNorm1d(4, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(torch.sigmoid(self.convolution(torch.fft.fft2(x)) / 9).abs().mean((2, 3)))


def _with(layer: int, module: nn.Module) -> nn.Sequential:
    model = small_network()
    model[layer] = module.double()
    return model


def _parametrized() -> nn.Module:
    model = small_network()
    parametrizations.weight_norm(model[0])
    parametrizations.spectral_norm(model[3])
    parametrizations.orthogonal(model[8])
    return model


def _frozen(*layers: int) -> nn.Module:
    model = small_network()
    for layer in layers:
        model[layer].requires_grad_(False)
    return model


def _half_frozen() -> nn.Module:
    model = small_network()
    for parameter in (model[0].weight, model[1].bias, model[3].bias, model[4].weight):
        parameter.requires_grad_(False)
    return model


def _partly_in_eval_mode() -> nn.Module:
    model = small_network()
    model[1].eval()
    return model


def _scripted() -> nn.Module:
    inner = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.ReLU()).double()
    return _with(2, torch.jit.script(inner))


MODELS: dict[str, Callable[[], nn.Module]] = {
    "plain": small_network,
    "shared layers": Shared,
    "shared layers, fused": lambda: fuse(SharedInFused()),
    "in place": InPlace,
    "no_grad and detach": NoGrad,
    "torch.func": Functional,
    "autograd.grad": Energy,
    "checkpointed": Checkpointed,
    "checkpointed, no parameters": CheckpointedWithoutParameters,
    "checkpointed, fused": lambda: fuse(Checkpointed()),
    "save_on_cpu": SavedOnCpu,
    "complex": Complex,
    "parametrized": _parametrized,
    "frozen convolution": lambda: _frozen(0),
    "frozen, but the head": lambda: _frozen(0, 1, 3, 4),
    "frozen throughout": lambda: _frozen(0, 1, 3, 4, 8),
    "frozen throughout, fused": lambda: fuse(_frozen(0, 1, 3, 4, 8)),
    "half of the parameters frozen": _half_frozen,
    "partly in eval mode": _partly_in_eval_mode,
    "cumulative statistics": lambda: _with(1, nn.BatchNorm2d(4, momentum=None)),
    "synchronised batch norm": lambda: _with(1, nn.SyncBatchNorm(4)),
    "scripted": _scripted,
    "recurrent": lambda: _with(7, nn.Sequential(nn.Flatten(2), nn.LSTM(1, 1), _First(), nn.Flatten())),
}


class _First(nn.Module):
    def forward(self, outputs: tuple[Tensor, ...]) -> Tensor:
        return outputs[0]
