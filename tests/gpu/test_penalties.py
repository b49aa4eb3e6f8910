"""The penalties on a CUDA device: against float64 on the CPU, without one synchronisation."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import rds_fast
from rds_fast.penalties.density import DensityPenalty, density_penalty
from rds_fast.penalties.group_dro import GroupDRO
from rds_fast.penalties.input_gradient import InputGradientPenalty
from rds_fast.penalties.loss import LossTerms, PenalizedLoss
from rds_fast.penalties.losses import BinaryCrossEntropy
from rds_fast.penalties.shared import SharedForward

pytestmark = pytest.mark.gpu

DEVICE = "cuda"
Context = Callable[[], AbstractContextManager[None]]
CLASSES = 10
PENALTIES = {
    "density": DensityPenalty(),
    "density, p = 1, power 2": DensityPenalty(p=1.0, power=2),
    "density, p = inf": DensityPenalty(p=float("inf")),
    "cross-entropy": InputGradientPenalty(),
    "target logit": InputGradientPenalty(of="target_logit"),
}
FINITE_DIFFERENCE = DensityPenalty(method="finite_difference")

# The relative error of the gradient of all parameters that the layers' own rounding may cause: 24, 11 and 8 bits of
# significand, with margins over what the same test shows on the CPU (at most 1e-6, 0.0012 and 0.004).
TOLERANCE = {torch.float32: 1e-4, torch.float16: 0.005, torch.bfloat16: 0.02}


def network(dropout: float = 0.0) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.Softplus(),
        nn.Conv2d(8, 16, 3, stride=2),
        nn.BatchNorm2d(16),
        nn.Softplus(),
        nn.Dropout(dropout),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(16, CLASSES),
    ).to(DEVICE)


def batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(32, 3, 16, 16, generator=generator)
    return x.to(DEVICE), torch.randint(CLASSES, (32,), generator=generator).to(DEVICE)


def gradient_vector(loss: Tensor, model: nn.Module) -> Tensor:
    return torch.cat([g.flatten().double().cpu() for g in torch.autograd.grad(loss, list(model.parameters()))])


def truth(penalty: Any, model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """The gradient vector of cross-entropy + 0.5 penalty in eager float64 on the CPU."""
    model, x, y = copy.deepcopy(model).double().cpu(), x.double().cpu().requires_grad_(), y.cpu()
    logits = model(x)
    cross_entropy = nn.functional.cross_entropy(logits, y, reduction="none")
    if isinstance(penalty, DensityPenalty):
        output = torch.logsumexp(logits, 1)
    else:
        output = cross_entropy if penalty.of == "cross_entropy" else logits.gather(1, y[:, None])
    (gradient,) = torch.autograd.grad(output.sum(), x, create_graph=True)
    norms = torch.linalg.vector_norm(gradient.flatten(1), penalty.p, dim=1) ** penalty.power
    return gradient_vector(cross_entropy.mean() + 0.5 * norms.mean(), model)


def relative_error(ours: Tensor, expected: Tensor) -> float:
    return ((ours - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("name", PENALTIES)
def test_gradient_of_the_total(name: str, dtype: torch.dtype, training: bool) -> None:
    model, (x, y) = network().train(training), batch()
    expected = truth(PENALTIES[name], model, x, y)
    autocast = nullcontext() if dtype == torch.float32 else torch.autocast(DEVICE, dtype=dtype)
    with autocast:
        terms = PenalizedLoss(PENALTIES[name], 0.5)(model, x, y)
    assert terms.logits.dtype == dtype
    assert terms.total.dtype == torch.float32
    scale = 2.0**12 if dtype == torch.float16 else 1.0  # as a gradient scaler would
    assert relative_error(gradient_vector(scale * terms.total, model) / scale, expected) < TOLERANCE[dtype]


class Operations(TorchDispatchMode):
    """The fused operations that run, each with the backend that it names."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[tuple[str, str]] = set()

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), keywords: Any = None) -> Any:
        if function.namespace == "rds_fast":
            self.seen.add((function._opname, arguments[-1]))
        return function(*arguments, **(keywords or {}))


class Sine(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.sin()


@pytest.mark.parametrize("backend", ["native", "triton"])
def test_the_forward_s_backend_runs_every_pass(backend: str) -> None:
    """The backward of a CUDA operation runs on another thread, where the choice has to follow."""
    if backend not in rds_fast.backends.available(DEVICE):
        pytest.skip(f"{backend}: {rds_fast.backends.failure(backend, DEVICE)}")
    model, (x, y) = network(), batch()
    if backend == "native":  # the layers' operations refuse it on a GPU, where their kernels are Triton's
        model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, 32), Sine(), nn.Linear(32, CLASSES)).to(DEVICE)
    expected = truth(DensityPenalty(), model, x, y)
    with Operations() as operations:
        with rds_fast.use_backend(backend):
            total = PenalizedLoss(DensityPenalty(), 0.5)(model, x, y).total
        gradient = gradient_vector(total, model)
    assert relative_error(gradient, expected) < TOLERANCE[torch.float32]
    assert {used for _, used in operations.seen} == {backend}
    in_forward = {name for name, _ in operations.seen}
    assert in_forward >= {"cross_entropy", "logsumexp_backward", "gradient_norm"}


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("name", [*PENALTIES, "finite difference"])
def test_a_step_reads_no_device_value(name: str, dtype: torch.dtype, without_synchronisation: Context) -> None:
    model, (x, y) = network(dropout=0.1), batch()
    penalty = PENALTIES.get(name, FINITE_DIFFERENCE)
    loss = PenalizedLoss(penalty, lambda step: 0.5)

    def step() -> None:
        with nullcontext() if dtype == torch.float32 else torch.autocast(DEVICE, dtype=dtype):
            total = loss(model, x, y, step=3).total
        total.backward()
        penalty(model, x, y).backward()

    step()  # compiles kernels and chooses algorithms, which may wait
    torch.cuda.synchronize()
    with without_synchronisation():
        step()
        with pytest.raises(RuntimeError):  # the guard is up
            x.sum().item()


