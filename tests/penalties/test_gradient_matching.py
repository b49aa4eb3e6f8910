"""Gradient matching against eager float64, and the teacher, which a step must leave as it was."""

from __future__ import annotations

import copy

import penalty_references as references
import pytest
import torch
from penalty_references import CLASSES, NETWORKS, assert_same_gradients, batch, cnn, gradients, mlp
from torch import Tensor, nn

from bench.counting import Traffic
from rds_fast.penalties.density import DensityPenalty
from rds_fast.penalties.input_gradient import InputGradientPenalty
from rds_fast.penalties.loss import PenalizedLoss
from rds_fast.penalties.matching import GradientMatchingPenalty
from rds_fast.penalties.shared import SharedForward

OF = {
    "cross_entropy": lambda logits, y: nn.functional.cross_entropy(logits, y, reduction="none"),
    "target_logit": lambda logits, y: logits[range(len(y)), y],
    "log_density": lambda logits, y: torch.logsumexp(logits, 1),
}


def eager_gradient(model: nn.Module, x: Tensor, y: Tensor, of: str, *, create_graph: bool) -> Tensor:
    return torch.autograd.grad(OF[of](model(x), y).sum(), x, create_graph=create_graph)[0]


def eager_matching(
    model: nn.Module, teacher: nn.Module, x: Tensor, y: Tensor, of: str, p: float, power: float
) -> Tensor:
    """(N,); the teacher in the mode it is in."""
    target = eager_gradient(teacher, x.detach().requires_grad_(), y, of, create_graph=False)
    difference = eager_gradient(model, x, y, of, create_graph=True) - target
    return torch.linalg.vector_norm(difference.flatten(1), p, dim=1) ** power


@pytest.mark.parametrize(("p", "power", "fast"), [(2.0, 2, True), (2.0, 1, True), (1.0, 1, True), (2.0, 2, False)])
@pytest.mark.parametrize("of", OF)
@pytest.mark.parametrize("network", NETWORKS)
def test_gradients(network: str, of: str, p: float, power: float, fast: bool) -> None:
    model, (x, y) = NETWORKS[network](), batch()
    x.requires_grad_()
    teacher = cnn(training=False, activation=nn.Tanh)
    truth = eager_matching(model, teacher, x, y, of, p, power)
    cross_entropy = nn.functional.cross_entropy(model(x), y, reduction="none", label_smoothing=0.2)
    expected = gradients(truth.mean(), model, x, retain_graph=True)
    expected_total = gradients(cross_entropy.mean() + 0.7 * truth.mean(), model, x)
    penalty = GradientMatchingPenalty(teacher, p=p, power=power, of=of, fast=fast)
    ours = penalty.per_sample(SharedForward(model, x, y))
    torch.testing.assert_close(ours, truth, rtol=1e-10, atol=0)
    given = penalty.per_sample(SharedForward.of_logits(model(x), x, y))
    for mean in (ours.mean(), penalty(model, x, y), given.mean()):
        assert_same_gradients(gradients(mean, model, x), expected)
    terms = PenalizedLoss(penalty, 0.7, label_smoothing=0.2)(model, x, y)
    torch.testing.assert_close(terms.cross_entropy, cross_entropy.mean())
    total = terms.total
    assert_same_gradients(gradients(total, model, x), expected_total)
    unsmoothed = PenalizedLoss(penalty)(model, x, y)
    torch.testing.assert_close(unsmoothed.penalty, truth.mean())


def test_a_teacher_without_gradient_leaves_the_input_gradient_penalty() -> None:
    model, (x, y) = mlp(), batch()
    teacher = mlp(seed=4)
    nn.init.zeros_(teacher[1].weight)  # no logit depends on x, but there is a path
    ours = GradientMatchingPenalty(teacher)(model, x, y)
    assert_same_gradients(gradients(ours, model), gradients(InputGradientPenalty()(model, x, y), model))


def test_a_model_that_is_its_own_teacher_has_nothing_to_learn() -> None:
    """But rounding, where two forwards round differently; at exactly 0, the gradient is 0, not NaN."""
    model, (x, y) = cnn(training=False), batch()
    assert GradientMatchingPenalty(model, power=1)(model, x, y) < 1e-14
    linear = nn.Sequential(nn.Flatten(), nn.Linear(3 * 6 * 6, CLASSES)).double()
    ours = GradientMatchingPenalty(linear, power=1, of="target_logit")(linear, x, y)
    assert ours == 0
    assert all((gradient == 0).all() for gradient in gradients(ours, linear))


def test_ignored_rows_have_no_penalty() -> None:
    model, teacher, (x, y) = mlp(), mlp(seed=4), batch()
    y[[2, 4]] = -100
    for of in ("cross_entropy", "target_logit"):
        assert (GradientMatchingPenalty(teacher, of=of).per_sample(SharedForward(model, x, y)) == 0).tolist() == [
            row in (2, 4) for row in range(6)
        ]


