"""The clients of ``benchmarks.simulation``: one step of SGD on random values, with fedomc and with Flower alone.

Worker processes import this module.
"""

import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from torch import nn

import fedomc
from fedomc.flower import collect, install

packed, plain = ClientApp(), ClientApp()


def build(layers: int, width: int) -> nn.Module:
    """Make the model: square layers."""
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(width, width) for _ in range(layers)))


def _built(message: Message) -> nn.Module:
    config = message.content["config"]
    layers, width = config["layers"], config["width"]
    assert isinstance(layers, int) and isinstance(width, int)
    return build(layers, width)


def _loss(model: nn.Module, message: Message) -> torch.Tensor:
    width = next(model.parameters()).shape[-1]
    inputs = torch.randn(4, width, generator=torch.Generator().manual_seed(message.metadata.dst_node_id % 2**31))
    loss: torch.Tensor = model(inputs).square().mean()
    return loss


@packed.train()
def train_packed(message: Message, context: Context) -> Message:
    """Train on packed parameters."""
    torch.set_num_threads(1)
    with torch.device("meta"):
        model = _built(message)
    install(model, message, consume=True)
    fedomc.step_in_backward(model, torch.optim.SGD, lr=0.01)
    _loss(model, message).backward()
    arrays = collect(model, message)
    return Message(RecordDict({"arrays": arrays, "metrics": MetricRecord({"num-examples": 4})}), reply_to=message)


@plain.train()
def train_plain(message: Message, context: Context) -> Message:
    """Train as Flower's examples do."""
    torch.set_num_threads(1)
    with torch.device("meta"):
        model = _built(message)
    record = message.content["arrays"]
    assert isinstance(record, ArrayRecord)
    model.load_state_dict(record.to_torch_state_dict(), assign=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    _loss(model, message).backward()
    optimizer.step()
    content = {"arrays": ArrayRecord(model.state_dict()), "metrics": MetricRecord({"num-examples": 4})}
    return Message(RecordDict(content), reply_to=message)
