"""The sanity block: an honest model passes, masked ones are flagged, and each check by hand."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor, nn
from toy_classifiers import Quantised, Random, Saturated, honest, images

from rds_fast.evaluation.sanity import Observations, checks, lacks_gradient, measure
from rds_fast.evaluation.settings import EvaluationSettings
from rds_fast.training import Images

SETTINGS = EvaluationSettings(linf_epsilon=0.05, steps=20, restarts=2, square_queries=150, strong_limit=100)


def failed(observed: Observations) -> list[str]:
    return [check.name for check in checks(observed) if not check.passed]


def share(count: int) -> Tensor:
    """The first ``count`` of 200 samples."""
    return torch.arange(200) < count


# Natural accuracy 90%; 40% of all at the settings' radius of 0.1.
HONEST = Observations(
    natural=share(180),
    at_radius={0.0: share(180), 0.05: share(120), 0.1: share(80), 0.5: share(20), 1.0: share(2)},
    after_steps={1: share(100), 10: share(81), 40: share(80)},
    square=share(130),
    without_gradient=share(1),
)


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"natural": share(181)}, "unmoved"),
        ({"at_radius": {**HONEST.at_radius, 0.5: share(85)}}, "falling"),
        ({"at_radius": {**HONEST.at_radius, 1.0: share(3)}}, "reaching zero"),
        ({"square": share(75)}, "gradient-free"),
        ({"after_steps": {**HONEST.after_steps, 1: share(75)}}, "more steps"),
        ({"after_steps": {**HONEST.after_steps, 10: share(75)}}, "more steps"),
        ({"without_gradient": share(2)}, "gradients"),
    ],
)
def test_each_check_fails_alone(change: dict[str, object], name: str) -> None:
    assert failed(HONEST) == []
    assert failed(HONEST._replace(**change)) == [name]


def test_a_difference_within_the_error_is_none() -> None:
    assert failed(HONEST._replace(at_radius={**HONEST.at_radius, 0.5: share(84)})) == []
    assert failed(HONEST._replace(square=share(76))) == []


def test_an_honest_model_is_not_flagged() -> None:
    results = measure(honest(), images(150, 2), SETTINGS)
    assert results.scalars["masked"] == 0.0
    assert results.notes == ()
    assert [row["passed"] for row in results.tables["sanity"]] == ["yes"] * 6
    radii = results.curves["sanity_radius"]
    assert radii.x == (0.0, 0.0125, 0.025, 0.05, 0.1, 0.2, 0.5, 1.0)
    assert radii.y[0] > 0.9
    assert radii.y[-1] == 0.0
    assert 0.2 < radii.y[3] < 0.9
    assert radii.y[3] == results.curves["sanity_steps"].y[-1]
    assert radii.y[3] < results.scalars["square_accuracy"] < radii.y[0]
    assert results.curves["sanity_steps"].x == (1.0, 5.0, 20.0)


@pytest.mark.parametrize("model", [Quantised, Saturated])
def test_hidden_gradients_are_found_out(model: type[nn.Module]) -> None:
    results = measure(model(), images(150, 2), SETTINGS)
    assert results.scalars["masked"] == 1.0
    named = [note.split("“")[1].split("”")[0] for note in results.notes]
    assert named == ["reaching zero", "gradient-free", "gradients"]
    assert results.scalars["square_accuracy"] < results.curves["sanity_steps"].y[-1] - 0.1


def test_a_random_answer_is_found_out() -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        results = measure(Random(), images(150, 2), SETTINGS)
    assert results.scalars["masked"] == 1.0
    assert "“unmoved”" in results.notes[0]


class Constant(nn.Module):
    """Class 0 whatever it sees, with a gradient."""

    def forward(self, x: Tensor) -> Tensor:
        score = x.flatten(1).mean(1)
        return torch.stack((score + 5, score / 2), 1)


def test_a_constant_answer_does_not_pass() -> None:
    split = Images(torch.rand(20, 1, 4, 4, generator=torch.Generator().manual_seed(0)), torch.zeros(20).long(), None, 2)
    assert measure(Constant(), split, SETTINGS).scalars["masked"] == 1.0
    wrong = dataclasses.replace(split, labels=torch.ones(20, dtype=torch.long))
    results = measure(Constant(), wrong, SETTINGS)
    assert results.scalars["masked"] is None
    assert results.notes == ("No sample is classified rightly: there is nothing to attack.",)


def test_the_same_seed_gives_the_same_and_the_model_is_left_alone() -> None:
    split, random = images(60, 2), torch.get_rng_state()
    state = {name: value.clone() for name, value in honest().state_dict().items()}
    settings = dataclasses.replace(SETTINGS, steps=3, square_queries=20, strong_limit=40, batch_size=16)
    first = measure(honest(), split, settings)
    assert first == measure(honest(), split, settings)
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(value, state[name]) for name, value in honest().state_dict().items())
    assert all(parameter.grad is None for parameter in honest().parameters())
    assert not honest().training


@pytest.mark.parametrize(("steps", "epsilon"), [(1, 0.05), (4, 0.0), (2, 1.0)])
def test_the_edges_of_the_settings(steps: int, epsilon: float) -> None:
    settings = dataclasses.replace(SETTINGS, steps=steps, linf_epsilon=epsilon, square_queries=3, strong_limit=10)
    results = measure(honest(), images(10, 2), settings)
    assert results.curves["sanity_steps"].x[-1] == steps
    assert sorted(set(results.curves["sanity_radius"].x)) == list(results.curves["sanity_radius"].x)
    assert epsilon in results.curves["sanity_radius"].x


def test_samples_without_a_gradient() -> None:
    split = images(6, 2)
    assert not bool(lacks_gradient(honest(), split.images, split.labels).any())
    assert bool(lacks_gradient(Quantised(), split.images, split.labels).all())
