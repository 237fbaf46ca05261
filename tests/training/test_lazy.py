from collections.abc import Callable

import pytest
import torch
from torch import nn

from fedomc import (
    CompressedTensor,
    CompressionPolicy,
    Encoding,
    FloatFormat,
    PolicyError,
    compress_,
    memory_report,
    parameter_bytes,
    step_in_backward,
)

POLICY = CompressionPolicy("S1E3M7", weight_matrices_only=False)


@pytest.mark.parametrize(
    "use",
    [
        POLICY.select,
        lambda m: compress_(m, {"1.weight": Encoding(FloatFormat(3, 7))}),
        parameter_bytes,
        lambda m: step_in_backward(m, torch.optim.SGD, lr=0.1),
        lambda m: memory_report(m, torch.ones(2, 4)),
    ],
    ids=["select", "compress_", "parameter_bytes", "step_in_backward", "memory_report"],
)
def test_a_lazy_module_has_to_run_first(use: Callable[[nn.Module], object]) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.LazyLinear(8))
    with pytest.raises(PolicyError, match=r"1\.weight belongs to a lazy module.*run the model on one batch"):
        use(model)
    model(torch.ones(2, 4))
    compress_(model, POLICY.select(model))
    assert all(isinstance(parameter, CompressedTensor) for parameter in model.parameters())
