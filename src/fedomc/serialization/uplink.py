"""What a client sends back of a variable, and how a server asks for it."""

from dataclasses import dataclass

from fedomc.codec.elements import FloatFormat
from fedomc.methods.packed import Encoding


@dataclass(frozen=True)
class UplinkConfig:
    """How a server asks a client to encode its reply.

    Attributes:
        encoding: the encoding of the variables that the client keeps compressed.
        lossless: whether the client's frames are entropy coded.
        rest_format: the format in which the variables travel that partial quantization leaves in FP32; None is FP32.
    """

    encoding: Encoding
    lossless: bool = False
    rest_format: FloatFormat | None = None
