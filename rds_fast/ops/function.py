"""The autograd Function that every operation here derives from."""

from __future__ import annotations

from typing import Any

import torch


class Function(torch.autograd.Function):
    """A ``torch.autograd.Function`` that is cheap to call.

    With a ``setup_context``, PyTorch's own ``apply`` binds the arguments to the signature of ``forward`` on every call,
    for the sake of defaults, which costs more than all the rest. Functions here have no defaults.
    """

    @classmethod
    def apply(cls, *arguments: Any) -> Any:
        if torch._C._are_functorch_transforms_active():
            return super().apply(*arguments)
        return super(torch.autograd.Function, cls).apply(*arguments)  # type: ignore[misc]  # mypy does not see the C++ base
