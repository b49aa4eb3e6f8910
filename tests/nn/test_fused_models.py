"""A fused model is a model like any other: its state, copies, pickles and later changes."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode

import rds_fast
from rds_fast import doctor
from rds_fast.nn import fuse, fusion_report
from rds_fast.training.models import _torchvision_models as torchvision_models

X = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def small_resnet() -> nn.Module:
    resnet = torchvision_models().resnet
    torch.manual_seed(0)
    model = resnet.ResNet(resnet.BasicBlock, [1, 1, 1, 1], num_classes=5)
    model(X)  # running statistics that are not the initial ones
    return model.eval()


def is_fused(model: nn.Module) -> bool:
    report = fusion_report(model)
    return bool(report.fused) and all(layer.done for layer in report.fused)


def test_state_dicts_load_both_ways() -> None:
    plain, other = small_resnet(), small_resnet()
    nn.init.normal_(plain.layer1[0].bn1.weight)
    fused = fuse(other)
    fused.load_state_dict(plain.state_dict())
    torch.testing.assert_close(fused(X), plain(X))
    nn.init.normal_(fused.layer1[0].bn1.weight)
    plain.load_state_dict(fused.state_dict())
    torch.testing.assert_close(fused(X), plain(X))


def test_in_place_keeps_every_object_and_a_copy_shares_none() -> None:
    plain = small_resnet()
    tensors = [id(tensor) for tensor in plain.state_dict(keep_vars=True).values()]
    modules = {name: id(module) for name, module in plain.named_modules()}
    copied = fuse(plain)
    assert not is_fused(plain)
    assert [kind for kind in map(type, plain.modules()) if kind.__module__.startswith("rds_fast")] == []
    shared = {tensor.data_ptr() for tensor in plain.state_dict().values()}
    assert not shared & {tensor.data_ptr() for tensor in copied.state_dict().values()}
    assert fuse(plain, inplace=True) is plain
    assert is_fused(plain)
    assert [id(tensor) for tensor in plain.state_dict(keep_vars=True).values()] == tensors
    assert {name: id(module) for name, module in plain.named_modules()} == modules
    assert isinstance(plain.layer1[0], torchvision_models().resnet.BasicBlock)
    assert isinstance(plain.bn1, nn.BatchNorm2d)
    assert len(list(plain.parameters())) == len(set(plain.parameters()))


def test_fusing_twice_is_fusing_once() -> None:
    fused = fuse(small_resnet())
    again = fuse(fused)
    assert [type(module) for module in again.modules()] == [type(module) for module in fused.modules()]
    assert fusion_report(again) == fusion_report(fused)
    assert fuse(fused, inplace=True) is fused
    torch.testing.assert_close(again(X), fused(X), rtol=0, atol=0)


def _pickled(model: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(model))


def _saved(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("again", [copy.deepcopy, copy.copy, _pickled, _saved, lambda model: model.double().float()])
def test_copies_are_fused_too(again) -> None:
    fused = fuse(small_resnet())
    expected = fused(X)
    copied = again(fused)
    assert is_fused(copied)
    torch.testing.assert_close(copied(X), expected, rtol=0, atol=0)
    if again is copy.deepcopy:
        nn.init.zeros_(copied.layer1[0].bn1.weight)
        torch.testing.assert_close(fused(X), expected, rtol=0, atol=0)


CHANGES = {
    "another activation": lambda model: setattr(model.layer1[0], "relu", nn.GELU()),
    "another norm": lambda model: setattr(model.layer1[0], "bn2", nn.GroupNorm(4, 64)),
    "another norm at the end of a branch": lambda model: model.layer2[0].downsample.__setitem__(1, nn.Identity()),
    "a module more": lambda model: model.layer2[0].downsample.append(nn.Tanh()),
    "a module more, by name": lambda model: model.layer1.add_module("1", nn.Tanh()),
    "a module less": lambda model: model.layer2.__setitem__(0, nn.Conv2d(64, 128, 1)),
    "synchronised": nn.SyncBatchNorm.convert_sync_batchnorm,
    "a branch less": lambda model: setattr(model.layer1[0], "downsample", nn.Conv2d(64, 64, 1).requires_grad_(False)),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_model_changed_after_it_was_fused_computes_what_the_changed_model_does(change) -> None:
    plain = small_resnet()
    fused = fuse(plain)
    for model in (plain, fused):
        torch.manual_seed(5)
        change(model)
    torch.testing.assert_close(fused(X), plain(X))
    refused = fuse(fused)
    assert is_fused(refused) == (change is not CHANGES["synchronised"])
    torch.testing.assert_close(refused(X), plain(X))


def test_a_sequential_may_grow_and_shrink_after_it_was_fused() -> None:
    plain = nn.Sequential(nn.BatchNorm2d(3), nn.ReLU(), nn.BatchNorm2d(3))
    fused = fuse(plain)
    assert fusion_report(fused).fused
    for model in (plain, fused):
        model.append(nn.Tanh())
    torch.testing.assert_close(fused(X), plain(X))
    assert not is_fused(fused)
    torch.testing.assert_close(fused[:2](X), plain[:2](X))
    for model in (plain, fused):
        del model[1]
        model.insert(0, nn.Sigmoid())
    torch.testing.assert_close(fused(X), plain(X))


def test_marks_that_others_leave_on_a_module_do_not_unfuse_it() -> None:
    fused = fuse(small_resnet())
    fused.layer1[0]._mark = "visited"
    fused.train().eval().requires_grad_(False)
    assert is_fused(fused)


def test_functional_calls_and_transforms(calls) -> None:
    plain = small_resnet()
    fused = fuse(plain)
    parameters = {name: 1.1 * parameter.detach() for name, parameter in plain.named_parameters()}
    expected = torch.func.functional_call(plain, parameters, (X,))
    torch.testing.assert_close(torch.func.functional_call(fused, parameters, (X,)), expected)
    assert len(calls) == 12
    each = torch.func.vmap(lambda x: fused(x[None])[0])(X)
    torch.testing.assert_close(each, plain(X))


def test_cotangents_in_a_batch() -> None:
    """``is_grads_batched`` runs the backward under vmap."""
    found = []
    plain = small_resnet()
    for model in (plain, fuse(plain)):
        x = X.clone().requires_grad_()
        output = model(x)
        cotangents = torch.eye(5)[:, None].expand(5, 2, 5)
        found += torch.autograd.grad(output, x, cotangents, is_grads_batched=True)
    torch.testing.assert_close(found[1], found[0])


def test_autocast_gives_the_same_dtypes() -> None:
    plain = small_resnet()
    with torch.autocast("cpu", torch.bfloat16):
        expected, actual = plain(X), fuse(plain)(X)
    # The fused kernels round once where the plain layers round two or three times; nine such layers follow each other.
    atol = 4 * torch.finfo(torch.bfloat16).eps * float(expected.detach().abs().max())
    torch.testing.assert_close(actual, expected, rtol=0, atol=atol)


def test_fusing_inside_fast_double_backward_and_using_it_there() -> None:
    plain = small_resnet()
    with rds_fast.fast_double_backward():
        fused = fuse(plain)
        assert is_fused(fused)
        torch.testing.assert_close(fused(X), plain(X))
    penalties = [rds_fast.density_penalty(model, X) for model in (plain, fused)]
    torch.testing.assert_close(*penalties)


def test_the_report_is_a_table_that_changes_nothing() -> None:
    plain = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.BatchNorm2d(4), nn.ReLU6())
    before = str(fusion_report(plain)).splitlines()
    assert type(plain) is nn.Sequential
    assert before == [
        "1  convolution → batch norm → ReLU (would be fused)",
        "3  left: followed by ReLU6 4",
        "nn.fuse would fuse 1 of 2 batch norms (1 convolution → batch norm → ReLU)",
    ]
    after = str(fusion_report(fuse(plain))).splitlines()
    assert after[0] == "1  convolution → batch norm → ReLU"
    assert after[2] == "fused 1 of 2 batch norms (1 convolution → batch norm → ReLU)"
    assert str(fusion_report(nn.Linear(2, 2))) == "no batch norm"


def test_errors_name_the_remedy() -> None:
    with pytest.raises(TypeError, match="function; it must be"):
        fuse(lambda x: x)
    model = nn.Sequential(nn.BatchNorm2d(3), nn.ReLU())
    with pytest.raises(RuntimeError, match=r"compiled Sequential .*fuse the model first"):
        fuse(torch.compile(model, backend="eager"))
    model.compile(backend="eager")
    with pytest.raises(RuntimeError, match="compiled Sequential"):
        fusion_report(model)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_scripted_models_are_refused() -> None:
    scripted = torch.jit.script(nn.Sequential(nn.BatchNorm2d(3), nn.ReLU()))
    with pytest.raises(RuntimeError, match="scripted Sequential"):
        fuse(scripted)


@pytest.mark.filterwarnings("ignore")  # torch.jit is deprecated; and tracing says what it makes constant
def test_fused_models_in_torch_jit() -> None:
    """Scripting names what to script. A trace is PyTorch's own operations, and so can be saved."""
    x = torch.randn(4, 3, 6, 6)
    for plain in (Residual(), nn.Sequential(nn.BatchNorm2d(3), nn.ReLU())):
        arguments = (x, x.flip(0)) if isinstance(plain, Residual) else (x,)
        fused = fuse(plain)
        for model in (fused, nn.ModuleList([fused])):
            with pytest.raises(
                RuntimeError, match=r"holds a fused .*script the model that was not fused.*torch\.jit\.trace"
            ):
                torch.jit.script(model)
        for training in (True, False):
            file = io.BytesIO()
            torch.jit.save(torch.jit.trace(fuse(plain).train(training), arguments, check_trace=False), file)
            file.seek(0)
            loaded, truth = torch.jit.load(file), copy.deepcopy(plain).train(training)
            loaded.load_state_dict(truth.state_dict())
            larger = tuple(torch.cat([argument, argument + 1]) for argument in arguments)
            torch.testing.assert_close(loaded(*larger), truth(*larger))
            torch.testing.assert_close(list(loaded.buffers()), list(truth.buffers()))


