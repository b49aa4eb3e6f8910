"""What no operation takes is refused by one message, whatever the backend: what it is, what is needed, what to do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import rds_fast

X = torch.rand(4, 3)
INDICES = torch.tensor([0, 2, 1, 1])

OPERATIONS: dict[str, tuple[str, Callable[[Tensor], Any]]] = {
    "logsumexp": ("input", lambda x: rds_fast.logsumexp(x, 1)),
    "cross_entropy_with_logsumexp": ("logits", lambda x: rds_fast.cross_entropy_with_logsumexp(x, INDICES)),
    "gradient_norm": ("gradient", rds_fast.gradient_norm),
}


def nested(layout: torch.layout) -> Tensor:
    return torch.nested.nested_tensor([X[0], X[1, :2]], layout=layout)


REFUSED: dict[str, tuple[Callable[[], Tensor], str]] = {
    "float8_e4m3fn": (lambda: X.to(torch.float8_e4m3fn), r"is torch.float8_e4m3fn; .*float16: .* {name}\.float\(\)"),
    "float8_e5m2": (lambda: X.to(torch.float8_e5m2), r"is torch.float8_e5m2; .*float16: .* {name}\.float\(\)"),
    "complex": (lambda: X.to(torch.complex64), r"is torch.complex64; .* needs a real tensor, such as {name}\.abs\(\)"),
    "sparse": (lambda: X.to_sparse(), r"is a sparse_coo tensor; .* a dense one, such as {name}\.to_dense\(\)"),
    "compressed": (lambda: X.to_sparse_csr(), r"is a sparse_csr tensor; .* a dense one, such as {name}\.to_dense\(\)"),
    "nested": (lambda: nested(torch.strided), r"is a nested tensor; .* torch\.nested\.to_padded_tensor\({name}, 0"),
    "jagged": (lambda: nested(torch.jagged), r"is a nested tensor; .* torch\.nested\.to_padded_tensor\({name}, 0"),
    "quantized": (
        lambda: torch.quantize_per_tensor(X, 0.1, 0, torch.qint8),
        r"is quantized \(torch.qint8\); .* needs {name}\.dequantize\(\)",
    ),
    "a list": (lambda: X.tolist(), r"is a list; .* needs a torch\.Tensor"),  # type: ignore[dict-item]
}


@pytest.mark.filterwarnings("ignore")  # PyTorch's: beta states, deprecations
@pytest.mark.parametrize("kind", REFUSED)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_refused(backend: str, operation: str, kind: str) -> None:
    name, call = OPERATIONS[operation]
    make, message = REFUSED[kind]
    with pytest.raises(TypeError, match=f"^{name} {message.format(name=name)}") as raised:
        call(make())
    assert operation in str(raised.value)


@pytest.mark.parametrize("kind", ["float8_e4m3fn", "sparse"])
def test_refused_as_a_target(backend: str, kind: str) -> None:
    make, message = REFUSED[kind]
    with pytest.raises(TypeError, match=f"^target {message.format(name='target')}"):
        rds_fast.cross_entropy_with_logsumexp(X, make())


NUMBERS: dict[str, Callable[[Any], Any]] = {
    "p": lambda value: rds_fast.gradient_norm(X, value),
    "power": lambda value: rds_fast.gradient_norm(X, power=value),
    "label_smoothing": lambda value: rds_fast.cross_entropy_with_logsumexp(X, INDICES, label_smoothing=value)[0],
}


@pytest.mark.parametrize("number", [np.float32(1), np.float64(1), np.float16(1), np.uint8(1), 1], ids=repr)
@pytest.mark.parametrize("name", NUMBERS)
def test_numbers(backend: str, name: str, number: Any) -> None:
    assert torch.equal(NUMBERS[name](number), NUMBERS[name](1.0))


@pytest.mark.parametrize("name", NUMBERS)
def test_no_numbers(backend: str, name: str) -> None:
    with pytest.raises(TypeError, match=rf"^{name} is a Tensor; it must be a Python number: take its \.item\(\), once"):
        NUMBERS[name](torch.tensor(1.0))
    with pytest.raises(TypeError, match=rf"^{name} is True, a bool; it must be a Python number"):
        NUMBERS[name](True)
    with pytest.raises(TypeError, match=rf"^{name} is None, a NoneType; it must be a Python number"):
        NUMBERS[name](None)
