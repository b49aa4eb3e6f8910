"""torchvision's networks under the penalty: the gradients with respect to x and every parameter are eager PyTorch's."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
from networks import NETWORKS, Step, assert_same_step, eager_step, network, our_terms, step
from torch import Tensor, nn

import rds_fast

pytestmark = pytest.mark.skipif(
    rds_fast.backends.failure("native", "cpu") is not None,
    reason=f"native: {rds_fast.backends.failure('native', 'cpu')}",
)

SMALL = ("resnet18", "mobilenet_v3_small")


@functools.lru_cache(maxsize=1)  # the cases of one network follow each other
def truth(name: str, training: bool) -> tuple[nn.Module, Tensor, Tensor, Step]:
    model, x, y = network(name)
    model.train(training)
    return model, x, y, eager_step(model, x, y)


def case(name: str, training: bool, fused: bool, channels_last: bool) -> object:
    words = (
        name,
        "train" if training else "eval",
        "fused" if fused else "plain",
        "channels-last" if channels_last else "contiguous",
    )
    return pytest.param(name, training, fused, channels_last, id=", ".join(words))


# Everything for two networks; for the others what most people run, and all that can be changed about it at once.
CASES = [
    case(name, training, fused, channels_last)
    for name in NETWORKS
    for training in (True, False)
    for fused in (False, True)
    for channels_last in (False, True)
    if name in SMALL
    or (training, fused, channels_last) in ((True, False, False), (True, True, True), (False, True, False))
]


@pytest.mark.parametrize(("name", "training", "fused", "channels_last"), CASES)
def test_a_step_equals_eager_pytorchs(name: str, training: bool, fused: bool, channels_last: bool) -> None:
    model, x, y, expected = truth(name, training)
    if fused:
        model = rds_fast.nn.fuse(model)
    if channels_last:
        model = copy.deepcopy(model).to(memory_format=torch.channels_last)
        x = x.contiguous(memory_format=torch.channels_last)
    assert_same_step(step(our_terms, model, x, y), expected)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_without_the_fast_mode_it_is_the_same(training: bool) -> None:
    model, x, y, expected = truth("resnet18", training)
    assert_same_step(step(functools.partial(our_terms, fast=False), model, x, y), expected)
