"""The evaluation of attributions on a GPU: ranks as on the CPU, and the attack's ball."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from rds_fast.evaluation import attribution_attack, attributions, kendall_tau, spearman, top_k_intersection

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("size", [5, 784, 70_000])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_rank_correlations_are_the_cpus_with_ties_and_negative_zeros(size: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(size)
    a, b = (torch.randint(-20, 21, (6, size), generator=generator).to(dtype) for _ in range(2))
    a[a == 3], a[a == 4] = 0.0, -0.0
    assert torch.equal(kendall_tau(a.cuda(), b.cuda()).cpu(), kendall_tau(a, b))
    torch.testing.assert_close(spearman(a.cuda(), b.cuda()).cpu(), spearman(a, b), rtol=0, atol=1e-12)
    assert torch.equal(top_k_intersection(a.cuda(), b.cuda(), 3).cpu(), top_k_intersection(a, b, 3))


def test_the_attack_stays_in_its_ball_and_keeps_the_prediction() -> None:
    torch.manual_seed(0)
    layers = (nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 5))
    model = nn.Sequential(*layers).cuda().eval()
    x = torch.rand(6, 3, 8, 8, device="cuda")
    y = model(x).argmax(1)
    generator = torch.Generator("cuda").manual_seed(0)
    moved = attribution_attack(model, x, y, 0.1, k=10, steps=10, restarts=2, path_steps=20, generator=generator)
    assert (moved.double() - x.double()).abs().max() <= 0.1
    assert moved.min() >= 0
    assert moved.max() <= 1
    assert torch.equal(model(moved).argmax(1), y)
    before, after = (attributions(model, each, y, "integrated_gradients") for each in (x, moved))
    assert top_k_intersection(before, after, 30).mean() < 0.95
