"""The settings: what is refused, and what a run's config.json gives back."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest

from rds_fast.training import TrainingConfig


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


def test_differences_leave_out_what_computes_the_same() -> None:
    config = TrainingConfig(lr=0.1, threads=1, log_interval=5)
    assert TrainingConfig().differences(config) == {"lr": (1e-3, 0.1)}


@pytest.mark.parametrize(
    ("config", "name", "reason"),
    [
        (TrainingConfig(objective="cross-entropy"), "weight", "the objective is cross-entropy, which has no penalty"),
        (TrainingConfig(), "of", "it belongs to objective input-gradient, and objective is density"),
        (TrainingConfig(objective="input-gradient"), "method", "it belongs to objective density"),
        (TrainingConfig(), "step_size", "it belongs to method finite_difference, and method is exact"),
        (TrainingConfig(), "momentum", "it belongs to optimizer sgd, and optimizer is adam"),
        (TrainingConfig(optimizer="sgd"), "momentum", None),
        (TrainingConfig(objective="cross-entropy"), "fast", None),
        (TrainingConfig(), "weight", None),
    ],
)
def test_settings_without_effect(config: TrainingConfig, name: str, reason: str | None) -> None:
    found = config.without_effect(name)
    assert found is None if reason is None else found is not None and reason in found
