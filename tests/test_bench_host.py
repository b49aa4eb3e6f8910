"""The bench that counts the calls of Python functions in a step."""

from __future__ import annotations

from bench.host import calls_of_a_step, python_calls
from bench.steps import Case


def test_python_functions_are_counted_and_no_others() -> None:
    def inner() -> int:
        return len("abc")

    assert python_calls(lambda: [inner() for _ in range(3)]) in (4, 5)  # before Python 3.12 a comprehension is a call


def test_a_fused_step_makes_fewer_calls() -> None:
    case = Case("resnet18", 32, 2)
    assert calls_of_a_step(case, "ours_fused") < 0.6 * calls_of_a_step(case, "ours")
