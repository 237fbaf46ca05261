"""The methods that are known: by the name that a user writes, and by the number that a frame has.

To add a method, write a subclass of ``Method`` in a file of its own and register it.
"""

import functools

from fedomc.errors import FormatError
from fedomc.methods.floats import FloatFormat
from fedomc.methods.integers import Int4, Int8
from fedomc.methods.method import Method
from fedomc.methods.microscaling import Microscaling
from fedomc.methods.normal_float import NF4
from fedomc.methods.rotated import Rotated

_BY_TAG: dict[int, type[Method]] = {}


def register(method: type[Method]) -> type[Method]:
    """Make a method known; usable as a decorator.

    Raises:
        FormatError: its tag is not a byte, or is that of another method.
    """
    known = _BY_TAG.setdefault(method.tag, method)
    if known is not method or not 0 <= method.tag <= 255:
        raise FormatError(f"{method.__name__} has the tag {method.tag}, which is {known.__name__}'s or no byte")
    _from_header.cache_clear()
    _parse.cache_clear()
    return method


def unregister(method: type[Method]) -> None:
    """Forget a method."""
    del _BY_TAG[method.tag]
    _from_header.cache_clear()
    _parse.cache_clear()


def registered() -> tuple[type[Method], ...]:
    """Return the methods that are known."""
    return tuple(_BY_TAG.values())


def parse_method(text: str | Method) -> Method:
    """Read the name of a method, such as ``S1E3M7``, ``INT8/128``, ``NF4`` or ``MXFP6``; a method passes through.

    Raises:
        FormatError: there is no such method.
    """
    if isinstance(text, Method):
        return text
    return _parse(text if isinstance(text, str) else repr(text))


def method_from_header(tag: int, data: bytes) -> Method:
    """Read a method as a frame writes it.

    Raises:
        FormatError: there is no such method.
    """
    return _from_header(tag, data)


@functools.cache
def _parse(text: str) -> Method:
    for method in _BY_TAG.values():
        if (found := method.from_name(text)) is not None:
            return found
    names = "S1E<exponent bits>M<mantissa bits> as in S1E3M7, INT8, INT4, NF4, MXFP8, MXFP6 or MXFP4; "
    names += "DRIVE1 or DRIVE2 for an uplink"
    raise FormatError(f"{text!r} is not a number format: write {names}")


@functools.lru_cache(maxsize=1024)  # there are few, and a reply has hundreds of frames
def _from_header(tag: int, data: bytes) -> Method:
    method = _BY_TAG.get(tag)
    if method is None:
        raise FormatError(f"method {tag} is unknown: use a version of fedomc that has it, or register it")
    return method.from_header(data)


for _method in (FloatFormat, Int8, Int4, NF4, Microscaling, Rotated):
    register(_method)
