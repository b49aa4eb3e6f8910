"""Each wrong argument's error: what was given, what is needed, what to do. And no false alarms."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from penalty_references import CLASSES, NETWORKS, batch, mlp
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx

from rds_fast.penalties.attribution import AttributionPenalty, RobustAttributionLoss
from rds_fast.penalties.density import DensityPenalty, density_penalty, density_penalty_from_logits, log_density
from rds_fast.penalties.input_gradient import InputGradientPenalty
from rds_fast.penalties.jacobian import JacobianPenalty
from rds_fast.penalties.loss import PenalizedLoss
from rds_fast.penalties.matching import GradientMatchingPenalty
from rds_fast.penalties.shared import Penalty, SharedForward

Call = Callable[[Any, Any, Any], Any]

# Every way to a penalty that runs the model; each must refuse what the others refuse.
CALLS: dict[str, Call] = {
    "density_penalty": lambda model, x, y: density_penalty(model, x),
    "finite_difference": lambda model, x, y: density_penalty(model, x, method="finite_difference"),
    "DensityPenalty": DensityPenalty(),
    "InputGradientPenalty": InputGradientPenalty(),
    "target_logit": InputGradientPenalty(of="target_logit"),
    "JacobianPenalty": JacobianPenalty(),
    "GradientMatchingPenalty": GradientMatchingPenalty(mlp(seed=3)),
    "PenalizedLoss": PenalizedLoss(DensityPenalty()),
    "AttributionPenalty": AttributionPenalty(0.1, path_steps=2, attack_steps=1, bounds=(-math.inf, math.inf)),
    "RobustAttributionLoss": RobustAttributionLoss(
        0.5, 0.1, path_steps=2, attack_steps=1, bounds=(-math.inf, math.inf)
    ),
}
every_call = pytest.mark.parametrize("call", CALLS.values(), ids=CALLS.keys())


class Ending(nn.Module):
    """A network whose output goes through a function."""

    def __init__(self, function: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.network = NETWORKS["mlp"]()
        self.function = function

    def forward(self, x: Tensor) -> Any:
        return self.function(self.network(x))


@every_call
def test_x(call: Call) -> None:
    model, (x, y) = NETWORKS["mlp"](), batch()
    with pytest.raises(TypeError, match=r"x is a list; it must be a torch\.Tensor of shape \(N, \.\.\.\)"):
        call(model, x.tolist(), y)
    with pytest.raises(TypeError, match=r"x is torch\.uint8, which has no gradient; it must be floating point.*/ 255"):
        call(model, x.to(torch.uint8), y)
    with pytest.raises(ValueError, match=r"x has no dimension; it must have shape \(N, \.\.\.\), one sample a row"):
        call(model, torch.tensor(1.0), y)
    with torch.inference_mode():
        inference_x = x + 1
    with pytest.raises(RuntimeError, match=r"x was made in torch\.inference_mode.*make it outside, or pass x\.clone"):
        call(model, inference_x, y)


@every_call
def test_gradients_disabled(call: Call) -> None:
    model, (x, y) = NETWORKS["mlp"](), batch()
    message = r"gradients disabled \(torch\.no_grad\), and it needs the gradient.*call it under torch\.enable_grad"
    with torch.no_grad(), pytest.raises(RuntimeError, match=message):
        call(model, x, y)
    message = r"in torch\.inference_mode, and it needs the gradient.*call it outside"
    with torch.inference_mode(), torch.enable_grad(), pytest.raises(RuntimeError, match=message):
        call(model, x, y)  # enable_grad does not leave inference mode
    with torch.no_grad(), torch.enable_grad():
        call(model, x, y)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch.func.jvp's own imports
@every_call
def test_inside_torch_func(call: Call) -> None:
    """With respect to the parameters, to x, and in forward mode; a batch of penalties."""
    model, (x, y) = NETWORKS["mlp"](), batch()
    parameters = dict(model.named_parameters())

    def scalar(x: Tensor, parameters: dict[str, Tensor] = parameters) -> Tensor:
        result = call(lambda x: torch.func.functional_call(model, parameters, (x,)), x, y)
        return result if isinstance(result, Tensor) else result.total

    message = r"inside a transformation of torch\.func .*does not support.*by autograd too: penalty\.backward\(\), or"
    for transformed in (
        lambda: torch.func.grad(lambda parameters: scalar(x, parameters))(parameters),
        lambda: torch.func.grad(scalar)(x),
        lambda: torch.func.jvp(scalar, (x,), (x,)),
        lambda: torch.func.vmap(scalar)(x[None]),
    ):
        with pytest.raises(RuntimeError, match=message):
            transformed()
    assert scalar(x).requires_grad  # and outside it works


@every_call
@pytest.mark.parametrize("detach", ["all", "no_grad", "x", "integers"])
def test_no_gradient_path(call: Call, detach: str) -> None:
    """Logits that require no gradient at all, and logits that require the parameters' alone."""
    network, (x, y) = NETWORKS["mlp"](), batch()
    model = {
        "all": lambda x: network(x).detach(),
        "no_grad": torch.no_grad()(network),
        "x": lambda x: network(x.detach()),
        "integers": lambda x: network(x.long().double()),
    }[detach]
    message = r"no gradient path from x to the logits, and the penalty needs one; look for torch\.no_grad, \.detach"
    with pytest.raises(RuntimeError, match=message):
        call(model, x, y)


