"""Models that ``torch.jit`` made: what takes one derivative works, at every call; what takes two is refused."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from penalty_references import batch, cnn, eager_density, gradients, mlp
from test_penalty_errors import CALLS
from torch import Tensor, nn

from rds_fast import AdversarialLoss, DensityPenalty, PenalizedLoss, evaluation, integrated_gradients, log_density

pytestmark = pytest.mark.filterwarnings("ignore")  # torch.jit is deprecated; and tracing says what it makes constant

ANYWHERE = (-10.0, 10.0)


def traced(model: nn.Module) -> nn.Module:
    result = torch.jit.trace(copy.deepcopy(model), batch()[0], check_trace=False)
    result.load_state_dict(model.state_dict())  # for which the model ran, and moved its running statistics
    return result


MAKERS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "scripted": lambda model: torch.jit.script(copy.deepcopy(model)),
    "traced": traced,
    "inside": lambda model: nn.Sequential(torch.jit.script(copy.deepcopy(model))).train(model.training),
}
every_maker = pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS.keys())


def model_in_train_mode() -> nn.Module:
    model = cnn(training=True, activation=nn.Tanh)
    model[4].momentum = 0.1  # tracing would make the cumulative average's count a constant
    return model


@pytest.mark.parametrize("call", [c for name, c in CALLS.items() if name != "finite_difference"])
def test_exact_penalties_refuse_them(call: Callable[..., object]) -> None:
    x, y = batch()
    frozen = torch.jit.freeze(torch.jit.script(mlp().eval()))
    for model in (*(make(mlp()) for make in MAKERS.values()), frozen, torch.jit.trace(mlp().forward, x)):
        with pytest.raises(RuntimeError, match=r"\(torch\.jit\), whose second derivatives.*pass the Python module"):
            call(model, x, y)


FIRST_ORDER: dict[str, Callable[[nn.Module, Tensor, Tensor], Tensor]] = {
    "finite difference": lambda model, x, y: (
        PenalizedLoss(DensityPenalty(method="finite_difference"), 0.5)(model, x, y).total
    ),
    "adversarial": lambda model, x, y: (
        AdversarialLoss(0.1, steps=2, random_start=False, bounds=ANYWHERE)(model, x, y).total
    ),
    "log_density": lambda model, x, y: log_density(model, x).mean(),
    "pgd": lambda model, x, y: model(
        evaluation.pgd(model, x, y, 0.1, steps=2, random_start=False, bounds=ANYWHERE)
    ).sum(),
    "integrated_gradients": lambda model, x, y: (
        model(x) + integrated_gradients(model, x, y, 0.0, steps=2).flatten(1)[:, :1]
    ).sum(),
}


@every_maker
@pytest.mark.parametrize("call", FIRST_ORDER.values(), ids=FIRST_ORDER.keys())
def test_first_order_is_that_of_the_python_model(
    call: Callable[[nn.Module, Tensor, Tensor], Tensor], make: Callable[[nn.Module], nn.Module]
) -> None:
    """Several calls: torch.jit compiles anew once it has seen what it is called with. Running statistics move once."""
    plain, (x, y) = model_in_train_mode(), batch()
    model = make(plain)
    for _ in range(3):
        ours, truth = call(model, x, y), call(plain, x, y)
        torch.testing.assert_close(ours, truth)
        torch.testing.assert_close(gradients(ours, model), gradients(truth, plain))
        torch.testing.assert_close(list(model.buffers()), list(plain.buffers()))


def test_the_attribution_attack_refuses_them() -> None:
    x, y = batch()
    for model in (torch.jit.script(mlp()), torch.compile(mlp(), backend="eager")):
        with pytest.raises(RuntimeError, match="needs its second derivatives and replaces its ReLUs"):
            evaluation.attribution_attack(model, x, y, 0.1, k=2, bounds=ANYWHERE)


class SeveralOperations(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(x) + 2 * torch.tanh(x)


def test_why_exact_penalties_refuse_them() -> None:
    """PyTorch's fault, where torch.jit takes batch norm and what follows as one. Without it they could be let in."""
    plain, (x, _) = cnn(training=True, activation=SeveralOperations), batch()
    model = traced(plain)
    for _ in range(3):
        found = gradients(eager_density(model, x).mean(), model)
    truth = gradients(eager_density(plain, x).mean(), plain)
    assert max((one - other).abs().max() for one, other in zip(found, truth, strict=True)) > 1e-3
