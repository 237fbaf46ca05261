"""The bytes that a client with the application's small model sends in an uplink of one bit, everything counted."""

import pytest
import torch
from flwr.app import ConfigRecord
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import FedAvg

import fedomc
from fedomc.flower import OMCStrategy, collect, install
from fedomc.flower.arrays import STYPE
from fedomc.flower.in_process import InProcess
from fedomc_speech import model as speech


@pytest.mark.parametrize("format", ["S1E3M7", "S1E2M3+S1E2M1"])
@pytest.mark.parametrize(
    ("include", "expected", "dense"), [((), 0.0433, 0.0102), (("*.weight", "*.bias"), 0.0357, 0.0004)], ids=str
)
def test_a_reply_in_per_cent_of_fp32(format: str, include: tuple[str, ...], expected: float, dense: float) -> None:
    """Weight matrices take 3.3%; the rest are biases and normalization in FP32, unless they go up in the uplink too."""
    arrays = collect(speech.build("tiny", 32, seed=0))
    policy = fedomc.CompressionPolicy.parse(f"{format}>DRIVE1", uplink_include=include)
    strategy = OMCStrategy(FedAvg(), policy)
    message, *_ = strategy.configure_train(1, arrays, ConfigRecord(), InProcess(ClientApp(), 2))
    with torch.device("meta"):
        model = speech.build("tiny", 32)
    install(model, message, consume=True)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape) * 1e-3)
    reply = collect(model, message, consume=True)
    fp32 = sum(len(array.data) for array in arrays.values())
    assert sum(len(array.data) for array in reply.values()) / fp32 == pytest.approx(expected, rel=0.01)
    unframed = sum(len(array.data) for array in reply.values() if array.stype != STYPE)
    assert unframed / fp32 == pytest.approx(dense, abs=0.0002)
