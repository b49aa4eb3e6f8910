"""What is minimised: the loss that a configuration asks for, with its weight over time."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..backends import implementation
from ..penalties.adaptive import AccuracyBudget, PenaltyRatio
from ..penalties.adversarial import AdversarialLoss
from ..penalties.attribution import AttributionPenalty, RobustAttributionLoss
from ..penalties.density import DensityPenalty
from ..penalties.group_dro import GroupDRO
from ..penalties.input_gradient import InputGradientPenalty
from ..penalties.jacobian import JacobianPenalty
from ..penalties.loss import LossTerms, PenalizedLoss
from ..penalties.losses import cross_entropies_of, weighted_mean
from ..penalties.matching import GradientMatchingPenalty
from ..penalties.schedules import Constant, Cosine, LinearWarmup, Schedule, Step
from ..penalties.shared import Penalty
from . import runs
from .config import TrainingConfig
from .data import Split, check_classes
from .objective_settings import ADAPTIVE, PENALIZED, weights_of_classes

Loss = Callable[..., LossTerms]


def cross_entropy(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    step: int = 0,
    sample_weight: Tensor | None = None,
    *,
    label_smoothing: float = 0.0,
    fast: bool = True,
) -> LossTerms:
    """The mean cross-entropy, and a penalty of 0; the step does not matter."""
    logits = model(x)
    with implementation(fast):
        loss = weighted_mean(cross_entropies_of(logits, y, label_smoothing), sample_weight)
    return LossTerms(loss, loss, torch.zeros_like(loss), logits)


class Part(NamedTuple):
    """A micro-batch of a step: its loss terms, without a graph, its labels, and its share of the step's weight."""

    terms: LossTerms
    labels: Tensor
    share: float | Tensor

    def sums(self) -> Tensor:
        """Over its samples: of the loss, the cross-entropy, the penalty and the right answers, (4,)."""
        accuracy = (self.terms.logits.argmax(1) == self.labels).float().mean()
        losses = (self.terms.total, self.terms.cross_entropy, self.terms.penalty, accuracy)
        return torch.stack([loss.float() for loss in losses]) * len(self.labels)


