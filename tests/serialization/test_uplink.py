"""What goes back of a variable: one decision, the same for every way in which the bytes travel."""

import pytest
import torch
from torch import Tensor

import fedomc
from fedomc.methods import Encoding, Packed, encode, parse_method
from fedomc.methods.packed import draw_seed
from fedomc.serialization import frame
from fedomc.serialization.uplink import Feedback, UplinkConfig, reply_frame
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
        with pytest.raises(fedomc.PayloadError, match=r"^w is returned as torch\.float"):
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


# ---- with an uplink -------------------------------------------------------------------------------------------------

UPLINKS = ("S1E2M1", "S1E3M0", "S1E4M10", "INT4", "DRIVE1", "DRIVE2")
CHANGE = randn(*SHAPE, seed=1, scale=1e-2)


def arrivals(uplink: str) -> dict[str, tuple[Tensor, frame.Frame | Tensor | None, UplinkConfig, Tensor]]:
    """Give each way in which a variable can be sent and held: it, what was sent, the settings and its change."""
    came, unquantized = sent(frame.VARIABLE, "S1E3M7"), sent(frame.DENSE, str(UNQUANTIZED))
    one, two = Encoding.parse(f"S1E3M7>{uplink}", seed=3), Encoding.parse(f"S1E3M7+S1E3M7>{uplink}", seed=3)
    parts = {}
    for how in (one, two):
        held = fedomc.CompressedTensor.from_packed(came.packed.to("cpu"), how, SHAPE, "w")
        held.add_(CHANGE)
        parts[how] = held
    dense, arrived = values(came.packed) + CHANGE, randn(*SHAPE)
    own = compress(arrived + CHANGE, one, "w")
    settings = UplinkConfig(one, False, UNQUANTIZED, frozenset({"w"}))
    return {
        "one part": (parts[one], came, UplinkConfig(one), parts[one].dequantize() - values(came.packed)),
        "two parts": (parts[two], None, UplinkConfig(two), values(parts[two].update)),
        "dense, was sent compressed": (dense, came, UplinkConfig(one), dense - values(came.packed)),
        "the same, for two parts": (dense, came, UplinkConfig(two), dense - values(came.packed)),
        "unquantized": (dense, unquantized, settings, dense - values(unquantized.packed)),
        "was sent dense": (dense, arrived, settings, dense - arrived),
        "was sent dense, is in one part": (own, arrived, settings, own.dequantize() - arrived),
    }


@pytest.mark.parametrize("uplink", UPLINKS)
@pytest.mark.parametrize("arrival", list(arrivals("S1E2M1")))
def test_with_an_uplink_the_change_goes_back_rounded_once(arrival: str, uplink: str) -> None:
    value, came, config, change = arrivals(uplink)[arrival]
    data = reply_frame(value, came, config, "w")
    assert data is not None and reply_frame(value, came, config, "w") == data
    found = frame.from_bytes(data, shape=SHAPE)
    assert (found.kind, str(found.packed.method)) == (frame.UPDATE, uplink)
    seed = draw_seed(config.encoding.seed, "uplink", 0)
    expected = encode(change, found.packed.method, "", "stochastic", seed, "w")
    assert torch.equal(values(found.packed), values(expected))
    coded = reply_frame(value, came, UplinkConfig(config.encoding, True, UNQUANTIZED, config.unquantized), "w")
    assert coded is not None and len(coded) <= len(data)
    again = frame.from_bytes(coded, shape=SHAPE)
    assert torch.equal(values(again.packed), values(found.packed))


@pytest.mark.parametrize("uplink", UPLINKS)
def test_the_mean_of_the_replies_is_the_change_even_if_the_policy_rounds_to_nearest(uplink: str) -> None:
    """The square of the error of a mean of n replies is an n-th of that of one."""
    came, count, errors = sent(frame.VARIABLE, "S1E3M7"), 200, []
    for seed in range(count):
        encoding = Encoding("S1E3M7", rounding="nearest", seed=seed, uplink=uplink)
        data = reply_frame(values(came.packed) + CHANGE, came, UplinkConfig(encoding), "w")
        assert data is not None
        errors.append(values(frame.from_bytes(data).packed) - CHANGE)
    stacked = torch.stack(errors).double()
    single = float(stacked.square().sum(dim=(1, 2)).mean())
    assert 0.75 < float(stacked.mean(0).square().sum()) * count / single < 1.25


def test_an_update_in_the_uplinks_method_is_not_rounded_again() -> None:
    encoding = Encoding.parse("S1E3M7+S1E2M1>S1E2M1")
    tensor = compress(randn(*SHAPE), encoding, "w")
    tensor.add_(CHANGE)
    assert tensor.update is not None
    data = reply_frame(tensor, None, UplinkConfig(encoding), "w")
    assert data == frame.to_bytes(tensor.update, SHAPE, frame.UPDATE)


