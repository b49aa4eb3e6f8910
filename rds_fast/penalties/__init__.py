"""Penalties on input gradients and attributions, the loss that adds one to the cross-entropy, adversarial losses."""
