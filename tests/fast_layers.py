"""What the tests of layers under ``fast_double_backward`` share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from rds_fast import fast_double_backward


def fast(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def call(*arguments: Tensor) -> Tensor:
        with fast_double_backward():
            return function(*arguments)

    return call


class Calls(TorchDispatchMode):
    """The calls that reach the kernels."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple[Any, ...]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls.append((func, args))
        return func(*args, **(kwargs or {}))

    def of(self, operation: Any) -> list[tuple[Any, ...]]:
        return [args for func, args in self.calls if func == operation]
