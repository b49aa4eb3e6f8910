"""Attacks, attributions and leakage as plain functions on tensors; the commands are built on them."""

from ..attacks import pgd
from .leakage import feature_leakage, input_gradient
from .rank_correlation import kendall_tau, spearman, top_k_intersection

__all__ = ["feature_leakage", "input_gradient", "kendall_tau", "pgd", "spearman", "top_k_intersection"]
