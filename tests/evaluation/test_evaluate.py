"""The figures of a model, by hand and on a small run."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rds_fast.evaluation import record
from rds_fast.evaluation.evaluate import evaluate_model, evaluate_run
from rds_fast.evaluation.metrics import FIGURES, METRICS, chosen
from rds_fast.evaluation.settings import EvaluationSettings
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
    evaluation = evaluate_model(TopBlock(), images, settings)
    assert evaluation.samples == 4
    figures = evaluation.scalars
    assert figures["accuracy"] == 0.75
    assert figures["linf_accuracy"] == 0.5
    assert figures["l2_accuracy"] == 0.25
    # ∇ f_1 = 4 at the pixel, ∇ f_0 = 0: the pixel is on the null block of the first sample alone, and the last sample
    # has no gradient and so no share.
    assert figures["leakage"] == 1.0
    assert figures["share"] == pytest.approx(1 / 3)
    expected = sum(4 / (1 + math.exp(-4 * (value - 0.5))) for value in (0.9, 0.55, 0.7, 0.7)) / 4
    assert figures["gradient_norm"] == pytest.approx(expected, rel=1e-5)


def test_without_a_null_block_leakage_is_left_out_and_said_so() -> None:
    images = dataclasses.replace(pixels([0.9], [1], [True]), signal_on_top=None)
    evaluation = evaluate_model(TopBlock(), images, FEW_STEPS)
    assert not {"leakage", "share"} & set(evaluation.scalars)
    assert "leakage is left out: these data have no null block." in evaluation.notes
    everything = evaluate_model(TopBlock(), images, EvaluationSettings(metrics=("gradient_norm", "accuracy")))
    assert list(everything.scalars) == ["accuracy", "gradient_norm"]
    assert everything.notes == ()


def test_a_metric_that_was_named_and_does_not_fit_fails_before_any_other_is_measured() -> None:
    class Unused(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise AssertionError("the model was called")

    images = dataclasses.replace(pixels([0.9], [1], [True]), signal_on_top=None)
    with pytest.raises(ValueError, match="the metric leakage cannot be measured: these data have no null block"):
        evaluate_model(Unused(), images, EvaluationSettings(metrics=("accuracy", "leakage")))


def test_all_metrics_are_those_that_fit_and_a_note_says_why_each_other_does_not(splits: Splits) -> None:
    metrics, notes = chosen(splits.test, EvaluationSettings(metrics=("all",)))
    assert list(metrics) == [name for name in METRICS if name not in ("groups", "spuriosity", "out_of_distribution")]
    assert [note.split()[0] for note in notes] == ["spuriosity", "out_of_distribution", "groups"]


@pytest.mark.parametrize("metrics", [(), ("all",)])
@pytest.mark.parametrize(
    ("named", "message"),
    [
        ({"spuriosity": "/nowhere.csv"}, "metric spuriosity cannot be measured: there is no file /nowhere.csv"),
        ({"ood_data": ("noise", "svhn=/nowhere")}, "out_of_distribution cannot .* there is no folder of svhn=/nowhere"),
    ],
)
def test_files_that_are_named_and_missing_fail_before_any_work(
    metrics: tuple[str, ...], named: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        chosen(pixels([0.9], [1], [True]), EvaluationSettings(metrics=metrics, **named))


def test_what_reads_further_files_is_measured_first() -> None:
    assert list(METRICS)[:2] == ["spuriosity", "out_of_distribution"]


def test_a_setting_whose_metric_is_not_among_those_named_is_said_to_be_without_effect() -> None:
    settings = EvaluationSettings(metrics=("accuracy",), ood_data=("noise",))
    metrics, notes = chosen(pixels([0.9], [1], [True]), settings)
    assert (list(metrics), len(notes)) == (["accuracy"], 1)
    assert notes[0].startswith("out_of_distribution is left out: it is not among the metrics named")


def test_the_figures_to_choose_by_are_those_that_their_metrics_give(finished_run: Path, splits: Splits) -> None:
    model, _ = load_model(finished_run)
    light = {"strong_limit": 2, "strong_steps": 2, "square_queries": 2, "attribution_limit": 2, "path_steps": 2}
    for name in ("accuracy", "pgd", "attribution", "pixel_perturbation", "gradient_perturbation"):
        settings = EvaluationSettings(metrics=(name,), limit=8, steps=2, attribution_steps=2, **light)
        figures = evaluate_model(model, splits.test, settings).scalars
        assert set(METRICS[name].figures) <= set(figures)
    assert {figure: METRICS[name] for figure, name in FIGURES.items()}.keys() >= {"worst_group_accuracy"}


def test_a_setting_that_is_for_one_metric_alone_asks_for_it() -> None:
    images = pixels([0.9, 0.2], [1, 0], [True, True])
    unasked = evaluate_model(TopBlock(), images, FEW_STEPS)
    assert not any(name.startswith("ood_") for name in unasked.scalars)
    assert not any("out_of_distribution" in note for note in unasked.notes)
    asked = evaluate_model(TopBlock(), images, dataclasses.replace(FEW_STEPS, ood_data=("uniform",)))
    assert any(name.startswith("ood_uniform_") for name in asked.scalars)
    assert {**asked.scalars, **unasked.scalars} == asked.scalars
    scores = dataclasses.replace(FEW_STEPS, spuriosity="scores.csv", limit=1)
    with pytest.raises(ValueError, match=r"the metric spuriosity cannot be measured: .* a limit is given"):
        evaluate_model(TopBlock(), images, scores)


def test_a_metric_whose_package_is_missing_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    images = pixels([0.9], [1], [True])
    with pytest.raises(ValueError, match="the metric autoattack cannot be measured: pyautoattack is not installed"):
        evaluate_model(TopBlock(), images, EvaluationSettings(metrics=("accuracy", "autoattack")))
    _, notes = chosen(images, EvaluationSettings(metrics=("all",)))
    assert any(note.startswith("autoattack is left out: pyautoattack is not installed") for note in notes)


@pytest.mark.parametrize("metrics", [("pgd",), ("leakage", "pgd"), ("gradient_norm",)])
def test_a_metric_measured_alone_gives_the_figures_that_it_gives_among_all(
    metrics: tuple[str, ...], finished_run: Path, splits: Splits
) -> None:
    model, _ = load_model(finished_run)
    settings = dataclasses.replace(FEW_STEPS, batch_size=32)
    every = evaluate_model(model, splits.test, settings)
    some = evaluate_model(model, splits.test, dataclasses.replace(settings, metrics=metrics))
    assert set(some.seconds) == set(metrics)
    assert some.scalars
    assert some.scalars == {name: every.scalars[name] for name in some.scalars}


class Ridge(nn.Module):
    """Class 1 on both sides of the middle, by one pixel: f = (0, |x − 1/2| − 0.08). The side decides where PGD goes."""

    def forward(self, x: Tensor) -> Tensor:
        score = (x[:, 0, 0, 0] - 0.52).abs() - 0.08
        return torch.stack((torch.zeros_like(score), score), 1)


def test_a_sample_is_right_under_restarts_if_every_start_leaves_it_right() -> None:
    # Label 0, x = 0.5 and ε = 0.09: upwards to 0.59 the model stays right, downwards to 0.41 it does not. One random
    # start of a sample is below the ridge at 0.52 with probability 0.11 / 0.18 = 0.61, one of three with 0.94.
    images = pixels([0.5] * 400, [0] * 400, [True] * 400)
    one = EvaluationSettings(metrics=("pgd",), steps=10, linf_epsilon=0.09)
    accuracy = {
        restarts: evaluate_model(Ridge(), images, dataclasses.replace(one, restarts=restarts)).scalars["linf_accuracy"]
        for restarts in (1, 3)
    }
    for restarts, found in accuracy.items():
        expected = (1 - 0.11 / 0.18) ** restarts
        assert found == pytest.approx(expected, abs=4 * math.sqrt(expected * (1 - expected) / 400))


def test_images_of_bytes_are_measured_in_the_unit_interval() -> None:
    floats = pixels([1.0, 0.2], [1, 0], [True, False])
    as_bytes = dataclasses.replace(floats, images=(255 * floats.images).byte())
    measured = [evaluate_model(TopBlock(), images, FEW_STEPS).scalars for images in (as_bytes, floats)]
    assert measured[0] == measured[1]


def test_without_any_gradient_there_is_no_share() -> None:
    figures = evaluate_model(TopBlock(), pixels([0.2], [0], [True]), FEW_STEPS)
    assert figures.scalars["leakage"] == 0.0
    assert figures.scalars["share"] is None


class Hinge(nn.Module):
    """f = (0, max(0, x − 1/2)) of the last pixel, which is of the lower block."""

    def forward(self, x: Tensor) -> Tensor:
        score = (x.flatten(1)[:, -1] - 0.5).relu()
        return torch.stack((torch.zeros_like(score), score), 1)


def test_the_share_is_the_mean_over_the_samples_that_have_a_gradient() -> None:
    images = pixels([0.0, 0.0], [1, 1], [True, True])
    images.images[0, 0, -1, -1] = 0.9  # the other sample is below the hinge: no gradient
    figures = evaluate_model(Hinge(), images, FEW_STEPS).scalars
    assert (figures["leakage"], figures["share"]) == (0.5, 1.0)


def test_the_figures_are_the_same_where_gradients_are_disabled(finished_run: Path, splits: Splits) -> None:
    model, _ = load_model(finished_run)
    settings = dataclasses.replace(
        FEW_STEPS, metrics=("pgd", "leakage", "gradient_norm", "gradient_perturbation"), attribution_limit=20
    )
    expected = evaluate_model(model, splits.test, settings).scalars
    for disabled in (torch.no_grad(), torch.inference_mode()):
        with disabled:
            assert evaluate_model(model, splits.test, settings).scalars == expected


def test_no_samples_are_refused() -> None:
    with pytest.raises(ValueError, match="no samples"):
        evaluate_model(TopBlock(), pixels([], [], []), FEW_STEPS)


def test_the_same_seed_gives_the_same_figures_and_the_mode_is_restored(finished_run: Path, splits: Splits) -> None:
    model, _ = load_model(finished_run)
    model[2].train()
    first = evaluate_model(model, splits.test, FEW_STEPS)
    assert first.scalars == evaluate_model(model, splits.test, FEW_STEPS).scalars
    assert [module.training for module in model] == [False, False, True, False, False, False]
    assert all(parameter.grad is None for parameter in model.parameters())


def test_batches_bound_the_memory_and_not_the_figures(finished_run: Path, splits: Splits) -> None:
    model, _ = load_model(finished_run)
    whole = evaluate_model(model, splits.test, FEW_STEPS).scalars
    parts = evaluate_model(model, splits.test, dataclasses.replace(FEW_STEPS, batch_size=7)).scalars
    for name in ("accuracy", "leakage", "share", "gradient_norm"):  # the attacks' starts are dealt out otherwise
        assert parts[name] == pytest.approx(whole[name], rel=1e-5)
    assert parts["linf_accuracy"] == pytest.approx(whole["linf_accuracy"], abs=0.05)


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
    written = json.loads((finished_run / "evaluation.json").read_text())
    assert written["scalars"] == test.scalars
    assert (written["samples"], written["split"], written["device"]) == (50, "test", "cpu")
    assert set(written["seconds"]) >= {"accuracy", "pgd", "leakage", "gradient_norm"}
    assert written["versions"]["torch"] == torch.__version__
    assert written["training"]["objective"] == "density"
    read = record.read(finished_run)
    assert read.evaluation == test
    assert read.settings == settings
    assert read.training == load_model(finished_run)[1]
    validation = evaluate_run(finished_run, settings, split="validation", device="cpu", splits=splits)
    again = record.read(finished_run)
    assert again.split == "validation"
    assert again.fingerprint != read.fingerprint
    assert validation.scalars != test.scalars


def test_a_run_that_was_not_evaluated_or_whose_record_is_damaged_is_named(tmp_path: Path, finished_run: Path) -> None:
    with pytest.raises(FileNotFoundError, match="holds no run"):
        record.read(tmp_path)
    (tmp_path / "config.json").write_bytes((finished_run / "config.json").read_bytes())
    with pytest.raises(FileNotFoundError, match="was not evaluated; 'rds-fast evaluate"):
        record.read(tmp_path)
    for content in ("{", "[]", "{}", '{"figures": {}}'):
        (tmp_path / "evaluation.json").write_text(content)
        with pytest.raises(ValueError, match="damaged or of another version"):
            record.read(tmp_path)


def test_what_is_wrong_is_named(finished_run: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="did you mean 'test'"):
        evaluate_run(finished_run, FEW_STEPS, split="tests")
    with pytest.raises(FileNotFoundError, match="holds no run"):
        evaluate_run(tmp_path, FEW_STEPS)


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
    with pytest.raises(ValueError, match=r"images have no test split; measure another split, or add this one"):
        evaluate_run(tmp_path / "run", FEW_STEPS, device="cpu")
    figures = evaluate_run(tmp_path / "run", FEW_STEPS, split="validation", device="cpu")
    assert figures.samples == 6
    few = evaluate_run(tmp_path / "run", EvaluationSettings(steps=1, limit=4), split="validation", device="cpu")
    assert few.samples == 4
    assert "leakage" not in figures.scalars
