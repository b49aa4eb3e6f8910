"""Experiments: recipes of training and evaluation, sweeps over their settings, and the demonstration."""
