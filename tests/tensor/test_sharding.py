"""What would split a compressed parameter between processes, and keep dense shards, is refused."""

import datetime
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

import fedomc
from fedomc import CompressedTensor, PolicyError
from tests.conftest import run_processes


def _fully_shard(model: nn.Module) -> None:
    from torch.distributed.fsdp import fully_shard

    fully_shard(model)


def _fsdp(model: nn.Module, use_orig_params: bool = False) -> None:
    from torch.distributed.fsdp import FullyShardedDataParallel

    FullyShardedDataParallel(model, device_id=torch.device("cpu"), use_orig_params=use_orig_params)


def _parallelize(model: nn.Module) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

    parallelize_module(model, init_device_mesh("cpu", (1,)), {"0": ColwiseParallel()})


WAYS: dict[str, Callable[[nn.Module], None]] = {
    "fully_shard": _fully_shard,
    "FullyShardedDataParallel": _fsdp,
    "FullyShardedDataParallel with use_orig_params": lambda model: _fsdp(model, True),
    "parallelize_module": _parallelize,
}


def test_shards_are_refused(tmp_path: Path) -> None:
    run_processes(_refused, 1, tmp_path)


def _refused(rank: int, folder: Path) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group("gloo", f"file://{folder}/meeting", datetime.timedelta(seconds=30), 1, 0)
    for name, shard in WAYS.items():
        model = fedomc.compress_(nn.Sequential(nn.Linear(16, 16)), "S1E3M7")
        with pytest.raises(PolicyError, match=r"^0\.weight is compressed and cannot be split.*decompress_ the model"):
            shard(model)
        assert isinstance(model[0].weight, CompressedTensor), name  # type: ignore[index]
        shard(nn.Sequential(nn.Linear(16, 16)))  # plain models are none of our business
    model = fedomc.compress_(nn.Sequential(nn.Linear(16, 16)), "S1E3M7")
    parallel = nn.parallel.DistributedDataParallel(model)
    parallel(torch.ones(2, 16)).sum().backward()
    assert all(p.grad is not None for p in model.parameters()) and isinstance(model[0].weight, CompressedTensor)
    dist.destroy_process_group()


@pytest.mark.parametrize("function", [lambda p: torch.chunk(p, 2)[1], lambda p: torch.flatten(input=p)])
def test_elsewhere_the_same_functions_work(function: Callable[[torch.Tensor], torch.Tensor]) -> None:
    model = fedomc.compress_(nn.Linear(16, 16), "S1E3M7")
    values = model.weight.detach().dequantize().requires_grad_()
    assert torch.equal(function(model.weight), function(values))
    for p in (model.weight, values):
        function(p).square().sum().backward()
    assert torch.equal(model.weight.grad, values.grad)  # type: ignore[arg-type]