def test_weights_and_masks_read_no_device_value(without_synchronisation: Context) -> None:
    """Nor do group DRO, a binary loss, a share of the batch and several inputs; the values are the CPU's."""
    model, (x, y) = network(), batch()
    labels, groups, mask = nn.functional.one_hot(y, CLASSES).float(), y % 3, x > 0
    criterion = PenalizedLoss(DensityPenalty(), 0.5)
    binary = PenalizedLoss(InputGradientPenalty(), 0.5, loss=BinaryCrossEntropy(), share=0.5)
    several = PenalizedLoss(DensityPenalty(), 0.5, loss=BinaryCrossEntropy(), with_respect_to="x")

    def step(dro: GroupDRO, model: nn.Module, *tensors: Tensor) -> LossTerms:
        x, y, labels, groups, mask = tensors
        terms = criterion(model, x, y, mask=mask, sample_weight=dro(groups))
        terms.total.backward()
        dro.update(terms, y, groups)
        binary(model, x, labels, sample_weight=dro(groups)).total.backward()
        several(lambda x, other: model(x + other), {"x": x, "other": x}, labels).total.backward()
        return terms

    tensors = (x, y, labels, groups, mask)
    expected_dro, ours_dro = GroupDRO([5, 3, 4], adjustment=1.0), GroupDRO([5, 3, 4], adjustment=1.0)
    expected = step(expected_dro, copy.deepcopy(model).cpu(), *(tensor.cpu() for tensor in tensors))
    step(GroupDRO([5, 3, 4]), copy.deepcopy(model), *tensors)  # compiles kernels and chooses algorithms, which may wait
    torch.cuda.synchronize()
    with without_synchronisation():
        terms = step(ours_dro, model, *tensors)
    for term, value in zip(terms[:3], expected[:3], strict=True):
        torch.testing.assert_close(term.cpu(), value, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(ours_dro.weights.cpu(), expected_dro.weights, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("of", ["cross_entropy", "target_logit"])
def test_ignored_rows_have_no_penalty(of: str, without_synchronisation: Context) -> None:
    """As on the CPU, with no assertion of the device and no value read from it."""
    model, (x, y) = network().eval(), batch()
    penalty = InputGradientPenalty(of=of, power=1)
    expected = penalty.per_sample(SharedForward(model, x, y))
    ignored = torch.arange(len(y), device=DEVICE) % 3 == 0
    y = torch.where(ignored, -100, y)
    penalty.per_sample(SharedForward(model, x, y))  # compiles kernels and chooses algorithms, which may wait
    torch.cuda.synchronize()
    with without_synchronisation():
        ours = penalty.per_sample(SharedForward(model, x, y))
    torch.testing.assert_close(ours, expected.masked_fill(ignored, 0.0))


def test_gradient_scaler() -> None:
    model, (x, y) = network(), batch()
    expected = truth(DensityPenalty(), model, x, y)
    before = torch.cat([parameter.detach().flatten() for parameter in model.parameters()])
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    scaler = torch.amp.GradScaler(DEVICE, init_scale=2.0**12)
    with torch.autocast(DEVICE, dtype=torch.float16):
        total = PenalizedLoss(DensityPenalty(), 0.5)(model, x, y).total
    scaler.scale(total).backward()
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 2.0**12  # nothing overflowed
    after = torch.cat([parameter.detach().flatten() for parameter in model.parameters()])
    assert relative_error((before - after).double().cpu(), expected) < TOLERANCE[torch.float16]


def test_finite_difference_draws_the_same_random_numbers() -> None:
    """On the device's generator as well, which ends as after one forward."""
    model, (x, _) = network(dropout=0.5).double(), batch()
    x = x.double()
    torch.manual_seed(5)
    exact = density_penalty(model, x)
    after_one_forward = torch.cuda.get_rng_state()
    torch.manual_seed(5)
    ours = density_penalty(model, x, method="finite_difference", step_size=1e-6)
    assert torch.equal(torch.cuda.get_rng_state(), after_one_forward)
    torch.testing.assert_close(ours, exact, rtol=1e-4, atol=0)


def test_finite_difference_in_float32() -> None:
    """Value in float32 against float64 on the CPU, at the default step; under autocast it is the same value."""
    model, (x, _) = network().eval(), batch()
    expected = density_penalty(copy.deepcopy(model).double().cpu(), x.double().cpu(), method="finite_difference")
    ours = density_penalty(model, x, method="finite_difference")
    assert abs(ours.item() / expected.item() - 1) < 5e-3
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        torch.testing.assert_close(density_penalty(model, x, method="finite_difference"), ours, rtol=5e-3, atol=0)


def test_labels_on_another_device() -> None:
    model, (x, y) = network(), batch()
    with pytest.raises(ValueError, match=r"y is on cpu and the logits on cuda:0; move one to the other's device"):
        InputGradientPenalty(of="target_logit")(model, x, y.cpu())
    with pytest.raises(ValueError, match="target is on cpu and logits on cuda:0"):
        PenalizedLoss(DensityPenalty())(model, x, y.cpu())
