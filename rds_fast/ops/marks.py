"""What is known of a tensor and kept beside it: an attribute on it would be saved and copied with the tensor."""

from __future__ import annotations

from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary


class Marks(WeakIdKeyDictionary):
    """A mark for each of some tensors, for as long as the tensor lives.

    A mark is a NamedTuple, and what it offers holds only if its field ``permitted`` is set: by whoever knows that
    nobody holds the tensor but the operations that it goes to. ``rds_fast.nn`` knows such places.
    """

    def holds(self, value: object) -> bool:
        """Whether there is a mark, permitted or not, for what may be anything."""
        return isinstance(value, Tensor) and value in self

    def permit(self, tensor: Tensor) -> None:
        """Permit what the tensor's mark offers, if there is one."""
        mark = self.get(tensor)
        if mark is not None:
            self[tensor] = mark._replace(permitted=True)

    def withdraw(self, value: object) -> None:
        """Remove the mark, if there is one, of what may be anything."""
        if isinstance(value, Tensor):
            self.pop(value, None)
