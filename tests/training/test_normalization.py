"""Normalisation inside the model: the statistics, the state dict, fusing, resuming, and loading without the data."""

from __future__ import annotations

import copy
import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
from test_loop import interrupt_after
from torch import nn

import rds_fast
from rds_fast.training import Images, TrainingConfig, TrainingInterrupted, checkpoints, data, load_model, models, train
from rds_fast.training import normalization as own
from rds_fast.training.normalization import NormalizedModel, channel_statistics

MEAN, STD = torch.tensor([0.2, 0.5, 0.7]), torch.tensor([0.1, 0.3, 0.2])


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5)
    )


@pytest.mark.parametrize("as_bytes", [True, False])
def test_statistics_are_numpys(as_bytes: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(own, "_BATCH", 7)
    images = torch.randint(0, 256, (40, 3, 6, 5), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    images[:, 1] //= 3
    pixels = images.numpy().astype(np.float64) / 255
    split = Images(images if as_bytes else images.float() / 255, torch.zeros(40, dtype=torch.int64))
    mean, std = channel_statistics(split)
    assert mean.dtype == std.dtype == torch.float32
    np.testing.assert_allclose(mean, pixels.mean((0, 2, 3)), rtol=2e-7)
    np.testing.assert_allclose(std, pixels.std((0, 2, 3)), rtol=2e-7)


def test_bytes_are_summed_exactly_in_any_order() -> None:
    images = torch.randint(0, 256, (500, 1, 9, 9), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    labels = torch.zeros(500, dtype=torch.int64)
    for a, b in zip(
        channel_statistics(Images(images, labels)), channel_statistics(Images(images.flip(0), labels)), strict=True
    ):
        assert torch.equal(a, b)


def test_a_constant_channel_becomes_zero() -> None:
    images = torch.full((3, 2, 4, 4), 51, dtype=torch.uint8)
    images[0, 1] = 0
    mean, std = channel_statistics(Images(images, torch.zeros(3, dtype=torch.int64)))
    assert std[0] == 1
    assert torch.equal(own.Normalization(mean, std)(images / 255.0)[:, 0], torch.zeros(3, 4, 4))


def test_of_files_a_part_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if importlib.util.find_spec("torchvision") is None:
        pytest.skip("needs torchvision")
    import image_files

    split = data.load("imagefolder", image_files.write(tmp_path), image_size=16, workers=0).train
    whole = channel_statistics(split)
    again = channel_statistics(split.in_memory())
    assert torch.equal(whole[0], again[0])
    monkeypatch.setattr(own, "_FILES_MEASURED", 5)  # of 12: every third
    some = channel_statistics(split)
    expected = channel_statistics(split.take(torch.tensor([0, 3, 6, 9])))
    assert torch.equal(torch.stack(some), torch.stack(expected))
    assert not torch.equal(some[0], whole[0])


def test_the_model_sees_normalised_pixels_and_gradients_are_of_pixels() -> None:
    inner = network().double().eval()
    model = NormalizedModel(copy.deepcopy(inner), MEAN, STD).double().eval()
    x = torch.rand(2, 3, 8, 8, dtype=torch.float64, requires_grad=True)
    mean, std = (values.double()[:, None, None] for values in (MEAN, STD))
    torch.testing.assert_close(model(x), inner((x - mean) / std))
    (by_hand,) = torch.autograd.grad(inner(z := (x - mean) / std).logsumexp(1).sum(), z)
    (gradient,) = torch.autograd.grad(model(x).logsumexp(1).sum(), x)
    torch.testing.assert_close(gradient, by_hand / std)


def test_the_state_dict_is_the_models_own_with_two_more() -> None:
    inner = network()
    model = NormalizedModel(copy.deepcopy(inner), MEAN, STD)
    state = model.state_dict()
    assert list(state) == ["normalization.mean", "normalization.std", *inner.state_dict()]
    for name, values in inner.state_dict().items():
        assert torch.equal(state[name], values)
    other = NormalizedModel(network().apply(lambda module: None), torch.zeros(3), torch.ones(3))
    nn.init.zeros_(other.model[0].weight)
    other.load_state_dict(state)
    assert torch.equal(other.model[0].weight, inner[0].weight)
    assert torch.equal(other.normalization.std, STD)
    # In the model without it, and as a part of another.
    bare = network()
    bare.load_state_dict({name: values for name, values in state.items() if not name.startswith("normalization.")})
    outer = nn.ModuleDict({"student": copy.deepcopy(model)})
    assert set(outer.state_dict()) == {f"student.{name}" for name in state}
    nn.init.zeros_(outer["student"].model[0].weight)
    outer.load_state_dict({f"student.{name}": values for name, values in state.items()})
    assert torch.equal(outer["student"].model[0].weight, inner[0].weight)


def test_what_does_not_fit_is_refused() -> None:
    model = NormalizedModel(network(), MEAN, STD)
    state = model.state_dict()
    for change in ({"0.weight": None}, {"normalization.mean": None}, {"more": torch.zeros(1)}):
        changed = {name: values for name, values in {**state, **change}.items() if values is not None}
        with pytest.raises(RuntimeError, match=r"Missing key|Unexpected key"):
            model.load_state_dict(changed)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_a_normalised_model_is_fused_as_it_is(memory_format: torch.memory_format) -> None:
    model = NormalizedModel(network(), MEAN, STD)
    fused = rds_fast.nn.fuse(model)
    assert [layer.done for layer in rds_fast.nn.fusion_report(fused).fused] == [True]
    assert list(fused.state_dict()) == list(model.state_dict())
    x = torch.rand(4, 3, 8, 8).contiguous(memory_format=memory_format)
    assert model.normalization(x).is_contiguous(memory_format=memory_format)
    for each in (model, fused):
        each.to(memory_format=memory_format)
    penalties = [rds_fast.density_penalty(each, x.clone().requires_grad_()) for each in (model, fused)]
    torch.testing.assert_close(*penalties)


def test_building_by_name() -> None:
    model = models.build("cnn", (3, 16, 16), 4, normalize=(MEAN, STD))
    assert isinstance(model, NormalizedModel)
    torch.manual_seed(0)
    a = models.build("cnn", (3, 16, 16), 4, normalize=(MEAN, STD))
    torch.manual_seed(0)
    b = models.build("cnn", (3, 16, 16), 4)
    assert torch.equal(a.model[0].weight, b[0].weight)  # the normalisation draws nothing


def test_a_run_resumes_to_the_same_bits_and_loads_without_its_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = TrainingConfig(
        data="synthetic", image_size=16, classes=3, train_size=40, model="cnn", batch_size=8, epochs=2,
        augment="crop-flip-cutout", cutout=5, normalize=True, fuse=True, channels_last=True, device="cpu",
    )  # fmt: skip
    straight = train(config, tmp_path / "straight", quiet=True)
    with pytest.MonkeyPatch.context() as patch:
        interrupt_after(3, patch)
        with pytest.raises(TrainingInterrupted):
            train(config, tmp_path / "run", quiet=True)
    again = train(config, tmp_path / "run", resume=True, quiet=True)
    ends = [checkpoints.load(tmp_path / name / "model.safetensors", "")[0] for name in ("straight", "run")]
    assert ends[0].keys() == ends[1].keys()
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])
    mean, std = channel_statistics(config.load_data().train)
    assert torch.equal(ends[0]["normalization.mean"], mean)
    assert torch.equal(ends[0]["normalization.std"], std)
    monkeypatch.setattr(TrainingConfig, "load_data", None)
    loaded, _ = load_model(tmp_path / "run")
    x = torch.rand(2, 3, 16, 16)
    torch.testing.assert_close(loaded(x), straight.model(x))
    torch.testing.assert_close(loaded(x), again.model(x))
    plain = TrainingConfig(**{**config.__dict__, "normalize": False})
    with pytest.raises(ValueError, match="normalize was True and is now False"):
        train(plain, tmp_path / "run", resume=True, quiet=True)