def test_what_an_uplink_leaves_alone_and_what_is_wrong() -> None:
    config = UplinkConfig(Encoding.parse("S1E3M7>DRIVE1"), unquantized=frozenset({"w"}))
    assert reply_frame(randn(10), None, config, "bias") is None
    with pytest.raises(fedomc.PayloadError, match=r"^w is returned as torch\.float32 \(3, 3\)"):
        reply_frame(randn(3, 3), randn(*SHAPE), config, "w")
    for came in (randn(*SHAPE), sent(frame.VARIABLE, "S1E3M7")):
        with pytest.raises(fedomc.NonFiniteError, match=r"^w "):
            reply_frame(torch.full(SHAPE, torch.nan), came, config, "w")
    data = reply_frame(randn(*SHAPE), randn(*SHAPE), config, "w")
    assert data is not None and values(frame.from_bytes(data).packed).count_nonzero() == 0


class TestFeedback:
    """What one reply loses is part of the next ones."""

    @pytest.mark.parametrize("uplink", UPLINKS)
    @pytest.mark.parametrize("arrival", list(arrivals("S1E2M1")))
    def test_what_arrives_and_the_residual_are_the_changes_so_far(self, arrival: str, uplink: str) -> None:
        value, came, config, change = arrivals(uplink)[arrival]
        feedback, arrived = Feedback(), torch.zeros(SHAPE)
        for count in range(1, 4):
            before = torch.zeros(SHAPE) if feedback.residual is None else values(feedback.residual)
            data = reply_frame(value, came, config, "w", feedback)
            assert data is not None and feedback.residual is not None
            found = frame.from_bytes(data, shape=SHAPE)
            assert (found.kind, str(found.packed.method)) == (frame.UPDATE, uplink)
            arrived += values(found.packed)
            left = change + before - values(found.packed)
            error = values(feedback.residual) - left  # of rounding to S1E4M3
            assert float(error.norm()) <= 2.0**-4 * float(left.norm())
            assert float((arrived + values(feedback.residual) - count * change).norm() / change.norm()) < 0.1 * count
        assert str(feedback.residual.method) == "S1E4M3"

    @pytest.mark.parametrize("uplink", UPLINKS)
    def test_the_residual_stays_bounded_and_so_does_the_error_of_the_sum(self, uplink: str) -> None:
        """Without feedback the error of a sum of n changes grows with the square root of n."""
        rounds, errors = 60, {}
        for name, feedback in (("with", Feedback()), ("without", None)):
            total = torch.zeros(SHAPE)
            for seed in range(rounds):
                config = UplinkConfig(Encoding("S1E3M7", seed=seed, uplink=uplink), unquantized=frozenset({"w"}))
                data = reply_frame(CHANGE, torch.zeros(SHAPE), config, "w", feedback)
                assert data is not None
                total += values(frame.from_bytes(data).packed)
            errors[name] = float((total - rounds * CHANGE).norm() / CHANGE.norm())
        assert errors["with"] < 1.3 and errors["with"] < 0.3 * errors["without"]

    def test_codes_of_the_uplinks_method_travel_as_they_are_unless_there_is_a_residual(self) -> None:
        encoding = Encoding.parse("S1E3M7+S1E2M1>S1E2M1")
        tensor, feedback = compress(randn(*SHAPE), encoding, "w"), Feedback()
        tensor.add_(CHANGE)
        assert tensor.update is not None
        as_it_is = frame.to_bytes(tensor.update, SHAPE, frame.UPDATE)
        assert reply_frame(tensor, None, UplinkConfig(encoding), "w", feedback) == as_it_is
        assert feedback.residual is None
        feedback.residual = encode(CHANGE, parse_method("S1E4M3"))
        assert reply_frame(tensor, None, UplinkConfig(encoding), "w", feedback) != as_it_is

    def test_nothing_is_fed_back_where_nothing_is_encoded(self) -> None:
        feedback = Feedback(encode(CHANGE, parse_method("S1E4M3")))
        before = feedback.residual
        config = UplinkConfig(Encoding.parse("S1E3M7>DRIVE1"))
        assert reply_frame(randn(*SHAPE), None, config, "bias", feedback) is None
        with pytest.raises(fedomc.NonFiniteError):
            value, came, config, _ = arrivals("DRIVE1")["was sent dense"]
            reply_frame(value * torch.nan, came, config, "w", feedback)
        assert feedback.residual is before
