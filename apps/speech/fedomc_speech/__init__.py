"""Federated speech recognition with compressed parameters: a Flower app."""
