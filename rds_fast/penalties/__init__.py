"""Penalties on input gradients, and the loss that adds them to the cross-entropy."""
