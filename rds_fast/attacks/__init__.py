"""Gradient ascent inside a ball around each sample: what attacks a model, and what robust training maximises."""

from .pgd import ascend, pgd

__all__ = ["ascend", "pgd"]
