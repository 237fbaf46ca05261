"""What a client sends back of a variable: the one place that decides it, whatever carries the bytes."""

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
    how, flat = config.encoding, value.detach().cpu().reshape(-1)
    if sent.kind == frame.VARIABLE and how.update_format is None:
        # What the client did not change goes back as it came: encoding again may move values.
        packed = sent.packed if _holds(sent.packed, flat) else encode_reply(flat, sent.packed.method, how, name)
        return frame.to_bytes(packed, shape, frame.VARIABLE, name, lossless=coded, sent=sent.packed)
    format = how.update_format if sent.kind == frame.VARIABLE else config.unquantized_format
    if format is None:
        raise PayloadError(f"{name} came as a frame of kind {sent.kind}, but the sender names no format for it")
    change = sent.packed.add_to(flat.to(torch.float32, copy=True), -1.0)
    return frame.to_bytes(encode_reply(change, format, how, name), shape, frame.UPDATE, name, lossless=coded)


def encode_reply(values: Tensor, format: Method, encoding: Encoding, name: str) -> Packed:
    """Encode values or differences that go back: as the encoding says, in a format that may be another than its own."""
    return encode(values, format, encoding.transform, encoding.rounding, encoding.seed, name)


def _holds(packed: Packed, values: Tensor) -> bool:
    """Tell whether a packed variable has these values, a chunk at a time."""
    return all(
        torch.equal(packed.decode(torch.empty(len(part), dtype=torch.float32, device="cpu"), start), part)
        for start in range(0, len(values), CHUNK)
        for part in (values[start : start + CHUNK],)
    )
