"""The config record by which a server tells a client how to encode its reply."""

from collections.abc import Mapping, Sequence
from typing import Any

from flwr.app import ConfigRecord

from fedomc.errors import OMCError, PayloadError
from fedomc.methods import Encoding, Method, parse_method
from fedomc.serialization import frame
from fedomc.serialization.uplink import UplinkConfig

CONFIG = "fedomc"
"""The name of the ``ConfigRecord`` in a message."""


def to_config(
    encoding: Encoding,
    *,
    entropy_coding: bool = False,
    unquantized_format: Method | None = None,
    unquantized: Sequence[str] = (),
) -> ConfigRecord:
    """Make the record that ``from_config`` reads; the arguments are the attributes of ``UplinkConfig``."""
    record = ConfigRecord({**frame.encoding_fields(encoding), "entropy_coding": entropy_coding})
    if unquantized_format is not None:
        record["unquantized_format"] = str(unquantized_format)
    if unquantized:
        record["unquantized"] = list(unquantized)
    return record


def from_config(config: Mapping[str, Any]) -> UplinkConfig:
    """Read the record of a message.

    Raises:
        PayloadError: a field is missing or invalid.
    """
    try:
        entropy_coding, unquantized = config.get("entropy_coding", False), config.get("unquantized_format")
        if type(entropy_coding) is not bool:
            raise PayloadError(f"entropy_coding={entropy_coding!r} is neither true nor false")
        names = config.get("unquantized", [])
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise PayloadError(f"unquantized={names!r} is not a list of names")
        encoding = frame.read_encoding(config)
        format = None if unquantized is None else parse_method(unquantized)
        return UplinkConfig(encoding, entropy_coding, format, frozenset(names))
    except OMCError as error:
        raise PayloadError(f"the message's {CONFIG!r} record: {error}") from None