@every_call
def test_model(call: Call) -> None:
    message = r"the model is {}; it must be a callable that maps x \(N, \.\.\.\) to logits \(N, C\), such as a"
    for model, found in ((None, "a NoneType"), ({}, "a dict"), (nn.Linear, "the class Linear")):
        with pytest.raises(TypeError, match=message.format(found)):
            call(model, *batch())


@every_call
def test_logits(call: Call) -> None:
    x, y = batch()
    with pytest.raises(TypeError, match=r"returned a tuple; a penalty needs one tensor of logits \(N, C\)\. Wrap"):
        call(Ending(lambda logits: (logits, logits)), x, y)
    with pytest.raises(TypeError, match=r"the logits are torch\.int64; they must be floating point.*before argmax"):
        call(Ending(lambda logits: logits.argmax(1, keepdim=True)), x, y)
    message = r"logits have shape {} for x of shape \(6, 3, 6, 6\); they must be \(N, C\).*6 samples\. Pool or flatten"
    with pytest.raises(ValueError, match=message.format(r"\(6, 5, 1\)")):
        call(Ending(lambda logits: logits.unsqueeze(2)), x, y)
    with pytest.raises(ValueError, match=message.format(r"\(6,\)")):
        call(Ending(lambda logits: logits.sum(1)), x, y)
    with pytest.raises(ValueError, match=message.format(r"\(3, 10\)")):
        call(Ending(lambda logits: logits.reshape(3, 10)), x, y)


@pytest.mark.parametrize(
    "normalise",
    [
        nn.LogSoftmax(1),
        nn.LogSoftmax(-1),
        lambda logits: torch.log_softmax(logits, 1).float(),
        lambda logits: torch.log_softmax(logits, 1).unsqueeze(2).flatten(1).clone(),
        lambda logits: logits - logits.logsumexp(1, keepdim=True),
        lambda logits: logits - logits.logsumexp((-1,), keepdim=True),
        lambda logits: logits.softmax(1).log(),
        lambda logits: logits.softmax(-1).view(6, 5, 1).clone().log().flatten(1).float(),
        lambda logits: torch.log_softmax(logits.unsqueeze(2), 1).flatten(1),
    ],
)
def test_log_softmax(normalise: Callable[[Tensor], Tensor]) -> None:
    """The penalty would be zero for ever. Of the cross-entropy and the target's logit it is not: those go through."""
    model, (x, y) = Ending(normalise), batch()
    x = x.requires_grad_()
    calls = [
        *(CALLS[name] for name in ("density_penalty", "finite_difference", "DensityPenalty", "PenalizedLoss")),
        GradientMatchingPenalty(mlp(), of="log_density"),
        GradientMatchingPenalty(model, of="log_density"),
        lambda model, x, y: density_penalty_from_logits(model(x), x),
        lambda model, x, y: log_density(model, x),
    ]
    message = "the model ends in log-softmax: .* would be identically zero; return the logits before the log-softmax"
    for call in calls:
        with pytest.raises(ValueError, match=message):
            call(model, x, y)
    for of in ("cross_entropy", "target_logit"):
        assert InputGradientPenalty(of=of)(model, x, y) > 0


WEIGHTS = torch.arange(1.0, 11.0)


