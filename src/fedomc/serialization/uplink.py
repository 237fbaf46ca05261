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
from fedomc.serialization import frame
from fedomc.tensor.compressed import is_compressed


@dataclass(frozen=True)
class UplinkConfig:
    """How a server asks a client to encode its reply.

    Attributes:
        encoding: the encoding of the variables that the client keeps compressed.
        entropy_coding: whether the client's frames are entropy coded.
        unquantized_format: the format of the variables that partial quantization leaves unquantized; None is FP32.
    """

    encoding: Encoding
    entropy_coding: bool = False
    unquantized_format: Method | None = None


def reply_frame(value: Tensor, sent: frame.Frame | None, config: UplinkConfig | None, name: str) -> bytes | None:
    """Encode what a client sends back of a variable, as a frame.

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

    Args:
        value: the variable after training, of any shape, on any device; float32 if it was sent as a frame.
        sent: the frame that the client received of the variable; None if it was sent dense. A compressed variable needs
            it only for entropy coding.
        config: what the server asked for; None if it asked for nothing.
        name: the variable's name, for the random draws and for errors.

    Returns:
        The frame, or None if the variable travels as plain values.

    Raises:
        NonFiniteError: a value or a difference is NaN or infinite.
        PayloadError: the value's shape or dtype is not that of the frame that was sent.
        PolicyError: entropy coding is asked for, but zstandard is not installed.
    """
    shape, coded = tuple(value.shape), config is not None and config.entropy_coding
    if sent is not None and (shape != sent.shape or value.dtype != torch.float32):
        raise PayloadError(
            f"{name} goes back as {value.dtype} {shape}, but came as torch.float32 {sent.shape}: "
            "return what was received, trained"
        )
    if is_compressed(value):
        if value.update is not None:
            return frame.to_bytes(value.update, shape, frame.UPDATE, name, lossless=coded)
        codes = None if sent is None else sent.packed
        return frame.to_bytes(value.base, shape, frame.VARIABLE, name, lossless=coded, sent=codes)
    if sent is None or config is None:
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
