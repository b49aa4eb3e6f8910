"""Attacks, attributions and leakage as plain functions on tensors; the commands are built on them."""

from ..attacks import pgd
from .attribution_attack import attribution_attack
from .attributions import attributions, pixel_scores
from .leakage import feature_leakage, input_gradient
from .pixel_perturbation import remove_pixels
from .rank_correlation import kendall_tau, spearman, top_k_intersection
from .spuriosity import spurious_gaps

__all__ = [
    "attribution_attack",
    "attributions",
    "feature_leakage",
    "input_gradient",
    "kendall_tau",
    "pgd",
    "pixel_scores",
    "remove_pixels",
    "spearman",
    "spurious_gaps",
    "top_k_intersection",
]
