"""Other gradient penalties than the density's, of other networks than classifiers, against eager float64."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import rds_fast
from rds_fast import fast_double_backward
from rds_fast.nn import fuse

pytestmark = pytest.mark.skipif(
    rds_fast.backends.failure("native", "cpu") is not None,
    reason=f"native: {rds_fast.backends.failure('native', 'cpu')}",
)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def discriminator(norm: str) -> nn.Module:
    """DCGAN's (Radford et al. 2016), with one norm or another."""
    norms: dict[str, Callable[[int], nn.Module]] = {
        "batch norm": nn.BatchNorm2d,
        "instance norm": lambda channels: nn.InstanceNorm2d(channels, affine=True),
        "group norm": lambda channels: nn.GroupNorm(4, channels),
        "layer norm": lambda channels: nn.GroupNorm(1, channels),
        "spectral norm": lambda channels: nn.Identity(),
    }
    torch.manual_seed(0)
    layers: list[nn.Module] = [nn.Conv2d(3, 8, 4, 2, 1), nn.LeakyReLU(0.2, inplace=True)]
    for channels in (8, 16):
        convolution = nn.Conv2d(channels, 2 * channels, 4, 2, 1, bias=norm == "spectral norm")
        if norm == "spectral norm":
            parametrizations.spectral_norm(convolution)
        layers += [convolution, norms[norm](2 * channels), nn.LeakyReLU(0.2, inplace=True)]
    # smooth, so that the penalty has a second derivative with respect to x
    return nn.Sequential(*layers, nn.Conv2d(32, 8, 2), nn.Softplus(), nn.Flatten(), nn.Linear(8, 1)).double()


def r1(discriminator: nn.Module, real: Tensor, fake: Tensor) -> Tensor:
    """Mescheder, Geiger and Nowozin 2018, with the non-saturating loss."""
    scores = discriminator(real)
    (gradient,) = torch.autograd.grad(scores.sum(), real, create_graph=True)
    penalty = gradient.square().flatten(1).sum(1).mean()
    return F.softplus(-scores).mean() + F.softplus(discriminator(fake)).mean() + 5.0 * penalty


def wgan_gp(discriminator: nn.Module, real: Tensor, fake: Tensor) -> Tensor:
    """Gulrajani et al. 2017: the penalty at points between the real and the fake."""
    share = torch.linspace(0.1, 0.9, real.shape[0], dtype=real.dtype).view(-1, 1, 1, 1)
    between = share * real + (1 - share) * fake
    scores = discriminator(between)
    (gradient,) = torch.autograd.grad(scores, between, torch.ones_like(scores), create_graph=True)
    penalty = (gradient.flatten(1).norm(dim=1) - 1).square().mean()
    return discriminator(fake).mean() - discriminator(real).mean() + 10.0 * penalty


class ModulatedConvolution(nn.Module):
    """StyleGAN2's (Karras et al. 2020): each sample has its own weights, so the batch is one grouped convolution."""

    def __init__(self, styles: int, inputs: int, outputs: int, upsample: bool) -> None:
        super().__init__()
        self.affine = nn.Linear(styles, inputs)
        self.weight = nn.Parameter(torch.randn(outputs, inputs, 3, 3))
        self.upsample = upsample

    def forward(self, x: Tensor, style: Tensor) -> Tensor:
        samples, inputs, *size = x.shape
        weight = self.weight * (1 + self.affine(style)).view(samples, 1, inputs, 1, 1)
        weight = weight * (weight.square().sum((2, 3, 4), keepdim=True) + 1e-8).rsqrt()
        x = x.reshape(1, samples * inputs, *size)
        if self.upsample:
            weight = weight.transpose(1, 2).reshape(samples * inputs, -1, 3, 3)
            y = F.conv_transpose2d(x, weight, stride=2, padding=1, output_padding=1, groups=samples)
        else:
            y = F.conv2d(x, weight.reshape(-1, inputs, 3, 3), padding=1, groups=samples)
        return y.view(samples, -1, *y.shape[2:])


