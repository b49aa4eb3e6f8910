"""The autograd Function that every operation here derives from."""

from __future__ import annotations

from typing import Any

import torch

from ..compilation import uncompiled


class Function(torch.autograd.Function):
    """A ``torch.autograd.Function`` that is cheap to call, and that ``torch.compile`` leaves as it is.

    With a ``setup_context``, PyTorch's own ``apply`` binds the arguments to the signature of ``forward`` on every call,
    for the sake of defaults, which costs more than all the rest. Functions here have no defaults.

    The engine calls ``backward`` wherever somebody differentiates, in a compiled function too, and the compiler would
    take that frame for one to compile.
    """

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        for name in ("forward", "backward"):
            if name in vars(cls):
                uncompiled(getattr(cls, name))

    @classmethod
    def apply(cls, *arguments: Any) -> Any:
        if torch._C._are_functorch_transforms_active():
            return super().apply(*arguments)
        return super(torch.autograd.Function, cls).apply(*arguments)  # type: ignore[misc]  # mypy does not see the C++ base
