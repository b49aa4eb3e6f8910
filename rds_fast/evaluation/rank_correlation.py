"""How alike two attributions are: top-k intersection, Kendall's τ and Spearman's ρ of each sample.

All are computed from ranks alone, in plain PyTorch on the attributions' device, many samples at once. They agree with
SciPy's, which takes one sample at a time on a CPU: τ to the last bit, since its counts are integers.
"""

from __future__ import annotations

import operator
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

# Values ranked at a time. A rank correlation holds about ten int64 tensors of this many: 320 MiB.
_CHUNK = 2**22


def top_k_intersection(a: Tensor, b: Tensor, k: int) -> Tensor:
    """The share of the k largest |values| of each sample of ``a`` that are among the k largest of ``b``.

    With T(a) the set of the k coordinates where |a| is largest, |T(a) ∩ T(b)| / k (Ghorbani, Abid and Zou 2019). Of
    coordinates that tie for the last place the first in row-major order enter T, on both sides: where fewer than k
    values are not zero, the rest of T says little.

    Args:
        a, b: attributions (N, ...) of one shape, of any real dtypes; channels count as coordinates of their own (sum
            |values| over them first for pixels).
        k: from 1 to the number of values of a sample.

    Returns:
        (N,), float64, in [0, 1]; NaN for a sample where either attribution is zero throughout or holds a NaN: it has
        no largest values.

    Raises:
        TypeError: a or b is not a real tensor, or k not an integer.
        ValueError: the shapes differ, there is no dimension of samples, or k is out of range.
    """
    _check(a, b)
    k = _checked_count(k, a.shape[1:].numel())
    return _by_chunks(lambda one, other: _intersection(one.abs(), other.abs(), k), a, b)


def kendall_tau(a: Tensor, b: Tensor) -> Tensor:
    """Kendall's rank correlation τ-b of each sample's values in ``a`` and in ``b``.

    Over the pairs of coordinates of a sample, with n of them in all, n_a and n_b tied in a and in b, P ordered alike
    by both and Q ordered oppositely (Kendall 1945),

        τ = (P − Q) / (√(n − n_a) √(n − n_b)).

    Signs count: pass ``a.abs(), b.abs()`` to compare magnitudes. Q is the number of inversions of b's ranks once they
    are in a's order. They are counted one bit of the rank at a time, from the highest: O(D log D) for D values.

    Args:
        a, b: (N, ...) of one shape, of any real dtypes.

    Returns:
        (N,), float64, in [−1, 1]: the number of ``scipy.stats.kendalltau``. NaN where a sample is constant in a or b,
        has less than two values, or holds a NaN.

    Raises:
        TypeError: a or b is not a real tensor.
        ValueError: the shapes differ, or there is no dimension of samples.
    """
    _check(a, b)
    return _by_chunks(_kendall_tau, a, b)


def spearman(a: Tensor, b: Tensor) -> Tensor:
    """Spearman's rank correlation ρ of each sample's values in ``a`` and in ``b``.

    The linear correlation of the ranks, of which tied values share the mean. Signs count, as in ``kendall_tau``.

    Args:
        a, b: (N, ...) of one shape, of any real dtypes.

    Returns:
        (N,), float64, in [−1, 1]: the number of ``scipy.stats.spearmanr``. NaN where a sample is constant in a or b,
        has less than two values, or holds a NaN.

    Raises:
        TypeError: a or b is not a real tensor.
        ValueError: the shapes differ, or there is no dimension of samples.
    """
    _check(a, b)
    return _by_chunks(_spearman, a, b)


def top_k_mask(values: Tensor, k: int) -> Tensor:
    """(N, D), bool: True at the k largest of each row of values (N, D); of equal ones the first are taken."""
    order = values.argsort(dim=1, descending=True, stable=True)
    return torch.zeros_like(values, dtype=torch.bool).scatter_(1, order[:, :k], True)


def _check(a: Tensor, b: Tensor) -> None:
    for name, values in (("a", a), ("b", b)):
        if not isinstance(values, Tensor) or values.is_complex():
            found = values.dtype if isinstance(values, Tensor) else type(values).__name__
            raise TypeError(f"{name} is {found}; it must be a tensor of real values (N, ...)")
    if a.shape != b.shape or a.dim() == 0:
        raise ValueError(
            f"a has shape {tuple(a.shape)} and b {tuple(b.shape)}; both must be (N, ...), N samples, of one shape"
        )
    if a.device != b.device:
        raise ValueError(f"a is on {a.device} and b on {b.device}; move one to the other's device")


def _checked_count(k: int, values: int) -> int:
    try:
        k = operator.index(k)
    except TypeError:
        raise TypeError(f"k is a {type(k).__name__}; it must be an integer") from None
    if not 1 <= k <= values:
        raise ValueError(f"k is {k}; it must be at least 1 and at most {values}, the number of values of a sample")
    return k


