"""Models of several inputs, given as a tuple or a dict, against eager float64."""

from __future__ import annotations

from collections import UserDict
from typing import Any

import pytest
import torch
from penalty_references import assert_same_gradients, gradients
from torch import Tensor, nn

from rds_fast.penalties.adversarial import AdversarialLoss
from rds_fast.penalties.attribution import AttributionPenalty
from rds_fast.penalties.density import DensityPenalty
from rds_fast.penalties.input_gradient import InputGradientPenalty
from rds_fast.penalties.jacobian import JacobianPenalty
from rds_fast.penalties.loss import PenalizedLoss
from rds_fast.penalties.matching import GradientMatchingPenalty
from rds_fast.penalties.shared import SharedForward

N = 5


class Fused(nn.Module):
    """Of an image, a table and an index; a scale for all samples, and a flag."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.image, self.table = nn.Linear(12, 8), nn.Linear(3, 8)
        self.index, self.head = nn.Embedding(4, 8), nn.Linear(8, 4)
        self.double()

    def forward(
        self, image: Tensor, table: Tensor, index: Tensor, scale: Tensor | None = None, *, negate: bool = False
    ) -> Tensor:
        hidden = self.image(image.flatten(1)) * torch.tanh(self.table(table)) + self.index(index)
        logits = self.head(torch.tanh(hidden))
        logits = logits if scale is None else logits * scale
        return -logits if negate else logits


def inputs(seed: int = 1) -> tuple[dict[str, Any], Tensor]:
    generator = torch.Generator().manual_seed(seed)
    image, table = (torch.randn(N, *shape, generator=generator).double() for shape in ((3, 2, 2), (3,)))
    index, y = (torch.randint(4, (N,), generator=generator) for _ in range(2))
    return {"image": image, "table": table, "index": index}, y


def eager(model: nn.Module, x: dict[str, Any], y: Tensor, names: list[str], p: float = 2.0, **masks: Tensor) -> Tensor:
    """‖∇ log p‖ₚ of each sample, over the inputs that are named."""
    leaves = {name: x[name] if x[name].requires_grad else x[name].clone().requires_grad_() for name in names}
    output = torch.logsumexp(model(**{**x, **leaves}), 1)
    found = torch.autograd.grad(output.sum(), list(leaves.values()), create_graph=True)
    rows = [(g * masks.get(name, 1.0)).flatten(1) for name, g in zip(names, found, strict=True)]
    return torch.linalg.vector_norm(torch.cat(rows, 1), p, dim=1)


@pytest.mark.parametrize("names", [None, "image", ["table"], ["table", "image"]], ids=str)
@pytest.mark.parametrize("p", [1.0, 2.0])
@pytest.mark.parametrize("kind", ["dict", "tuple"])
def test_the_norm_is_of_all_that_is_differentiated(kind: str, p: float, names: Any) -> None:
    model, (x, y) = Fused(), inputs()
    x["image"].requires_grad_()
    named = ["image", "table"] if names is None else [names] if isinstance(names, str) else names
    truth = eager(model, x, y, named, p).mean()
    total = nn.functional.cross_entropy(model(**x), y) + 0.7 * truth
    positions = names if names is None or kind == "dict" else [list(x).index(name) for name in named]
    given = x if kind == "dict" else tuple(x.values())
    terms = PenalizedLoss(DensityPenalty(p=p), 0.7, with_respect_to=positions)(model, given, y)
    torch.testing.assert_close(terms.penalty, truth, rtol=1e-11, atol=0)
    torch.testing.assert_close(DensityPenalty(p=p)(model, given, with_respect_to=positions), truth)
    assert_same_gradients(gradients(terms.total, model, x["image"]), gradients(total, model, x["image"]))
    assert x["image"].grad is None


def test_entries_that_are_no_tensors_and_shared_ones_are_handed_on() -> None:
    model, (x, y) = Fused(), inputs()
    x |= {"scale": torch.tensor(2), "negate": True}
    terms = PenalizedLoss(DensityPenalty(), 0.7)(model, x, y)
    torch.testing.assert_close(terms.logits, -2 * model(**inputs()[0]))
    torch.testing.assert_close(terms.penalty, eager(model, x, y, ["image", "table"]).mean())


@pytest.mark.parametrize("kind", ["dict", "tuple"])
def test_a_share_takes_the_rows_of_every_input(kind: str) -> None:
    model, (x, y) = Fused(), inputs()
    x["scale"] = torch.tensor(2.0, dtype=torch.float64)
    seen = torch.randperm(N, generator=torch.Generator().manual_seed(5))[:2]
    given = x if kind == "dict" else tuple(x.values())
    wrt = ["image", "table"] if kind == "dict" else [0, 1]
    for reference in (model, lambda *a, **k: model(*a, **k)):  # a cut batch, and two forwards
        loss = PenalizedLoss(
            DensityPenalty(), share=0.4, generator=torch.Generator().manual_seed(5), with_respect_to=wrt
        )
        terms = loss(reference, given, y)
        part = {name: value[seen] if value.dim() else value for name, value in x.items()}
        torch.testing.assert_close(terms.penalty, eager(model, part, y, ["image", "table"]).mean())
        torch.testing.assert_close(terms.logits, model(**x))
        torch.testing.assert_close(terms.cross_entropy, nn.functional.cross_entropy(model(**x), y))


def test_masks_of_several_inputs() -> None:
    model, (x, y) = Fused(), inputs()
    of_image, of_table = torch.rand(N, 1, 2, 2) < 0.5, torch.tensor([0.0, 1.0, 2.0], dtype=torch.float64)
    for mask, as_tuple, masks in (
        ({"image": of_image}, (of_image, None, None), {"image": of_image}),
        (
            {"table": of_table, "image": of_image},
            (of_image, of_table, None),
            {"image": of_image, "table": of_table},
        ),
    ):
        truth = eager(model, x, y, ["image", "table"], **masks).mean()
        terms = PenalizedLoss(DensityPenalty())(model, x, y, mask=mask)
        torch.testing.assert_close(terms.penalty, truth)
        ours = PenalizedLoss(DensityPenalty())(model, tuple(x.values()), y, mask=as_tuple)
        torch.testing.assert_close(ours.penalty, truth)
    alone = PenalizedLoss(DensityPenalty(), with_respect_to="image")(model, x, y, mask=of_image)
    torch.testing.assert_close(alone.penalty, eager(model, x, y, ["image"], image=of_image).mean())
    with pytest.raises(TypeError, match=r"the mask is a Tensor and x a dict, 2 of whose inputs are differentiated"):
        PenalizedLoss(DensityPenalty())(model, x, y, mask=of_image)
    with pytest.raises(ValueError, match=r"the mask has an entry 'index', and the penalty differentiates with respect"):
        PenalizedLoss(DensityPenalty())(model, x, y, mask={"index": of_image})


def test_other_penalties() -> None:
    """The finite difference moves all inputs at once; a teacher has the same ones; a penalty of one's own sees each."""
    model, teacher, (x, y) = Fused(), Fused(seed=3), inputs()
    fine = DensityPenalty(method="finite_difference", step_size=1e-6)(model, x)
    torch.testing.assert_close(fine, DensityPenalty()(model, x), rtol=1e-4, atol=0)

    def gradients_of(network: nn.Module, output: Any) -> Tensor:
        leaves = [x[name].clone().requires_grad_() for name in ("image", "table")]
        found = torch.autograd.grad(output(network(*leaves, x["index"])).sum(), leaves)
        return torch.cat([gradient.flatten(1) for gradient in found], 1)

    loss = lambda logits: nn.functional.cross_entropy(logits, y, reduction="none")  # noqa: E731
    difference = gradients_of(model, loss) - gradients_of(teacher, loss)
    torch.testing.assert_close(GradientMatchingPenalty(teacher)(model, x, y), difference.norm(dim=1).mean())
    squares = sum(gradients_of(model, lambda logits, c=c: logits[:, c]).square().sum(1) for c in range(4))
    torch.testing.assert_close(JacobianPenalty(projections=None)(model, x), 0.5 * squares.mean())
    target = InputGradientPenalty(of="target_logit")(model, x, y)
    of_target = gradients_of(model, lambda logits: logits[range(N), y])
    torch.testing.assert_close(target, of_target.norm(dim=1).mean())

    def of_the_table(shared: SharedForward) -> Tensor:
        gradients, table = shared.gradient("log_density"), "table" if isinstance(shared.x, dict) else 1
        assert {name: gradient.shape for name, gradient in gradients.items()} == {
            key: value.shape
            for key, value in (x.items() if isinstance(shared.x, dict) else enumerate(x.values()))
            if value.is_floating_point()
        }
        (by_hand,) = torch.autograd.grad(shared.log_density.sum(), shared.inputs[table], create_graph=True)
        torch.testing.assert_close(by_hand, gradients[table])
        return gradients[table].square().sum(1)

    for given in (x, tuple(x.values())):
        ours = PenalizedLoss(of_the_table)(model, given, y).penalty
        torch.testing.assert_close(ours, eager(model, x, y, ["table"]).square().mean())


