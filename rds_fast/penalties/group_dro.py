"""Group distributionally robust optimisation: the worst group's loss is trained, not the mean.

    min_θ max_q Σ_g q_g ℓ_g(θ),    q ≥ 0, Σ q = 1,    ℓ_g the mean loss of group g

by turns: a step on θ with the groups weighted by q, and q_g ← q_g exp(η (ℓ_g + C / √n_g)), normalised, for the groups
of the batch. C / √n_g is an allowance for the worse generalisation of small groups.

    dro = rds_fast.GroupDRO(torch.bincount(train_groups).tolist())
    ...
    terms = loss(model, x, y, sample_weight=dro(groups))
    dro.update(terms, y, groups)

Source: Sagawa, Koh, Hashimoto and Liang, *Distributionally robust neural networks for group shifts*, ICLR 2020 (arXiv
1911.08731), algorithm 1 and section 3.3.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..ops.inputs import can_be_read, check_number
from .adaptive import loaded
from .checks import IGNORED
from .loss import LossTerms
from .losses import Loss, check_loss, losses_of

# The least log q that a group's samples are weighted by: a batch of a group whose q is 0 still has a mean.
_LEAST_LOG_WEIGHT = -60.0


@dataclass(eq=False)
class GroupDRO:
    """The weights q of the groups as sample weights; ``update`` moves them after each step.

    ``dro(groups)`` gives q_g / (samples of g in the batch) to each sample of group g. As ``sample_weight`` of a loss
    that makes Σ q_g ℓ_g / Σ q_g, over the groups that are in the batch, and the same of the penalty. The source updates
    q within the step and weights by the new one, which comes a step later here: so a batch may be cut into
    micro-batches, and nothing changes that ``update`` was not told of.

    The source draws groups with equal chance; with batches drawn from all samples, let them be large enough to hold the
    smallest group.

    The state is a tensor on the device of the terms, whose values are never read; ``state_dict()`` and
    ``load_state_dict()`` carry it over, so that a resumed run has the same bits. In distributed training, update with
    terms, labels and groups gathered from all processes, or their weights drift apart.

    Args:
        group_sizes: n_g, the training samples of each group; groups are numbered from 0.
        step_size: η, positive.
        adjustment: C, not negative; every group then needs samples.
        loss: what the groups are compared by, as ``loss`` of ``rds_fast.PenalizedLoss``: the same, unless that is the
            cross-entropy, which is the default. Its label smoothing and the penalty do not count.

    Raises:
        TypeError: a number is none, or the loss is not callable.
        ValueError: there is no group, a size is negative, or a number is out of its range.
        IndexError: when called or updated on CPU, a group is none of them; on CUDA indexing fails, as in PyTorch.
    """

    group_sizes: Sequence[int]
    step_size: float = field(default=0.01, kw_only=True)
    adjustment: float = field(default=0.0, kw_only=True)
    loss: Loss | None = field(default=None, kw_only=True)
    _log_weights: Tensor = field(init=False, repr=False)
    _adjustments: Tensor = field(init=False, repr=False)

    def __post_init__(self) -> None:
        if isinstance(self.group_sizes, Tensor):
            raise TypeError("group_sizes are a Tensor; they must be Python numbers: pass its .tolist()")
        sizes = [check_number("a group's size", size) for size in self.group_sizes]
        if not sizes or min(sizes) < 0:
            raise ValueError(
                f"group_sizes are {sizes}; they must be the samples of each group, and there be one at least"
            )
        if not 0 < check_number("step_size", self.step_size) < math.inf:
            raise ValueError(f"step_size is {self.step_size}; it must be positive and finite")
        if not 0 <= check_number("adjustment", self.adjustment) < math.inf:
            raise ValueError(f"adjustment is {self.adjustment}; it must be finite and not negative")
        if self.adjustment and not all(sizes):
            raise ValueError(
                f"adjustment is {self.adjustment} and group_sizes are {sizes}; a group without samples has none"
            )
        check_loss(self.loss)
        self._log_weights = torch.full((len(sizes),), -math.log(len(sizes)))
        self._adjustments = torch.tensor([float(self.adjustment) / math.sqrt(size) if size else 0.0 for size in sizes])

    def __call__(self, groups: Tensor) -> Tensor:
        """The weight of each sample of a batch with these groups (N,), int64; (N,), float32."""
        log_weights = self._on_the_device_of(groups)
        counts = self._members(groups).sum(0)  # at least 1 wherever it is used
        weights = log_weights.clamp(min=_LEAST_LOG_WEIGHT).exp() / counts
        return weights[groups]

    @property
    def weights(self) -> Tensor:
        """q (groups,), on the device that it is on."""
        return self._log_weights.exp()

    @torch.no_grad()
    def update(self, terms: LossTerms, y: Any, groups: Tensor) -> None:
        """Take in the logits of a training step, from its terms, with the labels and the groups (N,) of its samples."""
        logits = terms.logits.detach()
        losses = losses_of(self.loss, logits, y)
        if groups.shape[0] != logits.shape[0]:
            raise ValueError(f"there are {groups.shape[0]} groups for {logits.shape[0]} samples; give one for each")
        log_weights, adjustments = self._on_the_device_of(groups), self._adjustments
        members = self._members(groups)
        if self.loss is None and not y.is_floating_point():
            members = members & (y != IGNORED)[:, None]
        counts = members.sum(0)
        # By a sum over (N, groups), which is deterministic on every device.
        sums = torch.where(members, losses.float()[:, None], 0.0).sum(0)
        exponents = torch.where(counts > 0, float(self.step_size) * (sums / counts.clamp(min=1) + adjustments), 0.0)
        moved = (log_weights + exponents).log_softmax(0)
        self._log_weights = torch.where(losses.isfinite().all(), moved, log_weights)

    def _members(self, groups: Tensor) -> Tensor:
        """(N, groups), bool."""
        return groups[:, None] == torch.arange(len(self._log_weights), device=groups.device)

    def _on_the_device_of(self, groups: Tensor) -> Tensor:
        """log q, moved to where the groups are, which are checked."""
        if not isinstance(groups, Tensor) or groups.dtype != torch.int64 or groups.dim() != 1:
            given = (
                f"{groups.dtype} of shape {tuple(groups.shape)}"
                if isinstance(groups, Tensor)
                else type(groups).__name__
            )
            raise TypeError(f"groups are {given}; they must be a torch.Tensor of group indices (N,), torch.int64")
        if groups.device != self._log_weights.device:
            self._log_weights = self._log_weights.to(groups.device, non_blocking=True)
            self._adjustments = self._adjustments.to(groups.device, non_blocking=True)
        if can_be_read(groups) and bool(((groups < 0) | (groups >= len(self._log_weights))).any()):
            raise IndexError(
                f"groups hold a number outside 0 to {len(self._log_weights) - 1}; group_sizes are of "
                f"{len(self._log_weights)} groups"
            )
        return self._log_weights

    def state_dict(self) -> dict[str, Tensor]:
        return {"log_weights": self._log_weights}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Raises ValueError if the state is not one of a ``GroupDRO`` of as many groups."""
        self._log_weights = loaded(state, "log_weights", self._log_weights.shape)
