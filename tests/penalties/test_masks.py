"""Masks of the input gradient, against the gradient masked in eager float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import penalty_references as references
import pytest
import torch
from penalty_references import NETWORKS, assert_same_gradients, batch, gradients, mlp
from torch import Tensor, nn

from rds_fast.penalties.attribution import AttributionPenalty
from rds_fast.penalties.density import DensityPenalty
from rds_fast.penalties.input_gradient import InputGradientPenalty
from rds_fast.penalties.inputs import Inputs
from rds_fast.penalties.jacobian import JacobianPenalty
from rds_fast.penalties.loss import PenalizedLoss
from rds_fast.penalties.matching import GradientMatchingPenalty
from rds_fast.penalties.shared import SharedForward

RANDOM = torch.Generator().manual_seed(11)
MASKS = {
    "bool": torch.rand(6, 3, 6, 6, generator=RANDOM) < 0.5,
    "of pixels": torch.rand(6, 1, 6, 6, generator=RANDOM) < 0.5,
    "for all samples": torch.rand(6, 6, generator=RANDOM) < 0.5,
    "factors": torch.rand(1, 3, 1, 1, dtype=torch.float64, generator=RANDOM),
}


def masked_norm(output: Tensor, x: Tensor, mask: Tensor, p: float, power: float, target: Tensor | float = 0) -> Tensor:
    (gradient,) = torch.autograd.grad(output.sum(), x, create_graph=True)
    return torch.linalg.vector_norm(((gradient - target) * mask).flatten(1), p, dim=1) ** power


def eager_jacobian(logits: Tensor, x: Tensor, y: Tensor, mask: Tensor) -> Tensor:
    return 0.5 * torch.stack([masked_norm(logit, x, mask, 2.0, 2) for logit in logits.unbind(1)]).sum(0)


def of_the_teacher(x: Tensor, y: Tensor) -> Tensor:
    return torch.autograd.grad(nn.functional.cross_entropy(mlp(seed=4)(x), y, reduction="sum"), x)[0]


PENALTIES: dict[str, tuple[Any, Callable[..., Tensor]]] = {
    "density": (DensityPenalty(), lambda f, x, y, m: masked_norm(torch.logsumexp(f, 1), x, m, 2.0, 1)),
    "cross-entropy": (
        InputGradientPenalty(p=1.0, power=2),
        lambda f, x, y, m: masked_norm(nn.functional.cross_entropy(f, y, reduction="none"), x, m, 1.0, 2),
    ),
    "target logit": (
        InputGradientPenalty(of="target_logit"),
        lambda f, x, y, m: masked_norm(f[range(len(y)), y], x, m, 2.0, 1),
    ),
    "jacobian": (JacobianPenalty(projections=None), eager_jacobian),
    "matching": (
        GradientMatchingPenalty(mlp(seed=4)),
        lambda f, x, y, m: masked_norm(
            nn.functional.cross_entropy(f, y, reduction="none"), x, m, 2.0, 1, of_the_teacher(x, y)
        ),
    ),
}


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS.keys())
@pytest.mark.parametrize("name", PENALTIES)
def test_values_and_gradients(name: str, mask: Tensor) -> None:
    penalty, eager = PENALTIES[name]
    model, (x, y) = mlp(), batch()
    x.requires_grad_()
    truth = eager(model(x), x, y, mask).mean()
    terms = PenalizedLoss(penalty, 0.7)(model, x, y, mask=mask)
    torch.testing.assert_close(terms.penalty, truth, rtol=1e-10, atol=0)
    assert_same_gradients(gradients(penalty(model, x, y, mask=mask), model, x), gradients(truth, model, x))
    torch.testing.assert_close(terms.total, terms.cross_entropy + 0.7 * truth)


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS.keys())
@pytest.mark.parametrize("p", [1.0, 2.0, float("inf")])
def test_the_finite_difference_moves_along_the_masked_gradient(p: float, mask: Tensor) -> None:
    model, x = mlp(), batch()[0]
    fine = DensityPenalty(p=p, method="finite_difference", step_size=1e-6)(model, x, mask=mask)
    torch.testing.assert_close(fine, DensityPenalty(p=p)(model, x, mask=mask), rtol=1e-4, atol=0)


@pytest.mark.parametrize("network", NETWORKS)
def test_a_share_of_the_batch_has_its_own_part_of_the_mask(network: str) -> None:
    model, (x, y) = NETWORKS[network](), batch()
    seen = torch.randperm(6, generator=torch.Generator().manual_seed(5))[:2]
    for mask in MASKS.values():
        generator = torch.Generator().manual_seed(5)
        terms = PenalizedLoss(DensityPenalty(), share=1 / 3, generator=generator)(model, x, y, mask=mask)
        of_seen = mask[seen] if len(mask) == 6 and mask.dim() == 4 else mask
        torch.testing.assert_close(terms.penalty, DensityPenalty()(model, x[seen], mask=of_seen))


def test_right_for_the_right_reasons() -> None:
    """Ross et al.'s own form: the squares of the masked gradient of Σ log p_k, as a penalty of one's own."""

    def explanation(shared: SharedForward) -> Tensor:
        gradient = shared.gradient(shared.logits.log_softmax(1).sum(1))
        return gradient.square().flatten(1).sum(1)

    model, (x, y) = mlp(), batch()
    leaf = x.clone().requires_grad_()
    truth = masked_norm(model(leaf).log_softmax(1).sum(1), leaf, MASKS["bool"], 2.0, 2).mean()
    terms = PenalizedLoss(explanation, 1.0)(model, x, y, mask=MASKS["bool"])
    assert_same_gradients(gradients(terms.penalty, model), gradients(truth, model))


def test_a_mask_does_not_change_the_precision() -> None:
    model, (x, y) = mlp(torch.float32), batch(torch.float32)
    terms = PenalizedLoss(DensityPenalty())(model, x, y, mask=MASKS["factors"])
    assert [term.dtype for term in terms] == [torch.float32] * 4


def test_all_or_nothing() -> None:
    """A mask that is True everywhere changes no bit; nothing at all has penalty 0, with the gradient 0."""
    model, (x, y) = mlp(), batch()
    loss = PenalizedLoss(DensityPenalty())
    assert torch.equal(loss(model, x, y, mask=torch.tensor(True)).penalty, loss(model, x, y).penalty)
    nothing = loss(model, x, y, mask=torch.zeros(6, 1, 6, 6, dtype=torch.bool)).penalty
    assert nothing == 0
    assert all((gradient == 0).all() for gradient in gradients(nothing, model))


def test_the_cotangent_of_float16_is_undone_in_a_masked_gradient() -> None:
    model, (x, y) = mlp(torch.float16), batch(torch.float16)
    shared = SharedForward(model, Inputs.checked(x, mask=MASKS["bool"]), y)
    whole = references.eager_density(mlp(), x.double())
    gradient = shared.gradient("log_density")
    assert gradient.dtype == torch.float32
    assert (gradient[~MASKS["bool"]] == 0).all()
    assert gradient.flatten(1).norm(dim=1).max() < whole.max() * 1.01
    torch.testing.assert_close(shared.gradient_norm("log_density"), gradient.flatten(1).norm(dim=1))


@pytest.mark.parametrize(
    ("mask", "error", "message"),
    [
        (torch.ones(6, 3, 6, 5), ValueError, r"mask has shape \(6, 3, 6, 5\); it must expand to x's, \(6, 3, 6, 6\)"),
        (torch.ones(2, 6, 3, 6, 6), ValueError, r"mask has shape \(2, 6, 3, 6, 6\)"),
        (torch.ones(6, 3, 6, 6, dtype=torch.uint8), TypeError, r"mask of x is torch\.uint8; it must be bool, True"),
        (torch.ones(6, 6, dtype=torch.complex64), TypeError, r"mask of x is torch\.complex64"),
        ([True], TypeError, r"the mask of x is a list; it must be a torch\.Tensor"),
        (torch.ones(6, 6, device="meta"), ValueError, "the mask is on meta and x on cpu; move one to the other's"),
    ],
)
def test_wrong_masks(mask: Any, error: type[Exception], message: str) -> None:
    model, (x, y) = mlp(), batch()
    for call in (PenalizedLoss(DensityPenalty()), DensityPenalty()):
        with pytest.raises(error, match=message):
            call(model, x, y, mask=mask)


def test_a_mask_needs_an_input_gradient() -> None:
    model, (x, y) = mlp(), batch()
    attributions = AttributionPenalty(0.1, path_steps=2, attack_steps=1, bounds=(-9.0, 9.0))
    for penalty, name in ((attributions, "AttributionPenalty"), (lambda shared: shared.loss, "function")):
        with pytest.raises(ValueError, match=f"a mask is given, and {name} penalises no input gradient"):
            PenalizedLoss(penalty)(model, x, y, mask=MASKS["bool"])
    with pytest.raises(ValueError, match="a mask is given, and AttributionPenalty"):
        attributions(model, x, y, mask=MASKS["bool"])
