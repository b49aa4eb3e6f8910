"""Training with weights of classes and of groups: their shares of micro-batches, their state, and what is refused."""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import data_files
import pytest
import torch
from test_loop import interrupt_after, same, weights, without_time
from torch.nn import functional as F

from rds_fast.penalties.group_dro import GroupDRO
from rds_fast.training import Splits, TrainingConfig, TrainingInterrupted, checkpoints, data, loop, runs, train
from rds_fast.training.objectives import Objective

pytest.importorskip("safetensors", reason="needs the extra train")
pytestmark = pytest.mark.skipif(importlib.util.find_spec("torchvision") is None, reason="needs torchvision")

CPU = torch.device("cpu")
# Twenty samples in batches of eight: three steps an epoch.
SMALL = TrainingConfig(
    data="synthetic",
    image_size=8,
    classes=3,
    train_size=20,
    model="cnn",
    batch_size=8,
    epochs=2,
    optimizer="sgd",
    lr=0.05,
    log_interval=1,
    device="cpu",
    threads=1,
)
DRO = dataclasses.replace(SMALL, loss="group-dro", group_step_size=0.3, group_adjustment=1.0)
NAMES = ("a", "b", "c")


@pytest.fixture(scope="module")
def splits() -> Splits:
    """Synthetic images in three groups of unlike sizes; a group is no class."""

    def grouped(split: data.Images) -> data.Images:
        groups = torch.tensor([0, 0, 1, 0, 2, 0, 1, 0, 0, 0]).repeat(len(split) // 10 + 1)[: len(split)]
        return dataclasses.replace(split, groups=groups, group_names=NAMES)

    return Splits(*map(grouped, SMALL.load_data()))


def gradients_of_two_steps(config: TrainingConfig, splits: Splits, tmp_path: Path) -> tuple[list[torch.Tensor], Any]:
    """Of the second step, at the first weights, in float64; and the run."""
    exact = Splits(
        *(dataclasses.replace(split, images=data.in_unit_interval(split.images).double()) for split in splits)
    )
    run = loop._Run(dataclasses.replace(config, lr=1e-30, momentum=0.0), tmp_path, CPU, exact, quiet=True)
    run.state.model.double()
    for batch in exact.train.batches([run.order.batch(0), run.order.batch(1)]):
        run._train_step(*batch)
    return [parameter.grad for parameter in run.state.model.parameters()], run


def assert_alike(ours: torch.Tensor, truth: torch.Tensor) -> None:
    """To the precision of the weights, float32."""
    assert (ours - truth).abs().max() <= 1e-6 * truth.abs().max()


@pytest.mark.parametrize("objective", ["density", "cross-entropy"])
@pytest.mark.parametrize("change", [{"loss": "group-dro"}, {"class_weights": "balanced"}, {"class_weights": "1,5,0.5"}])
def test_micro_batches_add_up_to_the_weighted_batch(
    change: dict[str, Any], objective: str, splits: Splits, tmp_path: Path
) -> None:
    whole = dataclasses.replace(SMALL, objective=objective, **change)
    truth, run = gradients_of_two_steps(whole, splits, tmp_path)
    parts, cut = gradients_of_two_steps(dataclasses.replace(whole, accumulate=8), splits, tmp_path)
    for part, expected in zip(parts, truth, strict=True):
        assert_alike(part, expected)
    torch.testing.assert_close(run.objective.state_dict(), cut.objective.state_dict(), rtol=1e-5, atol=1e-7)
    plain, _ = gradients_of_two_steps(dataclasses.replace(SMALL, objective=objective), splits, tmp_path)
    assert not torch.allclose(plain[0], truth[0], rtol=1e-3)


@pytest.mark.parametrize("kind", ["balanced", "1,5,0.5", "1:5:0.5"])
def test_class_weights_are_pytorchs(kind: str, splits: Splits, tmp_path: Path) -> None:
    labels = splits.train.labels
    listed = len(labels) / (3 * labels.bincount().double()) if kind == "balanced" else torch.tensor([1.0, 5.0, 0.5])
    config = dataclasses.replace(SMALL, objective="cross-entropy", class_weights=kind)
    gradients, run = gradients_of_two_steps(config, splits, tmp_path)
    batch = run.order.batch(1).indices
    images = data.in_unit_interval(splits.train.images[batch]).double()
    run.state.model.zero_grad()
    F.cross_entropy(run.state.model(images), labels[batch], weight=listed.double()).backward()
    for ours, parameter in zip(gradients, run.state.model.parameters(), strict=True):
        assert_alike(ours, parameter.grad)


def test_the_groups_weights_follow_the_losses(splits: Splits, tmp_path: Path) -> None:
    """Those of the samples of each step, by the sizes of the training split."""
    _, run = gradients_of_two_steps(DRO, splits, tmp_path)
    dro = GroupDRO(splits.train.groups.bincount().tolist(), step_size=0.3, adjustment=1.0)
    for step in range(2):
        indices = run.order.batch(step).indices
        logits = run.state.model(data.in_unit_interval(splits.train.images[indices]).double())
        terms = loop.LossTerms(*[logits.sum()] * 3, logits)
        dro.update(terms, splits.train.labels[indices], splits.train.groups[indices])
    (found,) = run.objective.state_dict().values()
    torch.testing.assert_close(found, dro.state_dict()["log_weights"], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "weight", [{}, {"weight_schedule": "penalty-ratio", "weight_target": 0.1}], ids=["", "adaptive"]
)
@pytest.mark.parametrize("change", [{}, {"accumulate": 2}, {"objective": "adversarial", "attack_steps": 2}], ids=str)
def test_a_resumed_run_has_the_same_bits(
    change: dict[str, Any], weight: dict[str, Any], splits: Splits, tmp_path: Path
) -> None:
    if weight and "objective" in change:
        pytest.skip("it has no penalty")
    config = dataclasses.replace(DRO, **change, **weight)
    straight = train(config, tmp_path / "straight", quiet=True, splits=splits)
    with pytest.MonkeyPatch.context() as patch:
        interrupt_after(5, patch)
        with pytest.raises(TrainingInterrupted):
            train(config, tmp_path / "run", quiet=True, splits=splits)
    tensors, _ = checkpoints.load(tmp_path / "run" / runs.CHECKPOINT, "")
    (saved,) = [value for name, value in tensors.items() if "groups" in name]
    assert saved.exp().sum().item() == pytest.approx(1.0)
    assert saved.std() > 0.01  # unlike the first
    again = train(config, tmp_path / "run", resume=True, quiet=True, splits=splits)
    assert same(weights(straight), weights(again))
    assert without_time(straight.metrics) == without_time(again.metrics)


def test_data_without_groups_and_wrong_weights(splits: Splits, tmp_path: Path) -> None:
    """Refused before there is a folder."""
    for config, given, message in (
        (DRO, SMALL.load_data(), "loss is 'group-dro' and the data synthetic have no groups; .* such as waterbirds"),
        (
            dataclasses.replace(SMALL, class_weights="1,2"),
            splits,
            "class_weights is '1,2', 2 numbers, and the data synthetic have 3 classes; give a number for each, joined "
            r"by commas \(in a sweep by colons\)",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            train(config, tmp_path / "run", quiet=True, splits=given)
        assert not (tmp_path / "run").exists()


def test_a_single_class_is_refused(tmp_path: Path) -> None:
    config = dataclasses.replace(SMALL, classes=1)
    with pytest.raises(ValueError, match=r"the data synthetic have 1 class \(0\), which every model gets right; give"):
        train(config, tmp_path / "run", quiet=True)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["waterbirds", "celeba-hair"])
def test_the_command_on_data_with_groups(name: str, tmp_path: Path, call: Callable[..., tuple[int, str, str]]) -> None:
    pytest.importorskip("typer", reason="needs the extra train")
    root = data_files.WRITERS[name](tmp_path / "data")

    def trained(*options: str) -> tuple[int, str]:
        settings = [f"data={name}", f"data_root={root}", "image_size=16", "model=cnn", "epochs=1", "batch_size=2"]
        settings += ["workers=0", "threads=1", "device=cpu"]
        status, _, errors = call("train", *settings, *options, "--out", tmp_path / "run", "--overwrite", "--quiet")
        return status, errors

    groups = ("--loss", "group-dro", "--group-step-size", "0.1", "--group-adjustment", "1")
    assert trained(*groups) == (0, "")
    assert runs.read_config(tmp_path / "run").loss == "group-dro"
    assert trained("--class-weights", "balanced") == (0, "")
    status, errors = trained(*groups, "--class-weights", "balanced")
    assert status == 1
    assert "leave one of the two out" in errors
    status, errors = trained("--group-step-size", "0.1")
    assert status == 1
    assert "--group-step-size would have no effect: it belongs to loss group-dro, and loss is mean" in errors


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"class_weights": "equal"},
            "class_weights is 'equal'; it must be none, balanced, or a positive number for each",
        ),
        ({"class_weights": "1,0"}, "class_weights is '1,0'"),
        ({"class_weights": "1,nan"}, "class_weights is '1,nan'"),
        ({"class_weights": [1.0, 2.0]}, r"class_weights is \[1\.0, 2\.0\]"),
        (
            {"loss": "group-dro", "class_weights": "balanced"},
            "the groups have weights of their own, so leave one of the",
        ),
        ({"loss": "worst"}, "loss is 'worst'"),
        ({"group_step_size": 0.0}, "group_step_size is 0.0; it must be above 0"),
        ({"group_adjustment": -1.0}, "group_adjustment is -1.0; it must be 0 or more"),
    ],
)
def test_wrong_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(SMALL, **settings)


def test_a_class_without_samples_has_a_weight_too() -> None:
    images = data.Images(torch.zeros(3, 1, 1, 1), torch.tensor([0, 0, 2]), classes=3)
    objective = Objective(dataclasses.replace(SMALL, class_weights="balanced"), 1, images)
    torch.testing.assert_close(objective.sample_weight(images.labels, None), torch.tensor([0.5, 0.5, 1.0]))
