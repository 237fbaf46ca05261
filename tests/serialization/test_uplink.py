"""What goes back of a variable: one decision, the same for every way in which the bytes travel."""

import pytest
import torch
from torch import Tensor

import fedomc
from fedomc.methods import Encoding, Packed, encode
from fedomc.serialization import frame
from fedomc.serialization.uplink import UplinkConfig, reply_frame
from fedomc.tensor.compressed import compress
from tests.conftest import randn, same_bits

SHAPE = (40, 50)
UNQUANTIZED = fedomc.FloatFormat(5, 10)


def sent(kind: int, format: str) -> frame.Frame:
    packed = encode(randn(*SHAPE), fedomc.FloatFormat.parse(format))
    return frame.from_bytes(frame.to_bytes(packed, SHAPE, kind))


def values(packed: Packed) -> Tensor:
    return packed.decode(torch.empty(packed.numel)).view(SHAPE)


@pytest.mark.parametrize("coded", [False, True])
@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize("update_format", [None, "S1E3M4"])
@pytest.mark.parametrize("kind", [frame.VARIABLE, frame.DENSE])
def test_a_dense_variable_goes_back_as_the_sender_asked(
    kind: int, update_format: str | None, rounding: str, coded: bool
) -> None:
    """The update of what is not quantized is rounded as the policy says, like all others."""
    config = UplinkConfig(Encoding("S1E2M3", update_format, "scaled", rounding, 7), coded, UNQUANTIZED)
    came = sent(kind, "S1E2M3" if kind == frame.VARIABLE else str(UNQUANTIZED))
    trained = values(came.packed) + randn(*SHAPE, seed=1, scale=1e-2)
    data = reply_frame(trained, came, config, "w")
    assert data is not None
    found = frame.from_bytes(data, shape=SHAPE, sent=came.packed)
    whole = kind == frame.VARIABLE and update_format is None
    assert found.kind == (frame.VARIABLE if whole else frame.UPDATE)
    format = "S1E2M3" if whole else update_format if kind == frame.VARIABLE else str(UNQUANTIZED)
    expected = trained if whole else trained - values(came.packed)
    packed = encode(expected, fedomc.FloatFormat.parse(str(format)), "scaled", rounding, 7, "w")
    assert str(found.packed.method) == format and torch.equal(found.packed.codes, packed.codes)
    assert reply_frame(trained, came, config, "w") == data


@pytest.mark.parametrize("update_format", [None, "S1E2M1"])
def test_codes_go_back_as_they_are(update_format: str | None) -> None:
    encoding = Encoding("S1E3M7", update_format)
    tensor = compress(randn(*SHAPE), encoding, "w")
    tensor.add_(torch.ones(SHAPE), alpha=0.1)
    for config in (None, UplinkConfig(encoding), UplinkConfig(encoding, entropy_coding=True)):
        data = reply_frame(tensor, None, config, "w")
        assert data is not None
        found = frame.from_bytes(data, shape=SHAPE)
        part = tensor.base if tensor.update is None else tensor.update
        assert found.kind == (frame.VARIABLE if update_format is None else frame.UPDATE)
        assert torch.equal(found.packed.codes, part.codes) and same_bits(values(found.packed), values(part))


def test_what_was_sent_dense_is_no_frame_and_what_is_wrong_is_named() -> None:
    config = UplinkConfig(Encoding("S1E2M3"))
    assert reply_frame(randn(*SHAPE), None, config, "w") is None
    assert reply_frame(randn(*SHAPE), None, None, "w") is None
    for value in (randn(3, 3), randn(*SHAPE).double()):
        with pytest.raises(fedomc.PayloadError, match=r"^w goes back as torch\.float"):
            reply_frame(value, sent(frame.VARIABLE, "S1E2M3"), config, "w")
    with pytest.raises(fedomc.PayloadError, match=r"^w .* names no format"):
        reply_frame(randn(*SHAPE), sent(frame.DENSE, "S1E5M10"), config, "w")
    with pytest.raises(fedomc.NonFiniteError, match=r"^w "):
        reply_frame(torch.full(SHAPE, torch.nan), sent(frame.VARIABLE, "S1E2M3"), config, "w")


@pytest.mark.parametrize("name", ["S1E2M0", "S1E2M1", "S1E3M7", "NF4", "MXFP4"])
@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_a_client_that_changed_nothing_sends_back_what_came(name: str, rounding: str) -> None:
    encoding = Encoding.parse(name)
    sent = frame.Frame(encode(randn(50, 60) * 0.05, encoding.format), (50, 60), frame.VARIABLE)
    value = sent.packed.decode(torch.empty(3000)).view(50, 60)
    config = UplinkConfig(Encoding(encoding.format, rounding=rounding))
    data = reply_frame(value, sent, config, "w")
    assert data == frame.to_bytes(sent.packed, (50, 60), frame.VARIABLE)
    assert reply_frame(value + 0.01, sent, config, "w") != data
