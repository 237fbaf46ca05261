"""What a client sends back of a variable: the one place that decides it, whatever carries the bytes.

``reply_frame`` decides by what the client was sent. ``value_frame`` and ``change_frame`` are what it decides between,
for a transport on which a client says itself whether it sends values or changes.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from fedomc.codec import CHUNK
from fedomc.errors import PayloadError
from fedomc.methods import Encoding, Method, Packed, encode
from fedomc.methods.packed import draw_seed
from fedomc.serialization import frame
from fedomc.tensor.compressed import is_compressed

Sent = frame.Frame | Tensor
"""What a client received of a variable: a frame, or its values."""


@dataclass(frozen=True)
class UplinkConfig:
    """How a server asks a client to encode its reply.

    Attributes:
        encoding: the encoding of the variables that the client keeps compressed, and the method of their uplink.
        entropy_coding: whether the client's frames are entropy coded.
        unquantized_format: the format of the variables that partial quantization leaves unquantized; None is FP32.
        unquantized: the names of those that were sent in FP32 and go back in the encoding's uplink.
    """

    encoding: Encoding
    entropy_coding: bool = False
    unquantized_format: Method | None = None
    unquantized: frozenset[str] = frozenset()

    @property
    def uplink(self) -> Method | None:
        """The method of the changes that go back; None if what is held goes back."""
        return self.encoding.uplink

    def asks_for_change(self, name: str) -> bool:
        """Tell whether of a variable that was sent in FP32 the change goes back in the uplink's method."""
        return self.uplink is not None and name in self.unquantized


def reply_frame(value: Tensor, sent: Sent | None, config: UplinkConfig | None, name: str) -> bytes | None:
    """Encode what a client sends back of a variable, as a frame.

    Without an uplink in the encoding:

    ======================================  ============================================================================
    the variable                            what travels
    ======================================  ============================================================================
    compressed, in one part                 its codes as they are
    compressed, in two parts                the codes of its update as they are
    dense, was sent compressed              the difference to what was sent, in ``update_format`` if the encoding has
                                            one; otherwise its value, in the format that was sent
    dense, was sent in ``unquantized_format``      the difference to what was sent, in ``unquantized_format``
    dense, was sent dense                   no frame
    ======================================  ============================================================================

    What is encoded here is transformed and rounded as the encoding says, with its seed.

    With an uplink the change since the variable arrived travels in the uplink's method, for all of these but variables
    that were sent dense and are not among ``unquantized``. It is rounded stochastically, whatever the encoding's
    rounding, once and on a scale of its own, with a seed that follows from the encoding's. Of a variable in two parts
    the change is its update, whose codes travel as they are if they are of that method already.

    Args:
        value: the variable after training, of any shape, on any device; float32 if it was sent as a frame.
        sent: what the client received of the variable: a frame; or, for a variable among ``unquantized``, its values.
            None stands for any other variable. A compressed variable needs it in one part only, for entropy coding or
            for an uplink.
        config: what the server asked for; None if it asked for nothing.
        name: the variable's name, for the random draws and for errors.

    Returns:
        The frame, or None if the variable travels as plain values.

    Raises:
        NonFiniteError: a value or a difference is NaN or infinite.
        PayloadError: the value's shape or dtype is not that of what was sent.
        PolicyError: entropy coding is asked for, but zstandard is not installed.
    """
    shape, coded = tuple(value.shape), config is not None and config.entropy_coding
    if sent is not None and (shape != tuple(sent.shape) or value.dtype != torch.float32):
        raise PayloadError(
            f"{name} goes back as {value.dtype} {shape}, but came as torch.float32 {tuple(sent.shape)}: "
            "return what was received, trained"
        )
    update = value.update if is_compressed(value) else None
    if config is not None and config.uplink is not None and (sent is not None or update is not None):
        if update is None or update.method != config.uplink:
            update = encoded_change(value, sent, config.encoding, name)
        return frame.to_bytes(update, shape, frame.UPDATE, name, lossless=coded)
    if is_compressed(value):
        if update is not None:
            return frame.to_bytes(update, shape, frame.UPDATE, name, lossless=coded)
        codes = sent.packed if isinstance(sent, frame.Frame) else None
        return frame.to_bytes(value.base, shape, frame.VARIABLE, name, lossless=coded, sent=codes)
    if not isinstance(sent, frame.Frame) or config is None:
        return None
    if sent.kind == frame.VARIABLE and config.encoding.update_format is None:
        return value_frame(value, sent.packed.method, config, name, sent.packed)
    format = config.encoding.update_format if sent.kind == frame.VARIABLE else config.unquantized_format
    if format is None:
        raise PayloadError(f"{name} came as a frame of kind {sent.kind}, but the sender names no format for it")
    change = sent.packed.add_to(_flat(value).to(torch.float32, copy=True), -1.0)
    return change_frame(change.view(shape), format, config, name)


