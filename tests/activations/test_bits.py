import pytest
import torch

from fedomc.activations.bits import _packed, _unpacked, pack_bits, unpack_bits


@pytest.mark.parametrize("count", [1, 7, 8, 9, 4096, 4099])
def test_bits_give_back_the_flags(count: int) -> None:
    flags = torch.rand(count, generator=torch.Generator().manual_seed(count)) < 0.3
    packed = pack_bits(flags)
    assert packed.dtype is torch.uint8 and len(packed) == -(-count // 8)
    assert torch.equal(unpack_bits(packed, torch.full((count,), 7.0)), flags.float())
    assert torch.equal(_packed(flags), packed)  # other devices
    assert torch.equal(_unpacked(packed, count), flags.to(torch.uint8))
