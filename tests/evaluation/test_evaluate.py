"""The figures of a model, by hand and on a small run."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import math
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from rds_fast.evaluation.evaluate import (
    EvaluationSettings,
    Figures,
    evaluate_model,
    evaluate_run,
    mean_and_spread,
)
from rds_fast.training import Images, Splits, TrainingConfig, load_model, train

FEW_STEPS = EvaluationSettings(steps=5)


class TopBlock(nn.Module):
    """Two classes by one pixel of the upper block: f = (0, 4 (x − 1/2))."""

    def forward(self, x: Tensor) -> Tensor:
        score = 4 * (x[:, 0, 0, 0] - 0.5)
        return torch.stack((torch.zeros_like(score), score), 1)


def pixels(values: list[float], labels: list[int], signal_on_top: list[bool]) -> Images:
    images = torch.zeros(len(values), 1, 56, 28)
    images[:, 0, 0, 0] = torch.tensor(values)
    return Images(images, torch.tensor(labels), torch.tensor(signal_on_top))


def test_by_hand() -> None:
    # The margins to the boundary at 1/2 are 0.4, 0.05 and 0.2; the last sample is classified wrongly.
    images = pixels([0.9, 0.55, 0.7, 0.7], [1, 1, 1, 0], [False, True, True, True])
    settings = EvaluationSettings(linf_epsilon=0.1, l2_epsilon=0.3, steps=20)
    figures = evaluate_model(TopBlock(), images, settings)
    assert figures.samples == 4
    assert figures.accuracy == 0.75
    assert figures.linf_accuracy == 0.5
    assert figures.l2_accuracy == 0.25
    # ∇ f_1 = 4 at the pixel, ∇ f_0 = 0: the pixel is on the null block of the first sample alone, and the last sample
    # has no gradient and so no share.
    assert figures.leakage == 1.0
    assert figures.share == pytest.approx(1 / 3)
    expected = sum(4 / (1 + math.exp(-4 * (value - 0.5))) for value in (0.9, 0.55, 0.7, 0.7)) / 4
    assert figures.gradient_norm == pytest.approx(expected, rel=1e-5)


def test_without_a_null_block_there_is_no_leakage() -> None:
    images = dataclasses.replace(pixels([0.9], [1], [True]), signal_on_top=None)
    figures = evaluate_model(TopBlock(), images, FEW_STEPS)
    assert figures.leakage is None
    assert figures.share is None


def test_images_of_bytes_are_measured_in_the_unit_interval() -> None:
    floats = pixels([1.0, 0.2], [1, 0], [True, False])
    as_bytes = dataclasses.replace(floats, images=(255 * floats.images).byte())
    assert evaluate_model(TopBlock(), as_bytes, FEW_STEPS) == evaluate_model(TopBlock(), floats, FEW_STEPS)


def test_without_any_gradient_there_is_no_share() -> None:
    figures = evaluate_model(TopBlock(), pixels([0.2], [0], [True]), FEW_STEPS)
    assert figures.leakage == 0.0
    assert figures.share is None


def test_no_samples_are_refused() -> None:
    with pytest.raises(ValueError, match="no samples"):
        evaluate_model(TopBlock(), pixels([], [], []), FEW_STEPS)


def test_the_same_seed_gives_the_same_figures_and_the_mode_is_restored(finished_run: Path, splits: Splits) -> None:
    model, _ = load_model(finished_run)
    model[2].train()
    first = evaluate_model(model, splits.test, FEW_STEPS)
    assert first == evaluate_model(model, splits.test, FEW_STEPS)
    assert [module.training for module in model] == [False, False, True, False, False, False]
    assert all(parameter.grad is None for parameter in model.parameters())


def test_batches_bound_the_memory_and_not_the_figures(finished_run: Path, splits: Splits) -> None:
    model, _ = load_model(finished_run)
    whole = evaluate_model(model, splits.test, FEW_STEPS)
    parts = evaluate_model(model, splits.test, dataclasses.replace(FEW_STEPS, batch_size=7))
    for name in ("accuracy", "leakage", "share", "gradient_norm"):  # the attacks' starts are dealt out otherwise
        assert getattr(parts, name) == pytest.approx(getattr(whole, name), rel=1e-5)
    assert parts.linf_accuracy == pytest.approx(whole.linf_accuracy, abs=0.05)


def test_a_limit_takes_samples_of_all_classes(finished_run: Path, splits: Splits) -> None:
    seen: list[Tensor] = []

    class Recorder(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            seen.append(x.detach())
            return x.flatten(1)[:, :10]

    in_order = splits.test.take(splits.test.labels.argsort())
    figures = evaluate_model(Recorder(), in_order, dataclasses.replace(FEW_STEPS, limit=30))
    assert figures.samples == 30
    found = [(in_order.images == image).flatten(1).all(1).nonzero()[0, 0] for image in seen[0]]
    assert len(in_order.labels[torch.stack(found)].unique()) >= 6


def test_a_run_gets_its_evaluation_json(finished_run: Path, splits: Splits) -> None:
    settings = dataclasses.replace(FEW_STEPS, limit=50)
    test = evaluate_run(finished_run, settings, device="cpu", splits=splits)
    record = json.loads((finished_run / "evaluation.json").read_text())
    assert record["split"] == "test"
    assert Figures(**record["figures"]) == test
    assert EvaluationSettings.from_settings(record["settings"]) == settings
    assert record["training"]["objective"] == "density"
    assert record["device"] == "cpu"
    validation = evaluate_run(finished_run, settings, split="validation", device="cpu", splits=splits)
    assert json.loads((finished_run / "evaluation.json").read_text())["split"] == "validation"
    assert validation != test


def test_what_is_wrong_is_named(finished_run: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="did you mean 'test'"):
        evaluate_run(finished_run, FEW_STEPS, split="tests")
    with pytest.raises(FileNotFoundError, match="holds no run"):
        evaluate_run(tmp_path, FEW_STEPS)
    for change in ({"steps": 0}, {"limit": 0}, {"batch_size": 0}, {"linf_epsilon": -1.0}, {"l2_epsilon": math.inf}):
        with pytest.raises(ValueError, match=next(iter(change))):
            EvaluationSettings(**change)


def test_mean_and_spread() -> None:
    one = Figures(10, 0.5, 0.2, 0.3, 1.0, 0.4, 2.0)
    other = Figures(10, 0.7, 0.4, 0.3, 3.0, None, 4.0)
    mean, spread = mean_and_spread([one, other])
    assert mean == Figures(10, pytest.approx(0.6), pytest.approx(0.3), 0.3, 2.0, None, 3.0)
    assert spread is not None
    assert spread.accuracy == pytest.approx(0.2 / math.sqrt(2))
    assert spread.l2_accuracy == 0.0
    assert mean_and_spread([one]) == (one, None)


def test_a_folder_of_images_is_evaluated_on_the_splits_that_it_has(tmp_path: Path) -> None:
    if importlib.util.find_spec("torchvision") is None:
        pytest.skip("needs torchvision")
    sys.path.insert(0, str(Path(__file__).parents[1] / "training"))
    import image_files

    root = image_files.write(tmp_path / "images")
    config = TrainingConfig(
        data="imagefolder", data_root=str(root), image_size=16, model="cnn", epochs=1, workers=0, device="cpu"
    )
    train(config, tmp_path / "run", quiet=True)
    with pytest.raises(ValueError, match=r"images have no test split; use --split validation, or add one"):
        evaluate_run(tmp_path / "run", FEW_STEPS, device="cpu")
    figures = evaluate_run(tmp_path / "run", FEW_STEPS, split="validation", device="cpu")
    assert figures.samples == 6
    few = evaluate_run(tmp_path / "run", EvaluationSettings(steps=1, limit=4), split="validation", device="cpu")
    assert few.samples == 4
    assert figures.leakage is None
