"""Two names for one tensor, so that the cotangents of its two uses arrive apart and a kernel can add them.

Autograd's engine sums the cotangents of a tensor with several uses in a pass of its own: two reads and a write. An
operation whose backward can add them while it reads returns its result twice, as two outputs of one storage, and offers
the second one on the first. The first operation here that uses the tensor takes the alias, later ones the tensor.
"""

from __future__ import annotations

from torch import Tensor

_ATTRIBUTE = "_rds_fast_alias"


def offer_alias(tensor: Tensor, alias: Tensor) -> None:
    """``alias`` has the values of ``tensor`` and requires a gradient of its own."""
    setattr(tensor, _ATTRIBUTE, (alias, tensor._version))


def take_alias(tensor: Tensor) -> Tensor:
    """The alias on offer, once; else, or where the tensor was changed since, the tensor itself."""
    offered = getattr(tensor, _ATTRIBUTE, None)
    if offered is None:
        return tensor
    delattr(tensor, _ATTRIBUTE)
    alias, version = offered
    return alias if version == tensor._version else tensor
