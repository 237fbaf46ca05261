"""An app's settings are read from a run config, and what is wrong in one is named."""

from dataclasses import asdict, dataclass
from typing import Any

import pytest

from fedomc.errors import OMCError
from fedomc.flower.run_config import read_settings


class SettingsError(OMCError):
    """The error of an app."""


@dataclass(frozen=True)
class Settings:
    """Settings of each kind."""

    local_steps: int = 3
    rate: float = 0.1
    augment: bool = False
    place: str = ""
    formats: tuple[str, ...] = ("FP32",)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({}, Settings()),
        ({"local-steps": 7, "rate": 1}, Settings(local_steps=7, rate=1.0)),
        ({"local_steps": "7", "augment": "true"}, Settings(local_steps=7, augment=True)),
        ({"augment": True, "place": "here"}, Settings(augment=True, place="here")),
        ({"formats": "FP32 S1E3M7@0.9"}, Settings(formats=("FP32", "S1E3M7@0.9"))),
        ({"formats": ["S1E2M3"]}, Settings(formats=("S1E2M3",))),
        (asdict(Settings(rate=0.5, formats=("S1E2M3",))), Settings(rate=0.5, formats=("S1E2M3",))),
    ],
)
def test_values_are_read_by_the_kinds_of_the_defaults(values: dict[str, Any], expected: Settings) -> None:
    assert read_settings(Settings, values, SettingsError) == expected


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"colour": 3}, r"^setting 'colour' is unknown: there are local_steps, rate, augment, place, formats$"),
        ({"local-steps": 2.5}, r"^local-steps=2.5: a value of type int is expected$"),
        ({"local-steps": float("inf")}, "local-steps=inf"),
        ({"rate": "fast"}, r"^rate='fast': a value of type float"),
        ({"augment": "yes"}, r"^augment='yes': a value of type bool"),
        ({"augment": [True]}, "augment="),
    ],
)
def test_what_is_wrong_is_named_in_the_apps_own_error(values: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        read_settings(Settings, values, SettingsError)
