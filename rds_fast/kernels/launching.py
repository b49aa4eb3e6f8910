"""The decorator of kernels: ``triton.jit``, with a short way for a launch that is like one before.

At every launch Triton finds out anew what each argument means for compilation, which takes longer than most kernels
run. Here a launch is known by less: the dtypes of the tensors, provided that all are aligned, the widths of the sizes,
and the compile-time arguments. What Triton compiled for the first such launch is then called directly.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import triton
from triton.compiler import CompiledKernel
from triton.runtime.jit import JITFunction

from ..backends import PLAIN_TENSORS

_ALIGNMENT = 16  # bytes; what Triton tells the compiler of a pointer that it divides
_SMALL = range(-(2**31), 2**31)  # the numbers that are int32 in a kernel; others are int64


class Kernel(JITFunction):
    """A kernel, launched by ``kernel[grid](*arguments, **options)``: compile-time arguments and options by name."""

    def __init__(self, function: Callable[..., None], do_not_specialize: tuple[str, ...]) -> None:
        super().__init__(function, do_not_specialize=do_not_specialize)
        self.run_time = [parameter for parameter in self.params if not parameter.is_constexpr]
        self.compile_time = self.params[len(self.run_time) :]
        if not all(parameter.is_constexpr for parameter in self.compile_time):
            raise TypeError(f"{function.__name__}: compile-time arguments must come last")
        self._by_value = tuple(not parameter.do_not_specialize for parameter in self.run_time)
        self._compiled: dict[Any, tuple[CompiledKernel, tuple[Any, ...]]] = {}

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return functools.partial(self.launch, grid)

    def launch(self, grid: tuple[int, ...], *arguments: Any, **options: Any) -> None:
        """Launches on the current device and stream."""
        values: list[Any] = []
        key: list[Any] = []
        addresses = 0
        for argument, by_value in zip(arguments, self._by_value, strict=True):
            kind = type(argument)
            if kind in PLAIN_TENSORS:
                address = argument.data_ptr()
                addresses |= address
                values.append(address)
                key += argument.dtype, argument.get_device()
                continue
            values.append(argument)
            if argument is None:  # an absent tensor
                key.append(None)
            elif kind is float:
                key.append(float)
            elif kind is int:
                key.append((argument,) if by_value else argument in _SMALL)
            else:  # a subclass, of which no more is known
                addresses = 1
        if addresses % _ALIGNMENT:
            self.run(*arguments, grid=grid, warmup=False, **options)
            return
        known = (*key, *options.items())
        found = self._compiled.get(known)
        if found is not None:
            compiled, constants = found
            compiled[(*grid, 1, 1)[:3]](*values, *constants)
            return
        result = self.run(*arguments, grid=grid, warmup=False, **options)
        if isinstance(result, CompiledKernel):
            self._compiled[known] = result, tuple(options[parameter.name] for parameter in self.compile_time)


def kernel(*do_not_specialize: str) -> Callable[[Callable[..., None]], Any]:
    """A decorator for a kernel; ``do_not_specialize``: its sizes, whose values are not worth a compilation each."""

    def decorate(function: Callable[..., None]) -> Any:
        # On AMD GPUs Triton also asks which tensors are smaller than 2 GB, and compiles their addresses accordingly.
        if triton.knobs.runtime.interpret or torch.version.hip is not None:
            return triton.jit(function, do_not_specialize=do_not_specialize)
        return Kernel(function, do_not_specialize)

    return decorate
