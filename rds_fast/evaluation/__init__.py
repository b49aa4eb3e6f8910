"""Attacks, attributions and the figures of a model as plain functions on tensors; the commands are built on them."""

from ..attacks import pgd
from .auto_attack import autoattack
from .calibration import expected_calibration_error, reliability
from .detection import auroc, fpr_at_tpr
from .groups import group_accuracies
from .leakage import feature_leakage, input_gradient
from .out_of_distribution import in_distribution_scores
from .robust_accuracy import robust_to_pgd
from .square import square_attack

__all__ = [
    "auroc",
    "autoattack",
    "expected_calibration_error",
    "feature_leakage",
    "fpr_at_tpr",
    "group_accuracies",
    "in_distribution_scores",
    "input_gradient",
    "pgd",
    "reliability",
    "robust_to_pgd",
    "square_attack",
]