def test_doctor_lists_what_fuse_would_do(capsys: pytest.CaptureFixture[str]) -> None:
    doctor.doctor(model="resnet18")
    assert "fuse 20 of 20 batch norms" in capsys.readouterr().out
    assert doctor.model_report("mlp")[-1] == "no batch norm"
    with pytest.raises(ValueError, match="did you mean 'resnet18'"):
        doctor.doctor(model="resnet19")


class Marked(Tensor):
    """A subclass without a dispatch of its own, as libraries for images have them."""


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.relu = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3), nn.ReLU()

    def forward(self, x: Tensor, shortcut: Tensor) -> Tensor:
        y: Tensor = self.relu(self.bn(self.conv(x)) + shortcut)
        return y


@pytest.mark.parametrize("marked", ["x", "shortcut", "both"])
def test_results_of_subclasses_are_of_the_subclass(marked: str) -> None:
    torch.manual_seed(0)
    plain = Residual()
    x = X if marked == "shortcut" else X.as_subclass(Marked)
    shortcut = X if marked == "x" else X.as_subclass(Marked)
    expected, actual = plain(x, shortcut), fuse(plain)(x, shortcut)
    assert type(actual) is type(expected) is Marked
    torch.testing.assert_close(actual, expected)


class Gate(nn.Module):
    """Has no second derivative in PyTorch, but under ``fast_double_backward``."""

    def forward(self, weight: Tensor) -> Tensor:
        return torch.nn.functional.hardsigmoid(weight)


