"""The two names of a batch norm's result: by permission only."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from rds_fast import backends, fast_double_backward
from rds_fast.ops.aliases import offers, take_alias
from rds_fast.ops.batch_norm import batch_norm
from rds_fast.ops.convolution import convolution

pytestmark = pytest.mark.skipif(
    backends.failure("native", "cpu") is not None, reason=f"native: {backends.failure('native', 'cpu')}"
)

X = torch.rand(3, 4, 5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
WEIGHT = torch.rand(4, 4, 3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) - 0.5


def end_of_block(x: Tensor) -> Tensor:
    return batch_norm(x, None, None, training=True, residual=x.cos(), relu=True)


def next_block(y: Tensor) -> Tensor:
    """Uses y twice, by operations that take an alias."""
    h = convolution(torch.conv2d, y, WEIGHT, padding=1)
    return batch_norm(h, None, None, training=True, residual=y, relu=True)


def gradients(allow: Callable[[Tensor], None]) -> tuple[Tensor, Tensor]:
    """With respect to x and to y."""
    x = X.clone().requires_grad_()
    with fast_double_backward():
        y = end_of_block(x)
        allow(y)
        loss = next_block(y).sin().sum()
    return torch.autograd.grad(loss, (x, y))


def plain_gradients() -> tuple[Tensor, Tensor]:
    x = X.clone().requires_grad_()
    y = torch.relu(torch.batch_norm(x, None, None, None, None, True, 0.1, 1e-5, False) + x.cos())
    h = torch.conv2d(y, WEIGHT, padding=1)
    out = torch.relu(torch.batch_norm(h, None, None, None, None, True, 0.1, 1e-5, False) + y)
    return torch.autograd.grad(out.sin().sum(), (x, y))


def test_without_permission_the_gradient_is_whole() -> None:
    torch.testing.assert_close(gradients(lambda y: None), plain_gradients())


def test_with_permission_the_alias_has_its_share_of_the_gradient() -> None:
    (gx, gy), (expected_gx, expected_gy) = gradients(offers.permit), plain_gradients()
    torch.testing.assert_close(gx, expected_gx)
    assert (gy - expected_gy).abs().max() > 0.1 * expected_gy.abs().max()


def test_an_alias_is_taken_once_and_only_if_permitted_before_the_first_use() -> None:
    x = X.clone().requires_grad_()
    y = end_of_block(x)
    assert take_alias(y) is y
    offers.permit(y)
    assert take_alias(y) is y
    y = end_of_block(x)
    offers.permit(y)
    alias = take_alias(y)
    assert alias is not y
    assert alias.data_ptr() == y.data_ptr()
    assert take_alias(y) is y


def test_an_alias_is_not_taken_of_a_tensor_that_was_changed() -> None:
    y = end_of_block(X.clone().requires_grad_())
    offers.permit(y)
    y.mul_(2)
    assert take_alias(y) is y


def test_an_offer_can_be_withdrawn() -> None:
    y = end_of_block(X.clone().requires_grad_())
    assert offers.holds(y)
    offers.withdraw(y)
    assert not offers.holds(y)
    offers.permit(y)
    assert take_alias(y) is y
    offers.withdraw(y)
    offers.withdraw([y])
