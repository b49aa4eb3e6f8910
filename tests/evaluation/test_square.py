"""The Square attack: its ball to the last bit, what it breaks, and how it compares with pyautoattack's."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from toy_classifiers import Quantised, honest, images

from rds_fast.evaluation import square_attack


def accuracy(model: Callable[[Tensor], Tensor], x: Tensor, y: Tensor) -> float:
    with torch.no_grad():
        return float((model(x).argmax(1) == y).double().mean())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("epsilon", [0.1, 8 / 255, 1e-3, 2.0])
@pytest.mark.parametrize("shape", [(3, 6, 5), (1, 9, 4), (12,)])
def test_the_result_is_a_corner_of_the_ball_exactly(dtype: torch.dtype, epsilon: float, shape: tuple[int, ...]) -> None:
    x = torch.rand(4, *shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)
    weight = torch.randn(x[0].numel(), 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)
    model = nn.Flatten()
    moved = square_attack(lambda x: model(x) @ weight, x, torch.zeros(4, dtype=torch.long), epsilon, queries=20)
    assert moved.shape == x.shape
    assert moved.dtype == dtype
    for difference in (moved - x, moved.double() - x.double()):
        assert difference.abs().max() <= epsilon
        assert difference.abs().max().item() <= epsilon
    assert moved.min() >= 0
    assert moved.max() <= 1
    at_corner = ((moved - x).abs().double() > 0.98 * epsilon - 2.0**-8 * (dtype == torch.bfloat16)) | (moved == 0)
    assert bool((at_corner | (moved == 1)).all())


def test_on_a_linear_model_it_comes_close_to_the_vertex() -> None:
    weight = torch.tensor([[1.0, -1.0, 1.0, -1.0]]).repeat_interleave(4, 1)  # stripes of four pixels in a row of 16
    x, y = torch.full((5, 1, 4, 4), 0.5), torch.zeros(5, dtype=torch.long)

    def model(x: Tensor) -> Tensor:  # the margin 10 is never overcome: all queries are spent
        score = x.flatten(1) @ weight[0]
        return torch.stack((torch.full_like(score, 10.0), score), 1)

    before, after = (
        model(x)[:, 1],
        [
            model(square_attack(model, x, y, 0.1, queries=queries, generator=torch.Generator().manual_seed(0)))[:, 1]
            for queries in (1, 400)
        ],
    )
    assert torch.all(after[1] > before + 0.8 * 0.1 * 16)  # the vertex is at 0.1 · 16
    assert torch.all(after[0] <= after[1])


def test_a_staircase_hides_nothing_from_it() -> None:
    split = images(120, 2)
    generator = torch.Generator().manual_seed(0)
    assert accuracy(Quantised(), split.images, split.labels) > 0.95
    moved = square_attack(Quantised(), split.images, split.labels, 0.1, queries=150, generator=generator)
    assert accuracy(Quantised(), moved, split.labels) < 0.5


def test_more_queries_find_more_and_the_broken_are_left_alone() -> None:
    split, sizes = images(60, 2), []

    class Counting(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            sizes.append(len(x))
            return honest()(x)

    found = [
        accuracy(
            honest(),
            square_attack(
                Counting(), split.images, split.labels, 0.07, queries=n, generator=torch.Generator().manual_seed(0)
            ),
            split.labels,
        )
        for n in (1, 10, 200)
    ]
    assert found[0] >= found[1] >= found[2]
    assert found[0] > found[2]
    assert sizes[0] == 60
    assert sizes[-1] == round(60 * found[2])


def test_it_is_as_strong_as_the_package_s() -> None:
    square = pytest.importorskip("pyautoattack.square", reason="needs pyautoattack")
    split = images(300, 4)
    # The package's squares never touch the last row and column, ours do: so the model does not see them.
    x, y = nn.functional.pad(split.images, (0, 1, 0, 1)), split.labels

    def model(x: Tensor) -> Tensor:
        return honest()(x[..., :-1, :-1])

    with torch.random.fork_rng(devices=[]):
        attack = square.SquareAttack(model, norm="Linf", n_queries=300, eps=0.07, seed=0, resc_schedule=True)
        theirs = accuracy(model, attack.perturb(x, y), y)
    moved = square_attack(model, x, y, 0.07, queries=300, generator=torch.Generator().manual_seed(0))
    ours = accuracy(model, moved, y)
    assert theirs < 0.6
    assert abs(ours - theirs) < 0.08  # of a difference of two shares of 300 two standard errors are 0.08


def test_it_reads_no_gradient_and_leaves_the_model_alone() -> None:
    split = images(20, 2)
    state = {name: value.clone() for name, value in honest().state_dict().items()}
    random = torch.get_rng_state()
    with torch.inference_mode():
        square_attack(honest(), split.images, split.labels, 0.1, queries=5, generator=torch.Generator().manual_seed(0))
    assert all(torch.equal(value, state[name]) for name, value in honest().state_dict().items())
    assert all(parameter.grad is None for parameter in honest().parameters())
    assert torch.equal(torch.get_rng_state(), random)
    assert torch.equal(square_attack(honest(), split.images, split.labels, 0.0), split.images)
    assert square_attack(honest(), split.images[:0], split.labels[:0], 0.1).shape == (0, 1, 10, 10)
    with pytest.raises(ValueError, match="queries is 0"):
        square_attack(honest(), split.images, split.labels, 0.1, queries=0)
    with pytest.raises(ValueError, match="epsilon is -1"):
        square_attack(honest(), split.images, split.labels, -1.0)
    # Clipping such images to the bounds would move them by more than ε.
    with pytest.raises(ValueError, match="leaves the bounds"):
        square_attack(honest(), split.images + 0.5, split.labels, 0.1)
    with pytest.raises(TypeError, match="two numbers"):
        square_attack(honest(), split.images, split.labels, 0.1, bounds=(0.0, 0.5, 1.0))