def test_errors() -> None:
    model, (x, y) = Fused(), inputs()
    loss = PenalizedLoss(DensityPenalty())

    def named(*names: Any) -> PenalizedLoss:
        return PenalizedLoss(DensityPenalty(), with_respect_to=names)

    with pytest.raises(ValueError, match=r"with_respect_to names 'imag'; the inputs are 'image'.*Did you mean 'image'"):
        named("imag")(model, x, y)
    with pytest.raises(ValueError, match=r"with_respect_to names 3; the inputs are 0, 1, 2"):
        named(3)(model, tuple(x.values()), y)
    with pytest.raises(ValueError, match=r"with_respect_to is \('image', 'image'\); it must name one .* and each once"):
        named("image", "image")(model, x, y)
    with pytest.raises(
        ValueError, match=r"with_respect_to is \('image',\) and x is a Tensor; it names some of several"
    ):
        named("image")(model, x["image"], y)
    with pytest.raises(TypeError, match=r"x\['index'\] is torch\.int64, which has no gradient; it must be floating"):
        named("index")(model, x, y)
    with pytest.raises(TypeError, match=r"x is a dict without a floating-point tensor, and a penalty needs one"):
        loss(model, {"index": x["index"]}, y)
    with pytest.raises(
        TypeError, match=r"x\['table'\] is torch\.complex128; .*real numbers\. Pass torch\.view_as_real"
    ):
        loss(model, {**x, "table": x["table"].to(torch.complex128)}, y)
    with pytest.raises(ValueError, match=r"different numbers of samples, \{.*'image'.*: 5, .*'table'.*: 4\}"):
        loss(model, {**x, "table": x["table"][:4]}, y)
    with pytest.raises(ValueError, match=r"x\['scale'\] has no dimension; .* name those in with_respect_to"):
        loss(model, {**x, "scale": torch.tensor(1.0)}, y)
    with pytest.raises(ValueError, match=r"different numbers of samples, .* name those in with_respect_to"):
        loss(model, {**x, "scale": torch.ones(1)}, y)
    for wrong in (1.5, [["image"]]):
        with pytest.raises(TypeError, match=r"with_respect_to is .*; it must be names of inputs in a dict"):
            PenalizedLoss(DensityPenalty(), with_respect_to=wrong)(model, x, y)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="are on several devices; move them to one"):
        loss(model, {**x, "table": x["table"].to("meta")}, y)
    unused = {**x, "scale": torch.ones(N, dtype=torch.float64)}
    with pytest.raises(
        RuntimeError, match=r"no gradient path from x\['scale'\] to .* name the others in with_respect_to"
    ):
        loss(lambda scale, **others: model(**others), unused, y)
    with pytest.raises(ValueError, match=r"logits have shape \(4, 4\) for inputs of 5 samples"):
        loss(lambda **named: model(**named)[:4], x, y)
    with pytest.raises(TypeError, match=r"x is a list; it must be a torch\.Tensor.*, or several in tuple\(x\)"):
        loss(model, list(x.values()), y)
    with pytest.raises(TypeError, match=r"x is a UserDict; it must be a torch\.Tensor.*, or several in dict\(x\)"):
        loss(model, UserDict(x), y)
    for other in (AttributionPenalty(0.1), AdversarialLoss(0.1)):
        with pytest.raises(TypeError, match=r"x is a dict; it must be a torch\.Tensor"):
            other(model, x, y)


def test_complex_inputs() -> None:
    x = torch.randn(3, 4, dtype=torch.complex64)
    for call in (PenalizedLoss(DensityPenalty()), DensityPenalty(), AdversarialLoss(0.1)):
        with pytest.raises(
            TypeError, match=r"x is torch\.complex64; a penalty needs the gradient with respect to real"
        ):
            call(nn.Linear(4, 2), x, torch.tensor([0, 1, 0]))
