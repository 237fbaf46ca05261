"""The client's uplink: decides how each trained variable is encoded in a reply, for every transport.

``reply_frame`` chooses between the value and the change of a variable, depending on what the client received.
``value_frame``, ``change_frame`` and ``uplink_frame`` encode either of them, for transports on which the client itself
makes that choice.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fedomc.codec import CHUNK
from fedomc.errors import PayloadError
from fedomc.methods import Encoding, Method, Packed, encode, parse_method
from fedomc.methods.packed import draw_seed
from fedomc.serialization import frame
from fedomc.tensor.compressed import is_compressed
from fedomc.tensor.dtypes import DTYPES

Sent = frame.Frame | Tensor
"""A variable as a client received it: a frame, or its values."""


RESIDUAL = parse_method("S1E4M3")
"""The format of residuals. Training with error feedback gave the same results as with residuals in FP32."""


@dataclass
class Feedback:
    """Error feedback for one variable: what earlier changes lost on their way is added to the next one.

    With feedback a change is encoded with the least squared error instead of without bias, as what one reply lacks is
    part of a later one (Karimireddy et al., arXiv 1901.09847).

    Attributes:
        residual: what the receiver still lacks of the changes so far, in any method; None if nothing. It is replaced
            when a change is encoded.
    """

    residual: Packed | None = None


@dataclass(frozen=True)
class UplinkConfig:
    """How a server asks a client to encode its reply.

    Attributes:
        encoding: the encoding of the variables that the client keeps compressed, including the method of their uplink.
        entropy_coding: whether the client's frames are entropy coded.
        unquantized_format: the format of the variables that partial quantization leaves unquantized; None is FP32.
        unquantized: the names of those variables that are sent in FP32 and whose change returns by the uplink's method.
    """

    encoding: Encoding
    entropy_coding: bool = False
    unquantized_format: Method | None = None
    unquantized: frozenset[str] = frozenset()

    @property
    def uplink(self) -> Method | None:
        """The method in which changes are sent back; None if the variables are sent back as the client holds them."""
        return self.encoding.uplink

    def asks_for_change(self, name: str) -> bool:
        """Return whether the change of a variable that was sent in FP32 is sent back by the uplink's method."""
        return self.uplink is not None and name in self.unquantized


def reply_frame(
    value: Tensor, sent: Sent | None, config: UplinkConfig | None, name: str, feedback: Feedback | None = None
) -> bytes | None:
    """Encode a trained variable as the frame that a client sends back.

    Without an uplink method in the encoding:

    =========================================  =========================================================================
    variable                                   content of the frame
    =========================================  =========================================================================
    compressed, one part                       its codes, unchanged
    compressed, two parts                      the codes of its update, unchanged
    dense, received compressed                 its change, in ``update_format`` if the encoding has one; otherwise its
                                               value, in the format in which a client holds it
    dense, received in ``unquantized_format``  its change, in ``unquantized_format``
    dense, received dense                      no frame
    =========================================  =========================================================================

    Values and changes of dense variables are transformed and rounded as the encoding says, with its seed.

    With an uplink method, the frame contains the change of the variable by that method in every case, except for
    variables that were received dense and are not in ``unquantized``. The change is rounded once, on its own scale and
    always stochastically, with a seed derived from that of the encoding. The change of a variable in two parts is its
    update; its codes are sent unchanged if they already are in the uplink's method. With ``feedback``, what
    earlier replies lost is added, and the sum is encoded with the least squared error instead.

    Args:
        value: the variable after training, of any shape, on any device; of one of ``DTYPES`` if it was received as
            a frame.
        sent: the variable as the client received it: a frame, or its values if its name is in ``unquantized``; None
            for any other variable. For a compressed variable, it is only needed if that has one part, and only for
            entropy coding or for an uplink method.
        config: the server's request; None if there is none.
        name: the variable's name, for random draws and error messages.
        feedback: error feedback; only an uplink method uses it.

    Returns:
        The frame, or None if the variable is sent as plain values.

    Raises:
        NonFiniteError: a value or a change is NaN or infinite.
        PayloadError: the shape or dtype differs from that of the received variable.
        PolicyError: entropy coding is requested, but zstandard is not installed.
    """
    shape, coded = tuple(value.shape), config is not None and config.entropy_coding
    if sent is not None and (shape != tuple(sent.shape) or value.dtype not in DTYPES):
        raise PayloadError(
            f"{name} is returned as {value.dtype} {shape}, but was received compressed, as {tuple(sent.shape)}: "
            "return the trained variable with its original dtype and shape"
        )
    update = _update_of(value)
    if config is not None and config.uplink is not None and (sent is not None or update is not None):
        return uplink_frame(value, sent, config, name, feedback)
    if is_compressed(value):
        if update is not None:
            return frame.to_bytes(update, shape, frame.UPDATE, name, lossless=coded)
        codes = sent.packed if isinstance(sent, frame.Frame) else None
        return frame.to_bytes(value.base, shape, frame.VARIABLE, name, lossless=coded, sent=codes)
    if not isinstance(sent, frame.Frame) or config is None:
        return None
    if sent.kind == frame.VARIABLE and config.encoding.update_format is None:
        held = sent.packed.method if config.encoding.downlink is None else config.encoding.format
        return value_frame(value, held, config, name, sent.packed)
    format = config.encoding.update_format if sent.kind == frame.VARIABLE else config.unquantized_format
    if format is None:
        raise PayloadError(
            f"{name} was received as a frame of kind {sent.kind}, but the server's config names no format for its "
            "change: use the same version of fedomc on the server and the clients"
        )
    change = sent.packed.add_to(_flat(value).to(torch.float32, copy=True), -1.0)
    return change_frame(change.view(shape), format, config, name)