class LogSoftmax(torch.autograd.Function):
    """A Function of that name, whose node is named like PyTorch's but for the number: f ↦ 2 f."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor) -> Tensor:
        return 2.0 * logits

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return 2.0 * gradient


@pytest.mark.parametrize(
    "function",
    [
        lambda logits: torch.log_softmax(logits, 0),  # over the samples: not a density's normalisation
        lambda logits: torch.log_softmax(logits, -2),
        lambda logits: torch.log_softmax(logits.view(2, 3, 5), 1).view(6, 5),  # over three samples
        lambda logits: torch.log_softmax(logits, 1) * 2.0,
        lambda logits: logits.softmax(0).log(),
        lambda logits: logits.softmax(1).log2(),  # log₂ p = log p / log 2: the log-sum-exp of it is not constant
        lambda logits: logits.softmax(1).square().log(),
        lambda logits: logits.exp().log(),
        lambda logits: logits - logits.logsumexp(0, keepdim=True),
        lambda logits: logits[:, :1].expand(6, 6) - logits[:, :1].expand(6, 6).clone().logsumexp(1),
        lambda logits: (lambda square: square - square.logsumexp(1))(logits.tile(1, 2)[:, :6]),  # across the rows
        lambda logits: torch.sub(logits, logits.logsumexp(1, keepdim=True), alpha=0.5),
        lambda logits: (lambda a, b: a - b.logsumexp(1, keepdim=True))(*(logits.tile(1, 2) * WEIGHTS).split(5, 1)),
        LogSoftmax.apply,
        lambda logits: logits - logits.logsumexp(0, keepdim=True).amax(1, keepdim=True),
        lambda logits: logits - (2.0 * logits).logsumexp(1, keepdim=True),  # of other numbers
        lambda logits: logits - logits.mean(1, keepdim=True),
        lambda logits: logits - 1.0,
        lambda logits: logits - torch.ones(CLASSES),
        lambda logits: 1.0 - logits,
        lambda logits: logits.softmax(1),
    ],
)
def test_what_only_looks_like_log_softmax(function: Callable[[Tensor], Tensor]) -> None:
    assert density_penalty(Ending(function), batch()[0]) > 1e-6  # far above rounding


def test_labels() -> None:
    model, (x, y) = NETWORKS["mlp"](), batch()
    target_logit, cross_entropy = InputGradientPenalty(of="target_logit"), InputGradientPenalty()
    with pytest.raises(TypeError, match=r"y is torch\.int32; .*torch\.int64\. Convert other integers with y\.long\(\)"):
        target_logit(model, x, y.int())
    with pytest.raises(TypeError, match=r"y is torch\.float64; .*for probabilities use of='cross_entropy'"):
        target_logit(model, x, torch.rand(6, CLASSES).double())
    with pytest.raises(TypeError, match=r"y is a list; it must be a torch\.Tensor of class indices \(N,\)"):
        target_logit(model, x, y.tolist())
    with pytest.raises(ValueError, match=r"y has shape \(5,\); .* of shape \(6, 5\) must have shape \(6,\)"):
        target_logit(model, x, y[:5])
    with pytest.raises(ValueError, match=r"y is on meta and the logits on cpu; move one to the other's device"):
        target_logit(model, x, y.to("meta"))
    loss = PenalizedLoss(DensityPenalty())
    for call in (cross_entropy, loss):
        with pytest.raises(TypeError, match=r"target is torch\.int32; class indices must be torch\.int64"):
            call(model, x, y.int())
        with pytest.raises(ValueError, match=r"target has shape \(5,\); class indices .* must have shape \(6,\)"):
            call(model, x, y[:5])
        for labels, kind in ((None, "NoneType"), (y.tolist(), "list")):
            with pytest.raises(TypeError, match=rf"y is a {kind}; .* class indices \(N,\) or probabilities \(N, C\)"):
                call(model, x, labels)


@pytest.mark.parametrize("bad", [CLASSES, -1])
def test_class_indices_out_of_range(bad: int) -> None:
    model, (x, y) = NETWORKS["mlp"](), batch()
    y[3] = bad
    message = rf"target\[3\] is {bad}; class indices must be in \[0, 5\) or equal to ignore_index \(-100\)"
    for call in (InputGradientPenalty(), InputGradientPenalty(of="target_logit"), PenalizedLoss(DensityPenalty())):
        with pytest.raises(IndexError, match=message):
            call(model, x, y)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DensityPenalty(p=0.5), r"p is 0\.5; the order of the norm must be in \[1, inf\]"),
        (lambda: DensityPenalty(p=math.nan), r"p is nan; the order of the norm must be in \[1, inf\]"),
        (lambda: DensityPenalty(power=0), r"power is 0; it must be positive and finite"),
        (lambda: DensityPenalty(step_size=-1e-2), r"step_size is -0\.01; it must be positive and finite, in the units"),
        (
            lambda: DensityPenalty(method="taylor"),
            r"method is 'taylor'; it must be one of 'exact', 'finite_difference'",
        ),
        (lambda: InputGradientPenalty(p=0.5), r"p is 0\.5; the order of the norm"),
        (lambda: InputGradientPenalty(power=-2), r"power is -2; it must be positive"),
        (
            lambda: JacobianPenalty(projections=0),
            r"projections is 0; it must be at least 1, or None for the exact norm",
        ),
        (lambda: GradientMatchingPenalty(mlp(), p=0.5), r"p is 0\.5; the order of the norm"),
        (lambda: GradientMatchingPenalty(mlp(), power=0), r"power is 0; it must be positive"),
        (lambda: GradientMatchingPenalty(mlp(), of="loss"), r"of is 'loss'; it must be one of .*, 'log_density'"),
        (lambda: PenalizedLoss(DensityPenalty(), every=0), r"every is 0; it must be at least 1"),
        (
            lambda: PenalizedLoss(DensityPenalty(), share=0),
            r"share is 0; it must be in \(0, 1\], the part of each batch",
        ),
        (lambda: PenalizedLoss(DensityPenalty(), share=1.5), r"share is 1\.5; it must be in \(0, 1\]"),
        (lambda: PenalizedLoss(DensityPenalty(), share=math.nan), r"share is nan; it must be in \(0, 1\]"),
        (lambda: InputGradientPenalty(of="loss"), r"of is 'loss'; it must be one of 'cross_entropy', 'target_logit'"),
    ],
)
def test_bad_arguments(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("penalty", "name"),
    [
        (DensityPenalty, "p"),
        (DensityPenalty, "power"),
        (DensityPenalty, "step_size"),
        (InputGradientPenalty, "p"),
        (InputGradientPenalty, "power"),
        (partial(GradientMatchingPenalty, mlp()), "p"),
        (partial(PenalizedLoss, DensityPenalty()), "share"),
    ],
)
def test_numbers(penalty: Any, name: str) -> None:
    for value, found in ((torch.tensor(2.0), "a Tensor"), ("2", "'2', a str"), (True, "True, a bool")):
        with pytest.raises(TypeError, match=f"^{name} is {found}; it must be a Python number"):
            penalty(**{name: value})


def test_types() -> None:
    with pytest.raises(TypeError, match=r"projections is 1\.0, a float; it must be an int, the number of random dir"):
        JacobianPenalty(projections=1.0)
    with pytest.raises(TypeError, match="projections is True, a bool; it must be an int"):
        JacobianPenalty(projections=True)
    with pytest.raises(TypeError, match="every is a float; it must be an int"):
        PenalizedLoss(DensityPenalty(), every=2.0)
    for teacher, found in ((None, "a NoneType"), (nn.Linear, "the class Linear")):
        with pytest.raises(TypeError, match=f"the model is {found}; it must be a callable that maps x"):
            GradientMatchingPenalty(teacher)


def test_bad_arguments_of_the_functions() -> None:
    model, x = NETWORKS["mlp"](), batch()[0].requires_grad_()
    for call in (
        lambda **keywords: density_penalty(model, x, **keywords),
        lambda **keywords: density_penalty_from_logits(model(x), x, **keywords),
    ):
        with pytest.raises(ValueError, match=r"reduction is 'avg'; it must be one of 'mean', 'sum', 'none'"):
            call(reduction="avg")
        with pytest.raises(ValueError, match=r"p is 0; the order"):
            call(p=0)
        with pytest.raises(ValueError, match=r"power is inf; it must be positive and finite"):
            call(power=math.inf)


def test_given_logits() -> None:
    def given(penalty: Penalty, *arguments: Any) -> Tensor:
        return penalty.per_sample(SharedForward.of_logits(*arguments))

    model, (x, y) = NETWORKS["mlp"](), batch()
    leaf = x.clone().requires_grad_()
    for penalty in (
        DensityPenalty(),
        InputGradientPenalty(),
        InputGradientPenalty(of="target_logit"),
        JacobianPenalty(),
        GradientMatchingPenalty(mlp(seed=3)),
    ):
        with pytest.raises(RuntimeError, match=r"x does not require a gradient.*call x\.requires_grad_\(\) before the"):
            given(penalty, model(x), x, y)
        with pytest.raises(RuntimeError, match=r"no gradient path from x to the logits.*from another tensor than x"):
            given(penalty, model(x.clone().requires_grad_()), leaf, y)
        with pytest.raises(RuntimeError, match="no gradient path from x"):
            given(penalty, model(leaf).detach(), leaf, y)
        logits = model(leaf)
        with torch.no_grad(), pytest.raises(RuntimeError, match="gradients disabled"):
            given(penalty, logits, leaf, y)
        with pytest.raises(RuntimeError, match=r"inside a transformation of torch\.func"):
            torch.func.grad(lambda x: given(penalty, model(x), x, y))(x)  # noqa: B023


def test_log_density_checks_its_arguments() -> None:
    model, (x, _) = NETWORKS["mlp"](), batch()
    with pytest.raises(TypeError, match=r"x is torch\.int64"):
        log_density(model, x.long())
    with pytest.raises(TypeError, match="the model is a NoneType"):
        log_density(None, x)
    with pytest.raises(ValueError, match=r"logits have shape \(6,\)"):
        log_density(Ending(lambda logits: logits[:, 0]), x)


@pytest.mark.filterwarnings("ignore")  # the compiler's own
class TestCompiledModels:
    """A compiled model is refused before it runs; compiled functions where their logits or PyTorch's backward tell."""

    message = r"torch\.compile\), which cannot be differentiated twice.*_orig_mod.*method='finite_difference'"

    @pytest.mark.parametrize("name", ["density_penalty", "InputGradientPenalty", "JacobianPenalty", "PenalizedLoss"])
    def test_refused(self, name: str) -> None:
        x, y = batch()
        in_place = mlp()
        in_place[3].compile(backend="aot_eager")
        for model in (
            torch.compile(mlp(), backend="aot_eager"),
            nn.Sequential(mlp()[0:2], torch.compile(mlp()[2:], backend="aot_eager")),
            in_place,
            torch.compile(mlp().forward, backend="aot_eager"),
        ):
            with pytest.raises(RuntimeError, match=self.message):
                CALLS[name](model, x, y)

    def test_compiled_functions(self) -> None:
        x, _ = batch()
        double = torch.compile(lambda t: t.sin() * 2.0, backend="aot_eager")
        with pytest.raises(RuntimeError, match=r"the logits come from a compiled function \(" + self.message):
            density_penalty(Ending(double), x)
        leaf = x.requires_grad_()
        with pytest.raises(RuntimeError, match="the logits come from a compiled function"):
            density_penalty_from_logits(Ending(double)(leaf).view(6, 5), leaf)
        deep = NETWORKS["mlp"]()
        penalty = density_penalty(lambda x: deep(double(x)), x)
        with pytest.raises(RuntimeError, match="does not currently support double backward"):
            penalty.backward()

    def test_logits_of_a_compiled_step(self) -> None:
        """Those that the compiled function computed itself are refused; traced as one graph, the step is right."""
        model, x = mlp(), batch()[0]

        def step(x: Tensor) -> tuple[Tensor, ...]:
            x = x.clone().requires_grad_()
            return torch.autograd.grad(density_penalty_from_logits(model(x), x), list(model.parameters()))

        with pytest.raises(RuntimeError, match=self.message):
            torch.compile(step, backend="aot_eager")(x)
        for ours, truth in zip(make_fx(step)(x)(x), step(x), strict=True):
            torch.testing.assert_close(ours, truth)

    def test_compiled_steps_do_not_hide_them(self) -> None:
        x, y = batch()
        model = torch.compile(mlp(), backend="aot_eager")
        with pytest.raises(RuntimeError, match=r"the model holds a compiled Sequential \(" + self.message):
            torch.compile(lambda x, y: PenalizedLoss(DensityPenalty())(model, x, y), backend="aot_eager")(x, y)

    def test_finite_differences_of_compiled_models_work(self) -> None:
        model, (x, y) = mlp(), batch()
        loss = PenalizedLoss(DensityPenalty(method="finite_difference"))
        terms = loss(torch.compile(model, backend="aot_eager"), x, y)
        torch.testing.assert_close(terms.total, loss(model, x, y).total)
        terms.total.backward()
        assert all(parameter.grad is not None for parameter in model.parameters())
