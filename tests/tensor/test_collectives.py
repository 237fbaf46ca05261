"""Collectives of torch.distributed on compressed tensors: two real processes, with plain tensors as the oracle."""

import datetime
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from fedomc import CompressedTensor
from tests.conftest import dense, lossless, randn, run_processes, same_bits

Collective = Callable[[Tensor, Callable[..., Tensor]], object]
"""Takes a tensor to write to, and a function that makes operands of a shape, compressed or plain."""

WRITING: dict[str, Collective] = {
    "broadcast": lambda p, new: dist.broadcast(p, 0),
    "broadcast to a view": lambda p, new: dist.broadcast(p[1], 1),
    "all_reduce": lambda p, new: dist.all_reduce(p),
    "all_reduce of a product": lambda p, new: dist.all_reduce(p, dist.ReduceOp.PRODUCT),
    "reduce": lambda p, new: dist.reduce(p, 1),
    "all_gather": lambda p, new: dist.all_gather([p, new(4, 6)], new(4, 6)),
    "all_gather into one": lambda p, new: dist.all_gather_into_tensor(p, new(2, 6)),
    "gather": lambda p, new: dist.gather(new(4, 6), [p, new(4, 6)] if dist.get_rank() == 0 else None),
    "scatter": lambda p, new: dist.scatter(p, [torch.ones(4, 6), torch.zeros(4, 6)] if dist.get_rank() == 0 else None),
    "reduce_scatter": lambda p, new: dist.reduce_scatter(p, [new(4, 6), new(4, 6)]),
    "reduce_scatter of one": lambda p, new: dist.reduce_scatter_tensor(p, new(8, 6)),
    "all_to_all": lambda p, new: dist.all_to_all([p, new(4, 6)], [new(4, 6), new(4, 6)]),
    "all_to_all of one": lambda p, new: dist.all_to_all_single(p, new(4, 6)),
    "send": lambda p, new: dist.send(p, 1) if dist.get_rank() == 0 else p.copy_(received(torch.zeros(4, 6))),
}

REFUSED: dict[str, tuple[Collective, str]] = {
    "recv": (lambda p, new: dist.recv(p, 0), "layer.weight is compressed and cannot be written by recv_"),
    "irecv": (lambda p, new: dist.irecv(p, 0), "layer.weight is compressed and cannot be written by recv_"),
    "async": (lambda p, new: dist.broadcast(p, 0, async_op=True), "layer.weight is compressed"),
    "async to a view": (lambda p, new: dist.all_reduce(p[0], async_op=True), "layer.weight is compressed"),
    "scatter from": (lambda p, new: dist.scatter(torch.zeros(4, 6), [p, p], 0), "Cannot access data pointer"),
}
"""What raises on the first process before anything is sent, and its message."""


def received(x: Tensor) -> Tensor:
    dist.recv(x, 0)
    return x


def _collectives(rank: int, folder: Path) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group("gloo", f"file://{folder}/meeting", datetime.timedelta(seconds=30), 2, rank)
    found: dict[str, object] = {}
    for name, collective in WRITING.items():
        for make in (torch.clone, lambda x: lossless(x, name="layer.weight")):
            p = make(randn(4, 6, seed=rank))
            found.setdefault(name, []).append(_outcome(collective, p, make, rank))
    found["coarse"] = _broadcast(torch.zeros(4, 6) if rank else randn(4, 6))
    dist.barrier()  # after an error the processes do not agree any more on how many collectives there were
    for name, (collective, _) in REFUSED.items():
        p = lossless(randn(4, 6), name="layer.weight")
        try:
            if rank == 0:
                collective(p, lossless)
        except RuntimeError as error:
            found[name] = str(error)
        assert same_bits(p.dequantize(), randn(4, 6))
    torch.save(found, folder / str(rank))
    dist.destroy_process_group()


def _outcome(collective: Collective, p: Tensor, make: Callable[[Tensor], Tensor], rank: int) -> Tensor | str:
    """Return what a collective made of a tensor, or the error if this version of gloo does not have it."""
    try:
        with torch.no_grad():
            collective(p, lambda *shape: make(randn(*shape, seed=rank + 2)))
    except RuntimeError as error:
        if "does not support" not in str(error):
            raise
        return str(error)
    return dense(p)


def _broadcast(values: Tensor) -> Tensor:
    p = CompressedTensor.from_dense(values, "S1E2M3", rounding="stochastic")
    before = p.dequantize()
    dist.broadcast(p, 0)
    if dist.get_rank() == 0:
        assert same_bits(p.dequantize(), before)  # it is not encoded anew
    return p.dequantize()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, object]]:
    folder = tmp_path_factory.mktemp("ranks")
    run_processes(_collectives, 2, folder)
    return [torch.load(folder / str(rank), weights_only=True) for rank in range(2)]


@pytest.mark.parametrize("name", WRITING)
def test_a_collective_writes_to_a_compressed_tensor(name: str, ranks: list[dict[str, list[Tensor]]]) -> None:
    for rank in ranks:
        plain, packed = rank[name]
        assert packed == plain if isinstance(plain, str) else same_bits(packed, plain)
    if isinstance(plain, str):
        assert name == "all_to_all" and torch.__version__ < "2.13", plain
        return
    assert any(not same_bits(rank[name][0], randn(4, 6, seed=at)) for at, rank in enumerate(ranks))


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_written_is_an_error(name: str, ranks: list[dict[str, str]]) -> None:
    assert REFUSED[name][1] in ranks[0][name]


def test_a_broadcast_leaves_its_source_as_it_is(ranks: list[dict[str, Tensor]]) -> None:
    source, target = (rank["coarse"] for rank in ranks)
    torch.testing.assert_close(target, source, rtol=0.2, atol=0.1)


def test_autograd_is_told_of_the_change(tmp_path: Path) -> None:
    run_processes(_changed_between_passes, 1, tmp_path)


def _changed_between_passes(rank: int, folder: Path) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group("gloo", f"file://{folder}/meeting", datetime.timedelta(seconds=30), 1, 0)
    p = lossless(randn(4, 6)).requires_grad_()
    y = torch.nn.functional.linear(torch.ones(2, 6, requires_grad=True), p).square().sum()
    with torch.no_grad():
        dist.broadcast(p, 0)
    with pytest.raises(RuntimeError, match="changed in place"):
        y.backward()
    dist.destroy_process_group()