def test_a_parametrised_weight_is_computed_in_the_mode() -> None:
    gradients = []
    torch.manual_seed(0)
    plain = Residual().double()
    for model in (plain, fuse(plain)):
        torch.nn.utils.parametrize.register_parametrization(model.bn, "weight", Gate())
        x = X.double().requires_grad_()
        with rds_fast.fast_double_backward():
            output = model(x, x)
        (gradient,) = torch.autograd.grad(output.square().sum(), x, create_graph=True)
        gradients.append(torch.autograd.grad(gradient.square().sum(), list(model.parameters())))
    torch.testing.assert_close(*gradients)


class Watching(TorchFunctionMode):
    """The names of what a function mode sees, but for attributes."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(func.__name__)
        return func(*args, **(kwargs or {}))


def test_function_modes_see_one_operation() -> None:
    fused = fuse(Residual())
    with Watching() as watching:
        fused(X, X)
    seen = [name for name in watching.seen if name != "__get__"]
    assert seen.count("run") == 1
    assert not {"add", "relu"} & set(seen)
    with Watching() as outer, rds_fast.fast_double_backward():
        fused(X, X)
    assert [name for name in outer.seen if name == "run"] == ["run"]


def traceable() -> tuple[nn.Module, Tensor]:
    """With a convolution and a pool after a fused ReLU, which keep something else in its result's place."""
    torch.manual_seed(0)
    layers = [layer for channels in (3, 4) for layer in (nn.Conv2d(channels, 4, 3), nn.BatchNorm2d(4), nn.ReLU())]
    return fuse(nn.Sequential(*layers, nn.MaxPool2d(2)).eval()), X


@pytest.mark.parametrize("kind", ["real", "fake", "symbolic"])
def test_make_fx_of_a_forward(kind: str) -> None:
    fused, x = traceable()
    tensors = {**dict(fused.named_parameters()), **dict(fused.named_buffers())}

    def forward(tensors: dict[str, Tensor], x: Tensor) -> Any:
        with rds_fast.fast_double_backward():
            return torch.func.functional_call(fused, tensors, (x,))

    torch.testing.assert_close(make_fx(forward, tracing_mode=kind)(tensors, x)(tensors, x), fused(x))


@pytest.mark.filterwarnings("ignore:.*torch.jit.trace.*deprecated", "ignore::torch.jit.TracerWarning")
def test_jit_trace_of_a_forward() -> None:
    fused, x = traceable()

    class InTheMode(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fused = fused

        def forward(self, x: Tensor) -> Any:
            with rds_fast.fast_double_backward():
                return self.fused(x)

    torch.testing.assert_close(torch.jit.trace(InTheMode(), (x,), check_trace=False)(x), fused(x))
