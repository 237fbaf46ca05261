from pathlib import Path

import pytest
import torch
from torch import nn

from fedomc import compress_activations
from fedomc._torch import StorageWeakRef
from fedomc.activations.slabs import SLAB_BYTES, Slabs

CPU = torch.device("cpu")


def test_tensors_of_a_slab_share_its_storage_and_nothing_else() -> None:
    slabs = Slabs()
    sizes = [(100, torch.int32), (3, torch.uint8), (7, torch.float32), (1000, torch.int32)]
    tensors = [slabs.empty(length, dtype, CPU).fill_(number) for number, (length, dtype) in enumerate(sizes)]
    for number, (tensor, (length, dtype)) in enumerate(zip(tensors, sizes, strict=True)):
        assert tensor.shape == (length,) and tensor.dtype is dtype and tensor.data_ptr() % 64 == 0
        assert bool((tensor == number).all())
    assert len({tensor.untyped_storage().data_ptr() for tensor in tensors}) == 1


def test_a_slab_is_gone_with_the_last_tensor_in_it() -> None:
    slabs = Slabs()
    first, second = (slabs.empty(SLAB_BYTES // 8, torch.int32, CPU) for _ in range(2))
    large = slabs.empty(SLAB_BYTES, torch.int32, CPU)  # more than a slab
    slab = StorageWeakRef(first.untyped_storage())
    assert slab.cdata == second.untyped_storage()._cdata != large.untyped_storage()._cdata
    del first
    assert not slab.expired()
    del second
    assert slab.expired()


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="Linux says how much memory a process has")
def test_a_process_holds_the_codes_and_not_the_activations() -> None:
    layers = nn.Sequential(*(part for _ in range(40) for part in (nn.Linear(512, 512), nn.GELU())))
    x = torch.randn(4096, 512)  # 8 MB, of which a layer saves two

    def resident() -> int:
        status = Path("/proc/self/status").read_text()
        return int(status.split("VmRSS:")[1].split()[0]) * 1024

    with torch.no_grad():
        layers(x)
    before = resident()
    with compress_activations(layers, "S1E4M3") as packed:
        loss = layers(x).sum()
    assert resident() - before < 0.45 * packed.last.saved
    del loss
