"""The record with which a server tells a client how to encode its reply."""

from collections.abc import Mapping
from typing import Any

from flwr.app import ConfigRecord

from fedomc.codec.elements import FloatFormat
from fedomc.errors import OMCError, PayloadError
from fedomc.methods.packed import Encoding
from fedomc.serialization import frame
from fedomc.serialization.uplink import UplinkConfig

CONFIG = "fedomc"
"""The name of the ``ConfigRecord`` in a message."""


def to_config(encoding: Encoding, *, lossless: bool = False, rest_format: FloatFormat | None = None) -> ConfigRecord:
    """Write what ``from_config`` reads as an ``UplinkConfig``."""
    rest = {} if rest_format is None else {"rest_format": str(rest_format)}
    return ConfigRecord({**frame.encoding_fields(encoding), "lossless": lossless, **rest})


def from_config(config: Mapping[str, Any]) -> UplinkConfig:
    """Read the record of a message.

    Raises:
        PayloadError: a field is missing or wrong.
    """
    try:
        lossless, rest = config.get("lossless", False), config.get("rest_format")
        if type(lossless) is not bool:
            raise PayloadError(f"lossless={lossless!r} is neither true nor false")
        encoding = frame.read_encoding(config)
        return UplinkConfig(encoding, lossless, None if rest is None else FloatFormat.parse(rest))
    except OMCError as error:
        raise PayloadError(f"the message's {CONFIG!r} record: {error}") from None