def value_frame(value: Tensor, format: Method, config: UplinkConfig, name: str, sent: Packed | None = None) -> bytes:
    """Encode the values of a dense variable, as a frame of the kind ``VARIABLE``.

    Args:
        value: float32, of any shape, on any device.
        format: the format to encode it in.
        config: what the server asked for.
        name: the variable's name, for the random draws and for errors.
        sent: what the client received of the variable, if it came compressed. A variable that still has these values
            goes back as it came, since encoding it again may move values.

    Raises:
        NonFiniteError: a value is NaN or infinite.
        PolicyError: entropy coding is asked for, but zstandard is not installed.
    """
    flat = _flat(value)
    unchanged = sent is not None and sent.method == format and _holds(sent, flat)
    packed = sent if sent is not None and unchanged else _encode(flat, format, config.encoding, name)
    shape, coded = tuple(value.shape), config.entropy_coding
    return frame.to_bytes(packed, shape, frame.VARIABLE, name, lossless=coded, sent=sent)


def change_frame(change: Tensor, format: Method, config: UplinkConfig, name: str) -> bytes:
    """Encode what a client changed of a variable, as a frame of the kind ``UPDATE``.

    Args:
        change: the difference to what was sent, float32, of any shape, on any device.
        format: the format to encode it in.
        config: what the server asked for.
        name: the variable's name, for the random draws and for errors.

    Raises:
        NonFiniteError: a difference is NaN or infinite.
        PolicyError: entropy coding is asked for, but zstandard is not installed.
    """
    packed = _encode(_flat(change), format, config.encoding, name)
    return frame.to_bytes(packed, tuple(change.shape), frame.UPDATE, name, lossless=config.entropy_coding)


def encoded_change(value: Tensor, sent: Sent | None, encoding: Encoding, name: str) -> Packed:
    """Encode the change of a variable since it arrived in the uplink's method, a chunk at a time.

    Args:
        value: the variable, dense or compressed.
        sent: what the client received of it; None for a variable in two parts, whose change is its update.
        encoding: the encoding, with an uplink.
        name: the variable's name.

    Raises:
        NonFiniteError: a change is NaN or infinite.
    """
    assert encoding.uplink is not None
    update = value.update if is_compressed(value) else None
    flat = value if is_compressed(value) else value.detach().reshape(-1)

    def change(start: int, stop: int) -> Tensor:
        if update is not None:
            return update.decode(
                torch.empty(stop - start, dtype=torch.float32, device=update.codes.device), start
            ).cpu()
        present = flat.decode_range(start, stop) if is_compressed(flat) else flat[start:stop]
        part = present.to("cpu", torch.float32, copy=True)
        if isinstance(sent, Tensor):
            return part.sub_(sent.reshape(-1)[start:stop])
        assert sent is not None
        return sent.packed.add_to(part, -1.0, start)

    packed = Packed.zeros(encoding.uplink, value.numel(), "cpu")
    # A seed of its own: the first local step must not have been rounded by the same random bits.
    packed.rewrite(change, "", "stochastic", draw_seed(encoding.seed, "uplink", 0), name)
    return packed


def _flat(value: Tensor) -> Tensor:
    return value.detach().cpu().reshape(-1)


def _encode(values: Tensor, format: Method, encoding: Encoding, name: str) -> Packed:
    """Encode as the encoding says, in a format that may be another than its own."""
    return encode(values, format, encoding.transform, encoding.rounding, encoding.seed, name)


def _holds(packed: Packed, values: Tensor) -> bool:
    """Tell whether a packed variable has these values, a chunk at a time."""
    return all(
        torch.equal(packed.decode(torch.empty(len(part), dtype=torch.float32, device="cpu"), start), part)
        for start in range(0, len(values), CHUNK)
        for part in (values[start : start + CHUNK],)
    )
