"""Lazy modules, whose parameters have no shape before the first forward pass."""

from torch import nn
from torch.nn.parameter import is_lazy

from fedomc.errors import PolicyError


def check_initialized(model: nn.Module) -> None:
    """Refuse a model with parameters that have no shape yet.

    Raises:
        PolicyError: a lazy module has not run yet.
    """
    for name, parameter in model.named_parameters():
        if is_lazy(parameter):
            raise PolicyError(f"{name} belongs to a lazy module and has no shape yet: run the model on one batch first")
