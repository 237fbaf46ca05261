"""What the tests of the kernels share."""

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
