"""The registry of compression methods, which looks them up by the user's name or by the tag in a frame.

To add a method, write a subclass of ``Method`` in a separate module and register it.
"""

import functools

from fedomc.errors import FormatError
from fedomc.methods.block_floats import BlockFloat
from fedomc.methods.floats import FloatFormat
from fedomc.methods.integers import Int4, Int8
from fedomc.methods.method import Method
from fedomc.methods.microscaling import Microscaling
from fedomc.methods.normal_float import NF4
from fedomc.methods.rotated import Rotated

_BY_TAG: dict[int, type[Method]] = {}


def register(method: type[Method]) -> type[Method]:
    """Register a method; usable as a decorator.

    Raises:
        FormatError: the tag does not fit into a byte, or belongs to another method.
    """
    known = _BY_TAG.setdefault(method.tag, method)
    if known is not method or not 0 <= method.tag <= 255:
        raise FormatError(
            f"{method.__name__} has the tag {method.tag}, which is that of {known.__name__} or does not fit into a byte"
        )
    _from_header.cache_clear()
    _parse.cache_clear()
    return method


def unregister(method: type[Method]) -> None:
    """Remove a method from the registry."""
    del _BY_TAG[method.tag]
    _from_header.cache_clear()
    _parse.cache_clear()


def registered() -> tuple[type[Method], ...]:
    """Return the registered methods."""
    return tuple(_BY_TAG.values())


def parse_method(text: str | Method) -> Method:
    """Parse a method's name, such as ``S1E3M7``, ``INT8/128``, ``NF4`` or ``MXFP6``; return a ``Method`` unchanged.

    Raises:
        FormatError: no method has this name.
    """
    if isinstance(text, Method):
        return text
    return _parse(text if isinstance(text, str) else repr(text))


def method_from_header(tag: int, data: bytes) -> Method:
    """Reconstruct a method from its tag and header in a frame.

    Raises:
        FormatError: the tag is unknown, or the header does not describe a valid method.
    """
    return _from_header(tag, data)


@functools.cache
def _parse(text: str) -> Method:
    for method in _BY_TAG.values():
        if (found := method.from_name(text)) is not None:
            return found
    names = "S1E<exponent bits>M<mantissa bits> as in S1E3M7, the same with a scale for each block as in S1E2M3/64, "
    names += "INT8, INT4, NF4, MXFP8, MXFP6 or MXFP4; DRIVE1 or DRIVE2 for an uplink"
    raise FormatError(f"{text!r} is not a number format: write {names}")


@functools.lru_cache(maxsize=1024)  # few methods exist, and a reply has hundreds of frames
def _from_header(tag: int, data: bytes) -> Method:
    method = _BY_TAG.get(tag)
    if method is None:
        raise FormatError(f"method {tag} is unknown: use a version of fedomc that has it, or register it")
    return method.from_header(data)


for _method in (FloatFormat, Int8, Int4, NF4, Microscaling, Rotated, BlockFloat):
    register(_method)
