"""Random numbers that follow from the seed, the epoch and the sample alone, so that nothing of them has to be saved."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

# SplitMix64 (Steele, Lea & Flood 2014): the step between two states, and the two factors of the mixing.
_STEP, _FIRST, _SECOND = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


def derived_seed(*entropy: int) -> int:
    """One seed from several numbers; neighbouring numbers give unrelated seeds."""
    return int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0])


def epoch_order(seed: int, epoch: int, samples: int) -> Tensor:
    """(samples,): the order of the data in an epoch. It follows from seed and epoch: nothing has to be saved."""
    return torch.randperm(samples, generator=torch.Generator().manual_seed(derived_seed(seed, epoch)))


def sample_numbers(seed: int, epoch: int, indices: Tensor, draws: int) -> Tensor:
    """(K, draws), int64 in [0, 2**31): the random numbers of each sample in an epoch.

    A counter is hashed rather than a generator advanced, so a sample's numbers depend on no other sample, and integer
    arithmetic gives the same on every device.

    Args:
        seed, epoch: of the training.
        indices: (K,), int64, the samples.
        draws: how many numbers each sample needs.
    """
    streams = _mixed(indices * _signed(_STEP) + _signed(derived_seed(seed, epoch)))
    counter = torch.arange(1, draws + 1, device=indices.device) * _signed(_STEP)
    return _shifted(_mixed(streams[:, None] + counter), 33)  # the upper bits, which are mixed best


def _mixed(state: Tensor) -> Tensor:
    """SplitMix64's output of a state, as int64, whose products wrap as those of unsigned integers do."""
    state = (state ^ _shifted(state, 30)) * _signed(_FIRST)
    state = (state ^ _shifted(state, 27)) * _signed(_SECOND)
    return state ^ _shifted(state, 31)


def _shifted(values: Tensor, bits: int) -> Tensor:
    """To the right, zeros coming in: torch's own shift would copy the sign."""
    return (values >> bits) & ((1 << (64 - bits)) - 1)


def _signed(unsigned: int) -> int:
    """The int64 of the same 64 bits."""
    return unsigned - (1 << 64) if unsigned >> 63 else unsigned
