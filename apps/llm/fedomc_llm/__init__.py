"""Federated fine-tuning of causal language models with compressed parameters: a Flower app."""