@pytest.mark.parametrize("failing", [False, True])
def test_the_teacher_is_untouched(failing: bool) -> None:
    """In train mode in part, with dropout and running statistics, also where the student fails."""
    student, (x, y) = mlp(), batch()
    teacher = nn.Sequential(nn.Dropout(0.5), cnn(training=True))
    teacher[1][1].eval()
    modes = [module.training for module in teacher.modules()]
    before = copy.deepcopy(teacher.state_dict())
    random_state = torch.get_rng_state()
    penalty = GradientMatchingPenalty(teacher)
    if failing:
        with pytest.raises(ValueError, match="the logits have shape"):
            penalty(nn.Flatten(0), x, y)
    else:
        terms = PenalizedLoss(penalty)(student, x, y)
        terms.total.backward()
        in_eval_mode = copy.deepcopy(teacher).eval()
        truth = eager_matching(student, in_eval_mode, x.clone().requires_grad_(), y, "cross_entropy", 2.0, 1)
        torch.testing.assert_close(terms.penalty, truth.mean())
    assert [module.training for module in teacher.modules()] == modes
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())
    assert all(parameter.grad is None and parameter.requires_grad for parameter in teacher.parameters())
    assert torch.equal(torch.get_rng_state(), random_state)


def test_a_function_may_teach() -> None:
    student, teacher, (x, y) = mlp(), mlp(seed=4), batch()
    by_function = GradientMatchingPenalty(lambda x: teacher(x))(student, x, y)
    assert torch.equal(by_function, GradientMatchingPenalty(teacher)(student, x, y))


def test_training_draws_the_gradients_together() -> None:
    teacher, (x, y) = mlp(torch.float32, seed=4), batch(torch.float32, samples=32)
    penalties = []
    for weight in (0.0, 20.0):
        student = mlp(torch.float32)
        loss = PenalizedLoss(GradientMatchingPenalty(teacher, of="target_logit"), weight)
        optimizer = torch.optim.Adam(student.parameters(), 1e-2)
        for _ in range(60):
            optimizer.zero_grad()
            loss(student, x, y).total.backward()
            optimizer.step()
        penalties.append(loss(student, x, y).penalty.item())
    assert penalties[1] < 0.3 * penalties[0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype: torch.dtype) -> None:
    """Both gradients under the same autocast; in float16 both with the cotangent, undone in both."""
    student, teacher, (x, y) = mlp(torch.float32), mlp(torch.float32, seed=4), batch(torch.float32, samples=16)
    truth = eager_matching(mlp(), mlp(seed=4), x.double().requires_grad_(), y, "cross_entropy", 2.0, 1).mean()
    with torch.autocast("cpu", dtype=dtype):
        terms = PenalizedLoss(GradientMatchingPenalty(teacher))(student, x, y)
    assert terms.penalty.dtype == torch.float32
    assert terms.penalty.item() == pytest.approx(truth.item(), rel=0.02)


def test_float16_model() -> None:
    student, teacher, (x, y) = mlp(torch.float16), mlp(torch.float16, seed=4), batch(torch.float16, samples=16)
    penalty = GradientMatchingPenalty(teacher)(student, x, y)
    twins = (copy.deepcopy(model).double() for model in (student, teacher))
    truth = eager_matching(*twins, x.double().requires_grad_(), y, "cross_entropy", 2.0, 1).mean()
    assert penalty.item() == pytest.approx(truth.item(), rel=0.02)


def test_cost() -> None:
    """The teacher's forward and its backward to x, without weight gradients: twice a forward more than a penalty."""
    layers = nn.Conv2d(3, 4, 3), nn.Softplus(), nn.Conv2d(4, 4, 3), nn.Flatten(), nn.Linear(64, CLASSES)
    student = nn.Sequential(*layers).to("meta")
    teacher = copy.deepcopy(student)
    x, y = torch.empty(6, 3, 8, 8, device="meta"), torch.empty(6, dtype=torch.int64, device="meta")
    flops = []
    for run in (
        lambda: student(x),
        lambda: PenalizedLoss(DensityPenalty())(student, x, y).total.backward(),
        lambda: PenalizedLoss(GradientMatchingPenalty(teacher))(student, x, y).total.backward(),
    ):
        with Traffic() as traffic:
            run()
        flops.append(traffic.total.flops)
    assert flops[2] - flops[1] == 2 * flops[0]


def test_repr_does_not_print_the_teacher() -> None:
    assert repr(GradientMatchingPenalty(references.mlp(), power=1)).startswith("GradientMatchingPenalty(p=2.0, power=1")