class Generator(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.mapping = nn.Sequential(nn.Linear(6, 6), nn.LeakyReLU(0.2), nn.Linear(6, 6), nn.LeakyReLU(0.2))
        self.constant = nn.Parameter(torch.randn(1, 8, 4, 4))
        channels = ((8, 8, False), (8, 6, True), (6, 6, False), (6, 4, True))
        self.convolutions = nn.ModuleList(ModulatedConvolution(6, *arguments) for arguments in channels)
        self.biases = nn.ParameterList(torch.randn(outputs) for _, outputs, _ in channels)
        self.to_rgb = nn.Conv2d(4, 3, 1)

    def forward(self, styles: Tensor) -> Tensor:
        x = self.constant.expand(styles.shape[0], -1, -1, -1)
        for convolution, bias in zip(self.convolutions, self.biases, strict=True):
            x = F.leaky_relu(convolution(x, styles) + bias.view(1, -1, 1, 1), 0.2)
        return torch.tanh(self.to_rgb(x))


def path_length(generator: nn.Module, codes: Tensor) -> Tensor:
    """StyleGAN2's path length regularisation, beside a loss of the images."""
    styles = generator.mapping(codes)
    images = generator(styles)
    noise = normal(*images.shape, seed=4) / images[0, 0].numel() ** 0.5
    (gradient,) = torch.autograd.grad((images * noise).sum(), styles, create_graph=True)
    lengths = gradient.square().sum(1).sqrt()
    return (lengths - 0.3).square().mean() + images.square().mean()


class TransposedGenerator(nn.Module):
    """DCGAN's: transposed convolutions with batch norm; ``mapping`` as above."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.mapping = nn.Linear(6, 6)
        self.layers = nn.Sequential(
            nn.Unflatten(1, (6, 1, 1)),
            nn.ConvTranspose2d(6, 8, 4, 1, 0, bias=False),
            nn.BatchNorm2d(8),
            nn.ReLU(True),
            nn.ConvTranspose2d(8, 6, 4, 2, 1, bias=False),
            nn.BatchNorm2d(6),
            nn.ReLU(True),
            nn.ConvTranspose2d(6, 3, 3, 2, 1, output_padding=1),
            nn.Tanh(),
        )

    def forward(self, styles: Tensor) -> Tensor:
        return self.layers(styles)


class Energy(nn.Module):
    """A potential of the positions of atoms: radial features, convolution over pairs, an MLP with SiLU."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.filters = nn.Sequential(nn.Conv1d(4, 8, 1), nn.SiLU(), nn.Conv1d(8, 8, 1), nn.SiLU())
        self.head = nn.Sequential(nn.Linear(8, 16), nn.LayerNorm(16), nn.SiLU(), nn.Linear(16, 1))

    def forward(self, positions: Tensor) -> Tensor:
        """(N, atoms, 3) to (N,)."""
        first, second = torch.triu_indices(positions.shape[1], positions.shape[1], 1)
        distances = (positions[:, first] - positions[:, second]).norm(dim=2)
        centres = torch.linspace(0, 3, 4, dtype=positions.dtype).view(1, -1, 1)
        features = self.filters((-(distances.unsqueeze(1) - centres).square()).exp())
        return self.head(features.sum(2)).squeeze(1)

    def forces(self, positions: Tensor) -> Tensor:
        """−∇E, the output of such a model."""
        return -torch.autograd.grad(self(positions).sum(), positions, create_graph=True)[0]


def force_matching(energy: nn.Module, positions: Tensor) -> Tensor:
    return (energy.forces(positions) - normal(*positions.shape, seed=6)).square().mean() + energy(positions).mean()


REAL, FAKE = normal(4, 3, 16, 16, seed=1), normal(4, 3, 16, 16, seed=2)

PENALTIES: dict[str, tuple[Callable[..., Tensor], Callable[[], nn.Module], list[Tensor]]] = {
    **{
        f"{penalty.__name__}, {norm}": (penalty, lambda norm=norm: discriminator(norm), [REAL, FAKE])
        for penalty in (r1, wgan_gp)
        for norm in ("batch norm", "instance norm", "group norm", "layer norm", "spectral norm")
    },
    "path length, modulated convolutions": (path_length, Generator, [normal(3, 6, seed=5)]),
    "path length, transposed convolutions": (path_length, TransposedGenerator, [normal(5, 6, seed=5)]),
    "force matching": (force_matching, Energy, [normal(3, 5, 3, seed=5)]),
}


def gradients(
    penalty: Callable[..., Tensor], model: nn.Module, inputs: list[Tensor], *, fast: bool
) -> tuple[list[Tensor], list[str]]:
    """The loss and its gradients with respect to the inputs and all parameters; and the names of the graph's nodes."""
    model = copy.deepcopy(model)
    inputs = [tensor.clone().requires_grad_() for tensor in inputs]
    with fast_double_backward() if fast else nullcontext():
        loss = penalty(model, *inputs)
    wanted = [*inputs, *model.parameters()]
    found = torch.autograd.grad(loss, wanted, allow_unused=True, materialize_grads=True, retain_graph=True)
    nodes, names = [loss.grad_fn], {}
    while nodes:
        node = nodes.pop()
        if node is not None and node not in names:
            names[node] = node.name()
            nodes += [after for after, _ in node.next_functions]
    return [loss.detach(), *found], list(names.values())


@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
@pytest.mark.parametrize("name", PENALTIES)
def test_a_penalty_equals_eager_pytorchs(name: str, fused: bool) -> None:
    penalty, build, inputs = PENALTIES[name]
    model = build().double()
    truth, _ = gradients(penalty, model, inputs, fast=False)
    if fused and not rds_fast.nn.fusion_report(model).fused:
        fused = False  # a LeakyReLU follows; the plain model once more, to see that fuse leaves it right
    ours, nodes = gradients(penalty, fuse(model) if fused else model, inputs, fast=True)
    assert any(node.startswith(("Convolution", "ChainForward")) and node.endswith("Backward") for node in nodes)
    floor = 1e-10 * max(float(tensor.abs().max()) for tensor in truth)
    assert floor > 0
    for actual, expected in zip(ours, truth, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-8, atol=floor)