def _by_chunks(correlation: Callable[[Tensor, Tensor], Tensor], a: Tensor, b: Tensor) -> Tensor:
    """The correlation of rows (N, D), some rows at a time; NaN for those that hold a NaN."""
    size = a.shape[1:].numel()
    if a.numel() == 0:
        return torch.full(a.shape[:1], torch.nan, dtype=torch.float64, device=a.device)
    # Adding 0 makes 0 of −0, which sorting by bits on a GPU would take for less.
    a, b = (_wide(values.detach()).reshape(-1, size) + 0 for values in (a, b))
    parts = zip(a.split(max(1, _CHUNK // size)), b.split(max(1, _CHUNK // size)), strict=True)
    ordered = ((a == a) & (b == b)).all(1)
    return torch.cat([correlation(*part) for part in parts]).where(ordered, torch.nan)


def _wide(values: Tensor) -> Tensor:
    """Integers and bools as int64: the magnitude of int8's −128, 128, is no int8."""
    return values if values.is_floating_point() else values.long()


def _intersection(a: Tensor, b: Tensor, k: int) -> Tensor:
    shared = (top_k_mask(a, k) & top_k_mask(b, k)).sum(1).double() / k
    return shared.masked_fill((a == 0).all(1) | (b == 0).all(1), torch.nan)


def _runs(begins: Tensor) -> Tensor:
    """(N, D): the position at which the run of equal values begins, of each position in sorted rows."""
    positions = torch.arange(begins.shape[1], device=begins.device)
    return torch.where(begins, positions, 0).cummax(1).values


def _begins(ordered: Tensor) -> Tensor:
    """(N, D), bool: the first of each run of equal values in sorted rows."""
    begins = torch.ones_like(ordered, dtype=torch.bool)
    begins[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    return begins


def _spearman(a: Tensor, b: Tensor) -> Tensor:
    one, other = _centred_ranks(a), _centred_ranks(b)
    spread = (one.square().sum(1) * other.square().sum(1)).sqrt()
    return ((one * other).sum(1) / spread).clamp(-1.0, 1.0)


def _centred_ranks(values: Tensor) -> Tensor:
    """(N, D), float64: twice the mean rank of each value less twice the mean of all ranks, which is an integer."""
    ordered, order = values.sort(dim=1, stable=True)
    size, begins = values.shape[1], _begins(ordered)
    first = _runs(begins)
    ends = begins.roll(-1, 1)  # each row's first value begins a run, so the last one ends one
    last = size - 1 - _runs(ends.flip(1)).flip(1)
    return torch.zeros_like(values, dtype=torch.float64).scatter_(1, order, (first + last - (size - 1)).double())


def _kendall_tau(a: Tensor, b: Tensor) -> Tensor:
    size = a.shape[1]
    # Sorted by a and, where that ties, by b: a pair is an inversion then only if both order it, and oppositely.
    b_ordered, order = b.sort(dim=1, stable=True)
    a_ordered, order = a.gather(1, order).sort(dim=1, stable=True)
    a_begins, b_begins = _begins(a_ordered), _begins(b_ordered)
    b_ranks = _runs(b_begins).gather(1, order)
    pairs = size * (size - 1) // 2
    tied_a, tied_b, tied_both = map(_tied_pairs, (a_begins, b_begins, a_begins | _begins(b_ranks)))
    difference = pairs - tied_a - tied_b + tied_both - 2 * _inversions(b_ranks)
    # By NumPy, whose square root is rounded correctly (PyTorch's is not on every CPU), and one root after the other, as
    # SciPy divides: so the results are the same to the last bit.
    difference, untied_a, untied_b = torch.stack((difference, pairs - tied_a, pairs - tied_b)).cpu().numpy()
    with np.errstate(invalid="ignore"):  # 0 / 0 where a row is constant
        tau = difference / np.sqrt(untied_a) / np.sqrt(untied_b)
    return torch.from_numpy(tau.clip(-1.0, 1.0)).to(a.device)


def _tied_pairs(begins: Tensor) -> Tensor:
    """(N,): the pairs of equal values, each counted at the later of its two positions."""
    positions = torch.arange(begins.shape[1], device=begins.device)
    return (positions - _runs(begins)).sum(1)


def _inversions(ranks: Tensor) -> Tensor:
    """(N,): the pairs of each row of (N, D) whose first element is the larger; elements are from 0 to D − 1.

    Two elements differ first in one bit. With the elements grouped by the bits above it, each group in the row's
    order, the pairs to count are those of a group whose first has the bit and whose second has not. A stable partition
    of every group by the bit gives the groups of the next one.
    """
    samples, size = ranks.shape
    bits = max(1, (size - 1).bit_length())
    counts = torch.zeros(samples, 2**bits + 1, dtype=torch.int64, device=ranks.device)
    counts.scatter_add_(1, ranks + 1, torch.ones_like(ranks))
    below = counts.cumsum(1)  # below[v]: how many are less than v, which is where a group from v on begins
    positions = torch.arange(size, device=ranks.device).expand_as(ranks)
    total = torch.zeros(samples, dtype=torch.int64, device=ranks.device)
    for bit in reversed(range(bits)):
        lowest = (ranks >> (bit + 1)) << (bit + 1)  # of the group of each
        begin, middle = below.gather(1, lowest), below.gather(1, lowest + 2**bit)
        high = (ranks >> bit) & 1
        earlier = high.cumsum(1) - high  # with the bit, before each in the row; less those before its group:
        earlier = earlier - earlier.gather(1, begin)
        total += (earlier * (1 - high)).sum(1)
        ranks = torch.empty_like(ranks).scatter_(
            1, torch.where(high == 1, middle + earlier, positions - earlier), ranks
        )
    return total
