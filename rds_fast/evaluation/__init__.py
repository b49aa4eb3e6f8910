"""Attacks, attributions and leakage as plain functions on tensors; the commands are built on them."""

from ..attacks import pgd
from .leakage import feature_leakage, input_gradient

__all__ = ["feature_leakage", "input_gradient", "pgd"]
