"""What the tests of the kernels share."""

import dataclasses
from collections.abc import Iterator

import pytest

from fedomc.codec import native


@pytest.fixture(params=native.extension.levels() if native.extension is not None else [])
def level(request: pytest.FixtureRequest) -> Iterator[str]:
    """Run a test at every level of instructions that the processor has."""
    before = native.extension.level()
    native.extension.set_level(request.param)
    yield request.param
    native.extension.set_level(before)


@pytest.fixture
def interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make Triton's interpreter several times faster: few, large programs, and no check of each sum for overflow."""
    interpreter = pytest.importorskip("triton.runtime.interpreter", reason="Triton is not installed")
    builder = interpreter.interpreter_builder
    monkeypatch.setattr(builder, "options", dataclasses.replace(builder.options, sanitize_overflow=False))
    monkeypatch.setattr("fedomc.codec.triton_words.BLOCKS", 8)
