"""Attacks, attributions and the figures of a model as plain functions on tensors; the commands are built on them."""

from ..attacks import pgd
from .attribution_attack import attribution_attack
from .attributions import attributions, pixel_scores
from .auto_attack import autoattack
from .calibration import expected_calibration_error, reliability
from .detection import auroc, fpr_at_tpr
from .groups import group_accuracies
from .leakage import feature_leakage, input_gradient
from .out_of_distribution import in_distribution_scores
from .pixel_perturbation import remove_pixels
from .rank_correlation import kendall_tau, spearman, top_k_intersection
from .robust_accuracy import robust_to_pgd
from .spuriosity import spurious_gaps
from .square import square_attack

__all__ = [
    "attribution_attack",
    "attributions",
    "auroc",
    "autoattack",
    "expected_calibration_error",
    "feature_leakage",
    "fpr_at_tpr",
    "group_accuracies",
    "in_distribution_scores",
    "input_gradient",
    "kendall_tau",
    "pgd",
    "pixel_scores",
    "reliability",
    "remove_pixels",
    "robust_to_pgd",
    "spearman",
    "spurious_gaps",
    "square_attack",
    "top_k_intersection",
]
