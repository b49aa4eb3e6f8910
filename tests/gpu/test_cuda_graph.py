"""A whole penalised step as a CUDA graph: what is replayed computes what the step would."""

from __future__ import annotations

import copy

import pytest
import torch
from test_penalties import CLASSES, DEVICE, PENALTIES, TOLERANCE, network, relative_error
from torch import Tensor, nn

import rds_fast
from bench.measure import captured
from rds_fast.penalties.loss import PenalizedLoss

pytestmark = pytest.mark.gpu


def batch(seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(32, 3, 16, 16, generator=generator)
    return x.to(DEVICE), torch.randint(CLASSES, (32,), generator=generator).to(DEVICE)


def residual_network() -> nn.Module:
    """Fused, with a residual block: a batch norm each with a ReLU alone and with a sum before it."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.convolution = nn.Conv2d(8, 8, 3, padding=1, bias=False)
            self.norm = nn.BatchNorm2d(8)
            self.relu = nn.ReLU(inplace=True)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.relu(self.norm(self.convolution(x)) + x)
            return y

    torch.manual_seed(0)
    first = (nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
    last = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, CLASSES))
    return rds_fast.nn.fuse(nn.Sequential(*first, Block(), Block(), *last).to(DEVICE))


@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("build", [network, residual_network])
@pytest.mark.parametrize("name", ["density", "target logit"])
def test_a_replay_is_the_step(name: str, build: type, autocast: bool) -> None:
    """With another batch and another weight than were captured; the running statistics follow."""
    model = build()
    x, y = batch(1)
    weight = torch.tensor(0.5, device=DEVICE)

    def step_of(model: nn.Module) -> Tensor:
        model.zero_grad(set_to_none=True)
        with torch.autocast(DEVICE, torch.bfloat16, enabled=autocast):
            terms = PenalizedLoss(PENALTIES[name], lambda step: weight)(model, x, y, step=0)
        terms.total.backward()
        return terms.total.detach()

    replay = captured(lambda: step_of(model), torch.device(DEVICE))
    for seed, value in ((2, 0.25), (3, 2.0)):
        for tensor, new in zip((x, y), batch(seed), strict=True):
            tensor.copy_(new)
        weight.fill_(value)
        other = copy.deepcopy(model)
        replayed, computed = replay(), step_of(other)
        assert isinstance(replayed, Tensor)
        tolerance = TOLERANCE[torch.bfloat16 if autocast else torch.float32]
        torch.testing.assert_close(replayed, computed, rtol=tolerance, atol=0)
        gradients = [
            torch.cat([p.grad.flatten() for p in m.parameters() if p.grad is not None]) for m in (model, other)
        ]
        assert relative_error(*gradients) <= tolerance
        for buffer, expected in zip(model.buffers(), other.buffers(), strict=True):
            torch.testing.assert_close(buffer, expected, rtol=tolerance, atol=tolerance)
