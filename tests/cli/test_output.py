import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedomc.cli.output import folded, human_bytes, print_table, printable


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1.00 kB"), (4160000, "4.16 MB"), (10**15, "1000.00 TB")],
)
def test_bytes_have_a_unit(count: int, text: str) -> None:
    assert human_bytes(count) == text


@given(st.text())
def test_what_is_printed_moves_no_cursor(text: str) -> None:
    shown = printable(text)
    assert shown.isprintable() and (shown == text) == text.isprintable()


def test_without_the_extra_one_line_says_how_to_install_it() -> None:
    script = "import sys; sys.modules['typer'] = None; import fedomc.cli; fedomc.cli.main()"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)  # noqa: S603
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and "fedomc[cli]" in done.stderr


def test_help_lists_the_commands() -> None:
    script = "import sys; sys.argv = ['fedomc', '--help']; import fedomc.cli; fedomc.cli.main()"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)  # noqa: S603
    assert all(command in done.stdout for command in ("info", "inspect", "compress", "bench"))


@given(st.text(), st.integers(1, 100))
def test_folding_loses_nothing(text: str, width: int) -> None:
    pieces = folded(text, width)
    assert "".join(pieces) == text and max(map(len, pieces)) <= width


@pytest.mark.parametrize("terminal", [True, False])
def test_long_names_fit_a_terminal_and_keep_their_line_in_a_file(
    terminal: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    name = ".".join(map(str, range(60)))
    monkeypatch.setattr(sys.stdout, "isatty", lambda: terminal)
    monkeypatch.setenv("COLUMNS", "80")
    print_table(("bytes", "variable"), [("4.16 MB", name)])
    lines = capsys.readouterr().out.splitlines()
    assert "".join(line[9:] for line in lines[1:]) == name
    assert max(map(len, lines)) <= 80 if terminal else len(lines) == 2
