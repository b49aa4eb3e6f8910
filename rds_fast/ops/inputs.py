"""What the operations ask of their arguments. No check reads a value of a tensor."""

from __future__ import annotations

import numbers
from typing import Any

import torch
from torch import Tensor

# The dtypes that the kernels compute in, and that PyTorch itself has these operations for.
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def check_rows(name: str, value: Any, operation: str, *, integers: bool = False) -> None:
    """Raise TypeError unless ``value`` is a dense tensor of a dtype in ``DTYPES`` or, if so said, of integers.

    What is refused here would fail inside a kernel or a conversion, whose message would name neither the argument nor
    the way out.
    """
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} is a {type(value).__name__}; {operation} needs a torch.Tensor")
    if value.dtype in DTYPES and value.layout is torch.strided and not value.is_nested:
        return
    if value.is_quantized:
        raise TypeError(f"{name} is quantized ({value.dtype}); {operation} needs {name}.dequantize()")
    if value.layout is not torch.strided or value.is_nested:
        kind = "nested" if value.is_nested else str(value.layout).removeprefix("torch.")
        raise TypeError(f"{name} is a {kind} tensor; {operation} needs a dense one, such as {_dense(name, value)}")
    if value.is_complex():
        raise TypeError(f"{name} is {value.dtype}; {operation} needs a real tensor, such as {name}.abs()")
    if value.is_floating_point():
        raise TypeError(
            f"{name} is {value.dtype}; {operation} needs float64, float32, bfloat16 or float16: convert it first, for "
            f"example {name}.float()"
        )
    if not integers:
        raise TypeError(f"{name} is {value.dtype}; {operation} needs a floating-point tensor, such as {name}.float()")


def _dense(name: str, value: Tensor) -> str:
    return f"torch.nested.to_padded_tensor({name}, 0.0)" if value.is_nested else f"{name}.to_dense()"


def can_be_read(values: Tensor) -> bool:
    """Whether a check may read values: they are there, and nothing has to wait for a device.

    Meta and fake tensors have none, nor has anything that is traced.
    """
    if torch.compiler.is_compiling() or torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.PROXY) is not None:
        return False
    return values.device.type == "cpu" and not isinstance(values, torch._subclasses.FakeTensor)


def check_number(name: str, value: Any, hint: str = "") -> float:
    """The value as a Python float, if it is a real number: Python's or NumPy's, no bool.

    A tensor is refused, since reading its value would wait for its device.
    """
    if isinstance(value, Tensor):
        raise TypeError(f"{name} is a {type(value).__name__}; it must be a Python number: take its .item(), once")
    if isinstance(value, bool) or not isinstance(value, (int, float, numbers.Real)):
        raise TypeError(f"{name} is {value!r}, a {type(value).__name__}; it must be a Python number{hint}")
    return float(value)


def check_count(name: str, value: Any) -> int:
    """The value as a Python int, if it is a whole number from 1 on: Python's or NumPy's, no bool."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"{name} is {value!r}, a {type(value).__name__}; it must be an int")
    if value < 1:
        raise ValueError(f"{name} is {value}; it must be at least 1")
    return int(value)
