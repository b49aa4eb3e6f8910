"""Under ``torch.compile`` ours runs uncompiled, between what is compiled, with the values of an uncompiled step."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from penalty_references import batch, cnn, mlp
from torch import Tensor, nn
from torch.nn import functional

import rds_fast
from rds_fast import evaluation

pytestmark = pytest.mark.filterwarnings("ignore")  # the compiler's own

ANYWHERE = (-math.inf, math.inf)
Step = Callable[[nn.Module, Tensor, Tensor], Tensor]

LOSSES: dict[str, Any] = {
    "density": rds_fast.PenalizedLoss(rds_fast.DensityPenalty()),
    "finite difference": rds_fast.PenalizedLoss(rds_fast.DensityPenalty(method="finite_difference")),
    "plain PyTorch": rds_fast.PenalizedLoss(rds_fast.DensityPenalty(), fast=False),
    "input gradient": rds_fast.PenalizedLoss(rds_fast.InputGradientPenalty()),
    "Jacobian": rds_fast.PenalizedLoss(rds_fast.JacobianPenalty()),
    "matching": rds_fast.PenalizedLoss(rds_fast.GradientMatchingPenalty(mlp(seed=3))),
    "share": rds_fast.PenalizedLoss(rds_fast.DensityPenalty(), share=0.5),
    "IG-NORM": rds_fast.PenalizedLoss(
        rds_fast.AttributionPenalty(0.1, path_steps=2, attack_steps=1, bounds=ANYWHERE), 0.5
    ),
    "IG-SUM-NORM": rds_fast.RobustAttributionLoss(0.5, 0.1, path_steps=2, attack_steps=1, bounds=ANYWHERE),
    "adversarial": rds_fast.AdversarialLoss(0.1, steps=1, bounds=ANYWHERE),
}


def _gradient_penalty(model: nn.Module, x: Tensor) -> Tensor:
    x = x.clone().requires_grad_()
    with rds_fast.fast_double_backward():
        scores = model(x)
    (gradient,) = torch.autograd.grad(scores.sum(), x, create_graph=True)
    return gradient.square().flatten(1).sum(1).mean()


def _by_autograd_grad(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    total = LOSSES["density"](model, x, y).total
    for parameter, gradient in zip(model.parameters(), torch.autograd.grad(total, [*model.parameters()]), strict=True):
        parameter.grad = gradient
    return total


def _integrated(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return rds_fast.integrated_gradients(model, x, y, 0.0, steps=2, create_graph=True).square().sum()


def _adversarial(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return functional.cross_entropy(model(evaluation.pgd(model, x, y, 0.1, steps=1, bounds=ANYWHERE)), y)


def _sensitivity(shared: rds_fast.SharedForward) -> Tensor:
    return shared.gradient("target_logit").flatten(1).abs().sum(1)


# What people write around the penalty is compiled: a loss and a forward of their own, and sums with ours.
STEPS: dict[str, Step] = {
    "density_penalty": lambda model, x, y: functional.cross_entropy(model(x), y) + rds_fast.density_penalty(model, x),
    "log_density": lambda model, x, y: 2 * rds_fast.log_density(model, x).mean(),
    "made inside": lambda model, x, y: rds_fast.PenalizedLoss(rds_fast.DensityPenalty(p=1), 0.3)(model, x, y).total,
    "of one's own": lambda model, x, y: rds_fast.PenalizedLoss(_sensitivity, 0.3)(model, x, y).total,
    "fast_double_backward": lambda model, x, y: functional.cross_entropy(model(x), y) + _gradient_penalty(model, x),
    "integrated_gradients": _integrated,
    "pgd": _adversarial,
}


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def steps(step: Callable[[Tensor, Tensor], Tensor], model: nn.Module) -> list[Tensor]:
    """Two steps' losses, and the gradients and buffers that they leave."""
    torch.manual_seed(0)
    x, y = batch()
    losses = [step(x, y).detach() for _ in range(2)]
    gradients = [parameter.grad for parameter in model.parameters()]
    assert all(gradient is not None for gradient in gradients)
    return [*losses, *gradients, *model.buffers()]  # type: ignore[list-item]  # as asserted


