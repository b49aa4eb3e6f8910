"""The settings: what is refused, and what a run's config.json gives back."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest

from rds_fast.training import TrainingConfig, config


def test_defaults_are_those_of_the_demo() -> None:
    config = TrainingConfig()
    assert (config.data, config.model, config.optimizer, config.lr) == ("block-mnist", "mlp", "adam", 1e-3)
    assert (config.epochs, config.batch_size) == (12, 100)


@pytest.mark.parametrize(
    ("setting", "value", "message"),
    [
        ("data", "block_mnist", "data is 'block_mnist'; did you mean 'block-mnist'"),
        ("model", "resnet", "model is 'resnet'; did you mean 'resnet"),
        ("objective", "crossentropy", "objective is 'crossentropy'; did you mean 'cross-entropy'"),
        ("objective", None, "objective is None; did you mean"),
        ("of", "logit", "of is 'logit'; did you mean 'target_logit'"),
        ("method", "finite-difference", "did you mean 'finite_difference'"),
        ("optimizer", "adamw", "optimizer is 'adamw'; did you mean 'adam'"),
        ("lr_schedule", "cos", "did you mean 'cosine'"),
        ("weight_schedule", "steps", "did you mean 'step'"),
        ("device", "gpu", "device is 'gpu'; did you mean 'cpu'. It must be one of auto, cpu, cuda"),
        ("amp", "bfloat16", "did you mean 'bf16'"),
        ("epochs", 0, "epochs is 0; it must be a whole number, 1 or more"),
        ("batch_size", 1.5, "batch_size is 1.5"),
        ("threads", 0, "threads is 0"),
        ("checkpoint_interval", -1, "checkpoint_interval is -1"),
        ("seed", -1, "seed is -1; it must be a whole number from 0"),
        ("accumulate", 0, "accumulate is 0"),
        ("accumulate", 3, "batch_size is 100 and accumulate is 3, which does not divide it"),
        ("image_size", 0, "image_size is 0; it must be a whole number, 1 or more"),
        ("classes", 0, "classes is 0"),
        ("train_size", 0.5, "train_size is 0.5"),
        ("workers", -1, "workers is -1; it must be a whole number, 0 or more"),
        ("label_smoothing", 1.5, "label_smoothing is 1.5; it must be from 0 to 1"),
        ("label_smoothing", math.nan, "label_smoothing is nan"),
        ("lr_scaling", "sqrt", "lr_scaling is 'sqrt'; did you mean"),
        (
            "data",
            "imagefolder",
            "data is 'imagefolder' and data_root is missing; give the folder that holds train/CLASS and",
        ),
        (
            "data",
            "cifar10",
            "data is 'cifar10' and data_root is missing; give the folder that holds the folder cifar-10-",
        ),
        ("data", "cifar-10", "data is 'cifar-10'; did you mean 'cifar10'"),
        ("augment", "flip-crop", "augment is 'flip-crop'; did you mean '.*flip"),
        ("augment", "crop-flip", "augment is 'crop-flip', which mirrors images, and a block-mnist image.*; use 'crop'"),
        ("augment", "crop-flip-cutout", "; use 'crop-cutout'"),
        ("augment", "resized-crop-flip", "augment is 'resized-crop-flip' and the images of block-mnist have one size"),
        ("cutout", 0, "cutout is 0; it must be a whole number, 1 or more"),
        ("lr", 0.0, "lr is 0.0; it must be above 0 and finite"),
        ("lr", math.nan, "lr is nan"),
        ("power", -1.0, "power is -1.0"),
        ("weight", -0.1, "weight is -0.1; it must be 0 or more"),
        ("weight", math.inf, "weight is inf"),
        ("p", 0.5, "p is 0.5; it must be from 1 to infinity"),
        ("p", math.nan, "p is nan"),
        ("momentum", 1.0, "momentum is 1.0; it must be at least 0 and below 1"),
        ("lr_milestones", (3, 2), r"lr_milestones is \(3, 2\); it must hold epochs, 1 or more, in rising order"),
        ("weight_milestones", (0,), r"weight_milestones is \(0,\)"),
        ("steps", 0, "steps is 0; it must be a whole number, 1 or more"),
        ("epsilon", 0.0, "epsilon is 0.0; it must be above 0 and finite"),
        ("attack_norm", "linfinity", "did you mean 'linf'"),
        ("attack_steps", 0, "attack_steps is 0"),
        ("attack_step_size", -1.0, "attack_step_size is -1.0; it must be above 0"),
        ("path_steps", 2.5, "path_steps is 2.5"),
        ("attribution_size", "L1", "attribution_size is 'L1'; did you mean 'l1'"),
        ("projections", -1, "projections is -1; it must be a whole number, 0 or more"),
        ("penalty_every", 0, "penalty_every is 0"),
        ("penalty_share", 0.0, "penalty_share is 0.0; it must be above 0 and at most 1"),
        ("penalty_share", True, "penalty_share is True"),
        ("lr", "0.1", "lr is '0.1'; it must be above 0 and finite"),
        ("epochs", True, "epochs is True"),
        ("objective", "gradient-matching", "teacher is missing; give the folder of a finished run"),
        ("of", "log_density", "of is 'log_density', which is for gradient-matching"),
        ("weight_schedule", "penalty-ratio", "weight_schedule is 'penalty-ratio' and weight_target is None"),
        ("weight_target", 0.5, "weight_schedule is 'constant' and weight_target is 0.5"),
        ("lr_schedule", "step", "lr_schedule is 'step' and lr_milestones is empty"),
        ("weight_schedule", "step", "weight_schedule is 'step' and weight_milestones is empty"),
        ("weight_schedule", "linear", "weight_schedule is 'linear' and weight_warmup_epochs is 0"),
        ("weight_warmup_epochs", 2.0, "weight_schedule is 'constant' and weight_warmup_epochs is 2"),
    ],
)
def test_a_wrong_value_is_named(setting: str, value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TrainingConfig(**{setting: value})


@pytest.mark.parametrize(
    "config",
    [TrainingConfig(), TrainingConfig(p=math.inf, threads=2, lr_schedule="step", lr_milestones=(2, 5), weight=1)],
)
def test_json_gives_the_same_settings_back(config: TrainingConfig) -> None:
    assert TrainingConfig.from_settings(json.loads(config.to_json())) == config


def test_json_is_plain() -> None:
    def refuse(constant: str) -> None:
        raise AssertionError(constant)  # Infinity and NaN are no JSON

    json.loads(TrainingConfig(p=math.inf).to_json(), parse_constant=refuse)


def test_settings_of_another_version_are_refused() -> None:
    with pytest.raises(ValueError, match="a setting is 'learning_rate'; did you mean"):
        TrainingConfig.from_settings({"learning_rate": 1.0})


def test_nesterov_needs_a_momentum() -> None:
    with pytest.raises(ValueError, match="nesterov is given and momentum is 0; it needs a momentum above 0"):
        TrainingConfig(optimizer="sgd", nesterov=True, momentum=0.0)


def test_differences_leave_out_what_computes_the_same() -> None:
    config = TrainingConfig(lr=0.1, threads=1, log_interval=5)
    assert TrainingConfig().differences(config) == {"lr": (1e-3, 0.1)}


_STEPS = TrainingConfig(objective="cross-entropy", weight_schedule="step", weight_milestones=(1,))


@pytest.mark.parametrize(
    ("config", "name", "reason"),
    [
        (TrainingConfig(objective="cross-entropy"), "weight", "the objective is cross-entropy, which has no penalty"),
        (
            TrainingConfig(),
            "of",
            "it belongs to objective input-gradient or gradient-matching, and objective is density",
        ),
        (TrainingConfig(objective="input-gradient"), "method", "it belongs to objective density"),
        # What belongs to a setting that has no effect has none either.
        (TrainingConfig(objective="jacobian", method="finite_difference"), "step_size", "to objective density"),
        (TrainingConfig(objective="cross-entropy"), "weight_factor", "it belongs to weight_schedule step"),
        (_STEPS, "weight_factor", "the objective is cross-entropy, which has no penalty"),
        (TrainingConfig(objective="jacobian"), "p", "it belongs to objective input-gradient or density or gradient"),
        (TrainingConfig(objective="adversarial"), "weight", "it belongs to objective .* and objective is adversarial"),
        (TrainingConfig(objective="adversarial"), "attack_norm", None),
        (TrainingConfig(objective="attribution"), "attack_norm", "it belongs to objective adversarial"),
        (TrainingConfig(objective="attribution"), "attribution_layer", None),
        (TrainingConfig(objective="attribution", attribution_size="sum"), "path_steps", "attribution_size is sum"),
        (TrainingConfig(objective="robust-attribution"), "penalty_every", "it belongs to objective input-gradient"),
        (TrainingConfig(objective="robust-attribution"), "weight", None),
        (TrainingConfig(objective="gradient-matching", teacher="x"), "power", None),
        (TrainingConfig(objective="gradient-matching", teacher="x"), "of", None),
        (TrainingConfig(), "epsilon", "it belongs to objective adversarial or attribution or robust-attribution"),
        (TrainingConfig(), "weight_target", "it belongs to weight_schedule penalty-ratio or accuracy-budget"),
        (TrainingConfig(steps=10), "epochs", "steps is 10, which decides the length"),
        (TrainingConfig(steps=10), "steps", None),
        (TrainingConfig(), "step_size", "it belongs to method finite_difference, and method is exact"),
        (TrainingConfig(), "momentum", "it belongs to optimizer sgd, and optimizer is adam"),
        (TrainingConfig(optimizer="sgd"), "momentum", None),
        (TrainingConfig(objective="cross-entropy"), "fast", None),
        (TrainingConfig(), "weight", None),
        (TrainingConfig(objective="cross-entropy"), "label_smoothing", None),
        (TrainingConfig(), "nesterov", "it belongs to optimizer sgd"),
        (
            TrainingConfig(),
            "image_size",
            "it belongs to data flowers102 or .* or synthetic or imagefolder, and data is block-mnist",
        ),
        (TrainingConfig(data="synthetic"), "image_size", None),
        (TrainingConfig(data="synthetic"), "workers", "it belongs to data .* or imagefolder, and data is synthetic"),
        (TrainingConfig(data="synthetic"), "data_root", "it belongs to data .* and data is synthetic"),
        (TrainingConfig(data="imagefolder", data_root="x"), "data_seed", "and data is imagefolder"),
        (TrainingConfig(data="imagefolder", data_root="x"), "data_root", None),
        (TrainingConfig(data="cifar10", data_root="x"), "data_seed", None),
        (TrainingConfig(data="cifar10", data_root="x"), "download", None),
        (TrainingConfig(data="gtsrb", data_root="x"), "workers", None),
        (TrainingConfig(data="waterbirds", data_root="x"), "image_size", None),
        (TrainingConfig(data="waterbirds", data_root="x"), "data_seed", "and data is waterbirds"),
        (
            TrainingConfig(augment="crop"),
            "cutout",
            "it belongs to augment crop-cutout or crop-flip-cutout, and augment",
        ),
        (TrainingConfig(augment="crop-cutout"), "cutout", None),
    ],
)
def test_settings_without_effect(config: TrainingConfig, name: str, reason: str | None) -> None:
    found = config.without_effect(name)
    assert found is None if reason is None else found is not None and re.search(reason, found)


def test_an_accuracy_to_hold_is_one() -> None:
    with pytest.raises(ValueError, match="weight_target is 90; an accuracy to hold is above 0 and below 1"):
        TrainingConfig(weight_schedule="accuracy-budget", weight_target=90)
    with pytest.raises(ValueError, match="weight is 0 and weight_schedule is 'penalty-ratio', which adapts it by fact"):
        TrainingConfig(weight_schedule="penalty-ratio", weight_target=0.1, weight=0)


def test_every_setting_says_whether_it_belongs_to_the_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A setting of the place may differ where a run goes on; a path is kept as what it meant."""
    assert set(config.PATHS) == {"data_root", "teacher"}
    assert set(config.PLACE) == {
        *("data_root", "teacher", "download", "device", "threads", "workers", "log_interval", "checkpoint_interval")
    }
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/someone")
    made = TrainingConfig(data="svhn", data_root="here", teacher="~/there")
    assert (made.data_root, made.teacher) == (str(tmp_path / "here"), "/home/someone/there")
    assert made.differences(TrainingConfig(data="svhn", data_root="/x", log_interval=3)) == {}
    assert made.differences(TrainingConfig(data="svhn", data_root="/x", lr=0.5)) == {"lr": (0.001, 0.5)}
