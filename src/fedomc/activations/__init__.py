"""Packed activations: what a forward pass keeps for the backward pass is held as codes."""
