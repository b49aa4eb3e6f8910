"""Two names for one tensor, so that the cotangents of its two uses arrive apart and a kernel can add them.

Autograd's engine sums the cotangents of a tensor with several uses in a pass of its own: two reads and a write. An
operation whose backward can add them while it reads returns its result twice, as two outputs of one storage, and offers
the second one on the first. The first operation here that uses the tensor takes the alias, later ones the tensor.

The gradient with respect to the tensor then lacks what came through its alias. So an alias is taken only by permission,
which is to be given where nobody can hold the tensor, to ask for that gradient, but the operations that use it:
``rds_fast.nn`` knows such places. An offer that was not permitted when the tensor is first used is void.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from .marks import Marks

# To permit one is to say that no gradient with respect to the tensor will be asked for, nor hooked.
offers = Marks()


class _Offer(NamedTuple):
    alias: Tensor
    version: int  # the tensor's own, when the alias had its values
    permitted: bool = False


def offer_alias(tensor: Tensor, alias: Tensor) -> None:
    """``alias`` has the values of ``tensor`` and requires a gradient of its own."""
    offers[tensor] = _Offer(alias, tensor._version)


def take_alias(tensor: Tensor) -> Tensor:
    """The alias, once, if it is permitted and the tensor has not changed since; else the tensor itself."""
    offer: _Offer | None = offers.pop(tensor, None)
    if offer is None:
        return tensor
    return offer.alias if offer.permitted and offer.version == tensor._version else tensor