def value_frame(value: Tensor, format: Method, config: UplinkConfig, name: str, sent: Packed | None = None) -> bytes:
    """Encode the values of a dense variable as a frame of the kind ``VARIABLE``.

    Args:
        value: float32, of any shape, on any device.
        format: the format of the frame.
        config: the server's request.
        name: the variable's name, for random draws and error messages.
        sent: the variable as the client received it, if it was compressed. If its values have not changed, these codes
            are sent back, because encoding the values again could move them.

    Raises:
        NonFiniteError: a value is NaN or infinite.
        PolicyError: entropy coding is requested, but zstandard is not installed.
    """
    flat = _flat(value)
    unchanged = sent is not None and sent.method == format and _holds(sent, flat)
    packed = sent if sent is not None and unchanged else _encode(flat, format, config.encoding, name)
    shape, coded = tuple(value.shape), config.entropy_coding
    return frame.to_bytes(packed, shape, frame.VARIABLE, name, lossless=coded, sent=sent)


def change_frame(change: Tensor, format: Method, config: UplinkConfig, name: str) -> bytes:
    """Encode the change that training made to a variable, as a frame of the kind ``UPDATE``.

    Args:
        change: the trained minus the received values, float32, of any shape, on any device.
        format: the format of the frame.
        config: the server's request.
        name: the variable's name, for random draws and error messages.

    Raises:
        NonFiniteError: a change is NaN or infinite.
        PolicyError: entropy coding is requested, but zstandard is not installed.
    """
    packed = _encode(_flat(change), format, config.encoding, name)
    return frame.to_bytes(packed, tuple(change.shape), frame.UPDATE, name, lossless=config.entropy_coding)


def uplink_frame(
    value: Tensor, sent: Sent | None, config: UplinkConfig, name: str, feedback: Feedback | None = None
) -> bytes:
    """Encode the change of a variable in the method of the uplink; arguments and errors as in ``reply_frame``.

    Of a dense variable without ``sent`` the value is the change.
    """
    update = _update_of(value)
    corrected = feedback is not None and feedback.residual is not None
    if update is None or update.method != config.uplink or corrected:
        update = encoded_change(value, sent, config.encoding, name, feedback)
    return frame.to_bytes(update, tuple(value.shape), frame.UPDATE, name, lossless=config.entropy_coding)


def encoded_change(
    value: Tensor, sent: Sent | None, encoding: Encoding, name: str, feedback: Feedback | None = None
) -> Packed:
    """Encode the change that training made to a variable by the uplink's method, one chunk at a time.

    Args:
        value: the variable, dense or compressed.
        sent: the variable as the client received it; None for a variable in two parts, whose change is its update,
            and for a dense one whose value is the change.
        encoding: the encoding, which has an uplink method.
        name: the variable's name, for error messages.
        feedback: error feedback, whose residual has as many values as the variable.

    Raises:
        NonFiniteError: a change is NaN or infinite.
    """
    assert encoding.uplink is not None
    for part in value.parts if is_compressed(value) else ():
        part.check()
    update = _update_of(value)
    flat = value if is_compressed(value) else value.detach().reshape(-1)

    def change(start: int, stop: int) -> Tensor:
        if update is not None:
            return update.decode(
                torch.empty(stop - start, dtype=torch.float32, device=update.codes.device), start
            ).cpu()
        present = flat.decode_range(start, stop) if is_compressed(flat) else flat[start:stop]
        part = present.to("cpu", torch.float32, copy=True)
        if sent is None:
            return part
        if isinstance(sent, Tensor):
            return part.sub_(sent.reshape(-1)[start:stop])
        return sent.packed.add_to(part, -1.0, start)

    packed = Packed.zeros(encoding.uplink, value.numel(), "cpu")
    # A separate seed, because the first local step must not be rounded with the same random bits.
    seed = draw_seed(encoding.seed, "uplink", 0)
    if feedback is None:
        packed.rewrite(change, "", "stochastic", seed, name)
    else:
        _encode_corrected(change, packed, seed, name, feedback)
    return packed


def _encode_corrected(
    change: Callable[[int, int], Tensor], packed: Packed, seed: int, name: str, feedback: Feedback
) -> None:
    """Encode a change and the residual of earlier ones, and replace the residual by what is still lacking."""
    former = feedback.residual

    def corrected(start: int, stop: int) -> Tensor:
        part = change(start, stop)
        return part if former is None else former.add_to(part, 1.0, start)

    def lacking(start: int, stop: int) -> Tensor:
        return packed.add_to(corrected(start, stop), -1.0, start)

    packed.rewrite(corrected, *packed.method.least_error, seed, name)
    residual = Packed.zeros(RESIDUAL, packed.numel, "cpu")
    residual.rewrite(lacking, "", name=f"the residual of {name}")
    feedback.residual = residual


def _update_of(value: Tensor) -> Packed | None:
    return value.update if is_compressed(value) else None


def _flat(value: Tensor) -> Tensor:
    return value.detach().cpu().reshape(-1)


def _encode(values: Tensor, format: Method, encoding: Encoding, name: str) -> Packed:
    """Encode with the transform, rounding and seed of the encoding, but in the given format."""
    return encode(values, format, encoding.transform, encoding.rounding, encoding.seed, name)


def _holds(packed: Packed, values: Tensor) -> bool:
    """Return whether a packed variable has exactly these values; it is decoded one chunk at a time."""
    return all(
        torch.equal(packed.decode(torch.empty(len(part), dtype=torch.float32, device="cpu"), start), part)
        for start in range(0, len(values), CHUNK)
        for part in (values[start : start + CHUNK].float(),)
    )