class Objective:
    """``objective(model, x, y, step, sample_weight)``: the loss terms that a configuration asks for.

    Attributes:
        weight: λ as a function of the step; 0 where there is none.

    Raises:
        FileNotFoundError, ValueError: there is a teacher, and it is no finished run, or one for other data.
        ValueError: the data have no groups where they are to be weighted, or another number of classes than there are
            weights.
    """

    def __init__(
        self, config: TrainingConfig, steps_per_epoch: int, training: Split, device: torch.device | str = "cpu"
    ) -> None:
        check_classes(config.data, training)
        classes = training.classes
        self._class_weights = _class_weights(config, training, device)
        self._groups = _groups(config, training)
        weighted = config.without_effect("weight") is None
        self.weight: Schedule = _weight(config, steps_per_epoch) if weighted else Constant(0.0)
        if config.objective in PENALIZED:
            self._loss: Loss = PenalizedLoss(
                _penalty(config, classes, device),
                self.weight,
                every=config.penalty_every,
                share=config.penalty_share,
                label_smoothing=config.label_smoothing,
                fast=config.fast,
            )
        elif config.objective == "cross-entropy":
            self._loss = partial(cross_entropy, label_smoothing=config.label_smoothing, fast=config.fast)
        else:
            self._loss = _loss_under_attack(config, self.weight)
        # What a weight that adapts has seen is a state; all else follows from the step.
        self._adaptive = self.weight if isinstance(self.weight, (PenaltyRatio, AccuracyBudget)) else None

    def __call__(
        self, model: nn.Module, x: Tensor, y: Tensor, step: int, sample_weight: Tensor | None = None
    ) -> LossTerms:
        return self._loss(model, x, y, step, sample_weight=sample_weight)

    def sample_weight(self, y: Tensor, groups: Tensor | None) -> Tensor | None:
        """The weights of the samples of a whole batch, (N,); None where all are alike."""
        if self._groups is not None and groups is not None:
            return self._groups(groups)
        return None if self._class_weights is None else self._class_weights[y]

    def update(self, parts: Sequence[Part], groups: Tensor | None) -> None:
        """Tell the weights that adapt what came of a step, from all its micro-batches: they are the whole step's."""
        if self._adaptive is None and self._groups is None:
            return
        labels = torch.cat([part.labels for part in parts])
        total, cross_entropy, penalty = (
            torch.stack([part.share * part.terms[term] for part in parts]).sum() for term in range(3)
        )
        terms = LossTerms(total, cross_entropy, penalty, torch.cat([part.terms.logits for part in parts]))
        if self._adaptive is not None:
            self._adaptive.update(terms, labels)
        if self._groups is not None and groups is not None:
            self._groups.update(terms, labels, groups)

    def state_dict(self) -> dict[str, Tensor]:
        """What the weights that adapt have seen; nothing else has a state."""
        adaptive = {} if self._adaptive is None else self._adaptive.state_dict()
        groups = {} if self._groups is None else self._groups.state_dict()
        return {**adaptive, **{_OF_GROUPS + name: value for name, value in groups.items()}}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Return to a state.

        Raises:
            ValueError: it is of another kind of weight.
        """
        of_groups = {name.removeprefix(_OF_GROUPS): state[name] for name in state if name.startswith(_OF_GROUPS)}
        if self._adaptive is not None:
            adaptive = {name: value for name, value in state.items() if not name.startswith(_OF_GROUPS)}
            self._adaptive.load_state_dict(adaptive)
        if self._groups is not None:
            self._groups.load_state_dict(of_groups)


_OF_GROUPS = "groups_"  # before the names of the groups' state


def _class_weights(config: TrainingConfig, training: Split, device: torch.device | str) -> Tensor | None:
    """The weight of each class, (C,)."""
    if config.class_weights == "none":
        return None
    listed = weights_of_classes(config.class_weights)
    if listed is not None:
        if len(listed) != training.classes:
            raise ValueError(
                f"class_weights is {config.class_weights!r}, {len(listed)} numbers, and the data {config.data} have "
                f"{training.classes} classes; give a number for each, joined by commas (in a sweep by colons)"
            )
        return torch.tensor(listed, device=device)
    counts = training.labels.bincount(minlength=training.classes).float()
    return (counts.sum() / (training.classes * counts.clamp(min=1.0))).to(device)


def _groups(config: TrainingConfig, training: Split) -> GroupDRO | None:
    """The weights of the groups."""
    if config.loss != "group-dro":
        return None
    if training.groups is None or training.group_names is None:
        raise ValueError(
            f"loss is 'group-dro' and the data {config.data} have no groups; use data that have, such as waterbirds or "
            "celeba-hair"
        )
    sizes = training.groups.bincount(minlength=len(training.group_names)).tolist()
    return GroupDRO(sizes, step_size=config.group_step_size, adjustment=config.group_adjustment)


def _loss_under_attack(config: TrainingConfig, weight: Schedule) -> Loss:
    """The losses of the worst point of a ball around each sample, which are no penalty beside the cross-entropy."""
    if config.objective == "adversarial":
        return AdversarialLoss(
            config.epsilon,
            norm=config.attack_norm,
            steps=config.attack_steps,
            step_size=config.attack_step_size,
            label_smoothing=config.label_smoothing,
            fast=config.fast,
        )
    return RobustAttributionLoss(
        weight,
        config.epsilon,
        **_path_and_attack(config),
        label_smoothing=config.label_smoothing,
        fast=config.fast,
    )


def _penalty(config: TrainingConfig, classes: int, device: torch.device | str) -> Penalty:
    if config.objective == "density":
        return DensityPenalty(p=config.p, power=config.power, method=config.method, step_size=config.step_size)
    if config.objective == "input-gradient":
        return InputGradientPenalty(p=config.p, power=config.power, of=config.of)
    if config.objective == "jacobian":
        return JacobianPenalty(projections=config.projections or None)
    if config.objective == "gradient-matching":
        return GradientMatchingPenalty(_teacher(config, classes, device), p=config.p, power=config.power, of=config.of)
    return AttributionPenalty(config.epsilon, **_path_and_attack(config))


def _path_and_attack(config: TrainingConfig) -> dict[str, Any]:
    """What both forms of robust attribution regularisation share."""
    return {
        "path_steps": config.path_steps,
        "attack_steps": config.attack_steps,
        "attack_step_size": config.attack_step_size,
        "attack_path_steps": config.attack_path_steps,
        "size": config.attribution_size,
        "layer": config.attribution_layer,
    }


def _teacher(config: TrainingConfig, classes: int, device: torch.device | str) -> nn.Module:
    """The model of the run that is to be matched, for the same images and classes."""
    assert config.teacher is not None  # the configuration saw to it
    model, settings = runs.load_model(config.teacher, device)
    found = (settings.image_shape, runs.classes(config.teacher))
    if found != (config.image_shape, classes):
        raise ValueError(
            f"the teacher in {config.teacher} is for images of {found[0]} and {found[1]} classes; the data "
            f"{config.data} have images of {config.image_shape} and {classes} classes. Give a run on such data"
        )
    model.requires_grad_(False)
    return model.to(memory_format=torch.channels_last) if config.channels_last else model  # type: ignore[call-overload]


def _weight(config: TrainingConfig, steps_per_epoch: int) -> Schedule:
    if config.weight_schedule in ADAPTIVE:
        assert config.weight_target is not None  # the configuration saw to it
        kind = PenaltyRatio if config.weight_schedule == "penalty-ratio" else AccuracyBudget
        return kind(config.weight_target, initial=config.weight)
    warmup_steps = max(round(config.weight_warmup_epochs * steps_per_epoch), 1)
    if config.weight_schedule == "linear":
        return LinearWarmup(config.weight, warmup_steps)
    if config.weight_schedule == "cosine":
        return Cosine(0.0, config.weight, warmup_steps)
    if config.weight_schedule == "step":
        milestones = tuple(epoch * steps_per_epoch for epoch in config.weight_milestones)
        return Step(config.weight, milestones, config.weight_factor)
    return Constant(config.weight)
