"""Reads an app's settings, a dataclass, from a run config of Flower."""

import dataclasses
from collections.abc import Mapping
from typing import Any, TypeVar

from fedomc.errors import OMCError

_Settings = TypeVar("_Settings")


def read_settings(cls: type[_Settings], values: Mapping[str, Any], error: type[OMCError]) -> _Settings:
    """Read settings from a run config, or from ``dataclasses.asdict`` of other ones.

    Args:
        cls: a dataclass whose fields all have defaults, of which each says the kind of its values: a truth value, a
            number, a text, or a tuple of texts, which a run config has as one text with spaces between them.
        values: the values by name, with dashes or underscores; what is missing has its default.
        error: raised with the name and the value of what is wrong.

    Raises:
        OMCError: ``error``: a name is unknown, or a value is of the wrong kind.

    Example:
        >>> @dataclasses.dataclass
        ... class Settings:
        ...     rounds: int = 20
        ...     formats: tuple[str, ...] = ("FP32",)
        >>> read_settings(Settings, {"formats": "FP32 S1E3M7"}, OMCError)
        Settings(rounds=20, formats=('FP32', 'S1E3M7'))
    """
    fields = {field.name: field for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
    read: dict[str, Any] = {}
    for key, value in values.items():
        name = key.replace("-", "_")
        if name not in fields:
            raise error(f"setting {key!r} is unknown: there are {', '.join(fields)}")
        kind: type[Any] = type(fields[name].default)
        if kind is tuple:
            read[name] = tuple(value.split()) if isinstance(value, str) else tuple(value)
            continue
        try:
            read[name] = _to_bool(value) if kind is bool else kind(value)
            if kind is int and read[name] != float(value):
                raise ValueError
        except (KeyError, TypeError, ValueError, OverflowError):
            raise error(f"{key}={value!r}: a value of type {kind.__name__} is expected") from None
    return cls(**read)


def _to_bool(value: Any) -> bool:
    """Read a truth value as TOML and run configs write it."""
    return value if isinstance(value, bool) else {"true": True, "false": False}[value]
