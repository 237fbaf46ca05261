"""The runner itself notices what a page gets wrong."""

from pathlib import Path

import pytest

from tests.docs.execution import execute, matches

PYTHON = "```python\n{}\n```\n\n```text\n{}\n```\n"


@pytest.mark.parametrize(
    "text",
    [
        PYTHON.format("print(1)", "1"),
        PYTHON.format("print('a b c')", "a ... c"),
        PYTHON.format("raise ValueError('no 7')", "ValueError: no ..."),
        PYTHON.format("import warnings; warnings.warn('old')", "UserWarning: old"),
        "```console\npip install '.[flower,cli]'  # both\nmake test\npython -m benchmarks.codec\n```\n",
        "<!-- not run: it needs another machine -->\n```console\nreboot\n```\n",
    ],
)
def test_what_is_right_passes(text: str) -> None:
    execute("page", text)


@pytest.mark.parametrize(
    "text",
    [
        PYTHON.format("print(1)", "2"),
        PYTHON.format("print(1)", "ValueError: none"),
        PYTHON.format("raise ValueError('no 7')", "ValueError: no 8"),
        PYTHON.format("raise ValueError('no 7')", "TypeError: no 7"),
        "```console\npip install '.[flow]'\n```\n",
        "```console\npip install some-package\n```\n",
        "```console\nmake tests-all\n```\n",
        "```console\npython -m benchmarks.codex\n```\n",
        "```console\npython -m benchmarks.codec --no-such-option\n```\n",
        "```console\nfedomc inspect missing.safetensors\n```\n",
        "```console\nreboot\n```\n",
        "```ruby\nputs 1\n```\n",
    ],
)
def test_what_is_wrong_fails(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(AssertionError):
        execute("page", text)


def test_an_error_that_the_page_does_not_have_escapes() -> None:
    with pytest.raises(ZeroDivisionError):
        execute("page", "```python\n1 / 0\n```\n")


def test_dots_stand_for_anything() -> None:
    assert matches("a ... c", "a b\nb c") and not matches("a ... c", "a b") and not matches("a.c", "abc")
