"""What training a model holds in memory, predicted and measured."""
