"""Schedules: plain callables of the step."""

from __future__ import annotations

import math
import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rds_fast.penalties.schedules import Constant, Cosine, LinearWarmup, Step


def test_values() -> None:
    assert [Constant(0.3)(step) for step in (0, 7)] == [0.3, 0.3]
    assert [LinearWarmup(0.4, 4)(step) for step in (0, 1, 2, 4, 5)] == pytest.approx([0, 0.1, 0.2, 0.4, 0.4])
    assert [Cosine(1.0, 0.2, 4)(step) for step in (0, 1, 2, 4, 9)] == pytest.approx(
        [1.0, 0.6 + 0.4 * math.sqrt(0.5), 0.6, 0.2, 0.2]
    )
    assert [Step(1.0, (2, 5), 0.1)(step) for step in (0, 1, 2, 4, 5, 9)] == pytest.approx([1, 1, 0.1, 0.1, 0.01, 0.01])
    warm_cosine = LinearWarmup(Cosine(1.0, 0.0, 8), 2)
    assert warm_cosine(1) == pytest.approx(0.5 * Cosine(1.0, 0.0, 8)(1))
    assert warm_cosine(4) == Cosine(1.0, 0.0, 8)(4)


@given(start=st.floats(0, 1e6), end=st.floats(0, 1e6), steps=st.integers(1, 10**6), step=st.integers(0, 2 * 10**6))
def test_cosine_stays_between_its_ends(start: float, end: float, steps: int, step: int) -> None:
    margin = 1e-9 * max(start, end)
    assert min(start, end) - margin <= Cosine(start, end, steps)(step) <= max(start, end) + margin


@pytest.mark.parametrize("schedule", [Constant(0.1), LinearWarmup(0.1, 5), Cosine(0.1, 0.0, 5), Step(0.1, (3, 6))])
def test_they_are_immutable_values(schedule: Constant | LinearWarmup | Cosine | Step) -> None:
    assert eval(repr(schedule)) == schedule
    assert pickle.loads(pickle.dumps(schedule)) == schedule
    assert hash(schedule) == hash(eval(repr(schedule)))
    with pytest.raises(AttributeError):
        schedule.weight = 1.0
    with pytest.raises(ValueError, match="step is -1; steps count from 0"):
        schedule(-1)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: Constant(-1.0), ValueError, "weight is -1.0; it must be finite and not negative"),
        (lambda: Constant(True), TypeError, "weight is True, a bool; it must be a Python number"),
        (lambda: LinearWarmup(math.nan, 3), ValueError, "weight is nan; it must be finite"),
        (lambda: LinearWarmup(0.1, 0), ValueError, "steps is 0; it must be at least 1"),
        (lambda: LinearWarmup(0.1, 2.5), TypeError, "steps is a float; it must be an int"),
        (lambda: Cosine(0.1, -0.1, 3), ValueError, "end is -0.1; it must be finite and not negative"),
        (lambda: Step(0.1, (5, 5)), ValueError, r"milestones are \(5, 5\); they must increase"),
        (lambda: Step(0.1, [0]), ValueError, "a milestone is 0; it must be at least 1"),
        (lambda: Step(0.1, (5,), -2.0), ValueError, "factor is -2.0; it must be finite and not negative"),
    ],
)
def test_bad_arguments(make: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()