def assert_as_uncompiled(step: Step, make: Callable[[], nn.Module], **options: Any) -> None:
    plain, model = make(), make()
    truth = steps(lambda x, y: step(plain, x, y), plain)
    compiled = torch.compile(lambda x, y: step(model, x, y), **options)
    for ours, expected in zip(steps(compiled, model), truth, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-11)


def backward(loss: Step) -> Step:
    def step(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        total = loss(model, x, y)
        total.backward()
        return total

    return step


def train_mode() -> nn.Module:
    model = cnn(training=True)
    model[4].momentum = 0.1  # the compiler cannot trace a cumulative average
    return model


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES.keys())
def test_losses(loss: Any) -> None:
    assert_as_uncompiled(backward(lambda model, x, y: loss(model, x, y).total), train_mode, backend="aot_eager")


@pytest.mark.parametrize("step", STEPS.values(), ids=STEPS.keys())
def test_functions(step: Step) -> None:
    assert_as_uncompiled(backward(step), train_mode, backend="aot_eager")


def test_the_gradient_taken_inside() -> None:
    assert_as_uncompiled(_by_autograd_grad, train_mode, backend="eager")


def test_a_fused_model_under_autocast_and_its_optimiser() -> None:
    def make() -> nn.Module:
        return rds_fast.nn.fuse(train_mode().float())

    def step(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            terms = LOSSES["density"](model, x.float(), y)
        terms.total.backward()
        optimizer.step()
        return terms.total

    assert_as_uncompiled(step, make, backend="aot_eager")


def test_weights_of_the_step() -> None:
    def step(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        weight = rds_fast.PenaltyRatio(0.1)
        loss = rds_fast.PenalizedLoss(rds_fast.DensityPenalty(), weight, every=2)
        first = loss(model, x, y, step=0)
        weight.update(first, y)
        total = first.total + loss(model, x, y, step=1).total + loss(model, x, y, step=2).total
        total.backward()
        return total

    assert_as_uncompiled(step, mlp, backend="aot_eager")


def test_machine_code() -> None:
    pytest.importorskip("torch._inductor")
    if not torch._inductor.cpp_builder.get_cpp_compiler():
        pytest.skip("needs a C++ compiler")
    assert_as_uncompiled(backward(lambda model, x, y: 2 * rds_fast.density_penalty(model, x)), mlp)


@pytest.mark.parametrize("step", STEPS.values(), ids=STEPS.keys())
def test_one_graph_is_refused(step: Step) -> None:
    x, y = batch()
    with pytest.raises(torch._dynamo.exc.Unsupported, match=r"graph of derivatives.*Leave fullgraph=True out"):
        torch.compile(step, backend="eager", fullgraph=True)(mlp(), x, y)


def test_operations_compile_as_one_graph() -> None:
    def step(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        logits = model(x)
        cross_entropy, log_sum_exp = rds_fast.cross_entropy_with_logsumexp(logits, y)
        norm = rds_fast.gradient_norm(logits)
        return (cross_entropy + log_sum_exp + norm + rds_fast.logsumexp(logits)).sum()

    model, (x, y) = train_mode(), batch()
    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(model, x, y), step(model, x, y))


def test_only_the_block_pauses_the_compiler() -> None:
    """What comes after ``fast_double_backward`` is compiled again, also where an exception has left it."""
    graphs = []

    def backend(graph: Any, _: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    def inside(x: Tensor) -> Tensor:
        return x.sin()

    def after(x: Tensor) -> Tensor:
        return x.cos()

    def step(x: Tensor) -> Tensor:
        try:
            with rds_fast.fast_double_backward():
                x = inside(x)
                raise ValueError
        except ValueError:
            return after(x)

    torch.compile(step, backend=backend)(torch.ones(3))
    assert [node.target for graph in graphs for node in graph.graph.nodes if node.op == "call_method"] == ["cos"]


def test_importing_does_not_import_the_compiler() -> None:
    """It takes a second, in processes that compile nothing."""
    code = "import sys, rds_fast; print('torch._dynamo' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
