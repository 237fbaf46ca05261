"""What applications show: bars or lines, whole tables, amounts, and errors as one line."""

import io

import pytest
import typer
from rich.console import Console
from rich.table import Table

from fedomc.cli import application
from fedomc.cli.application import ProgressBars, clear_errors, megabytes, minutes, print_whole
from fedomc.errors import OMCError


def test_where_there_is_no_terminal_lines_come_from_time_to_time_and_at_the_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = iter([100.0, 101.0, 125.0, 126.0, 127.0])
    monkeypatch.setattr(application.time, "monotonic", lambda: next(now))
    console = Console(file=io.StringIO(), width=20)
    bars = ProgressBars(console, width=8)
    for done in (1, 2, 3, 4):
        bars.show("S1E3M7", done, 4, "", f"{done} of 4, a line that is wider than the console")
    bars.show("FP32", 1, 4, "")
    lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert [line[0] for line in lines] == ["1", "3", "4"] and all(line.endswith("console") for line in lines)


def test_on_a_terminal_there_are_bars() -> None:
    console = Console(file=io.StringIO(), width=100, force_terminal=True)
    with ProgressBars(console, width=8) as bars:
        bars.show("S1E3M7", 3, 4, "loss 1.50", "a line")
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert "S1E3M7" in shown and "3/4" in shown and "loss 1.50" in shown and "a line" not in shown


def test_a_table_in_a_file_is_as_wide_as_it_is() -> None:
    table = Table("column")
    table.add_row("x" * 300)
    console = Console(file=io.StringIO(), width=80)
    print_whole(console, table)
    assert "x" * 300 in console.file.getvalue()  # type: ignore[attr-defined]


@pytest.mark.parametrize(("size", "text"), [(0, "0.00 MB"), (4163924, "4.16 MB"), (2.5e9, "2.50 GB")])
def test_bytes(size: float, text: str) -> None:
    assert megabytes(size) == text


@pytest.mark.parametrize(("seconds", "text"), [(0.4, "0 seconds"), (99.0, "99 seconds"), (600.0, "10 minutes")])
def test_durations(seconds: float, text: str) -> None:
    assert minutes(seconds) == text


def test_an_error_is_one_line_and_an_exit_code(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(typer.Exit) as exit, clear_errors():
        raise OMCError("rounds=[0]: it must be positive")
    assert exit.value.exit_code == 2
    assert capsys.readouterr().err == "error: rounds=[0]: it must be positive\n"
