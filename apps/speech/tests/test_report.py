"""The table of results on terminals and in pipes, and the report that opens without a network."""

import io
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from fedomc_speech import report
from fedomc_speech.settings import Settings

CELLS = ("S1E2M3+S1E3M0", "S1E3M7@0.9 to round 2", "3.5%", "3.7%", "1.33 MB (31.9%)", "821.00 MB", "(19.7%)", "13.5%")
HEADERS = ("format", "WER", "packed", "memory", "down", "up", "rounds / min")


def runs() -> list[dict[str, Any]]:
    one = {
        "variant": "S1E2M3+S1E3M0", "finished": True, "rounds": 3, "wer": 3.5, "wer_compressed": 3.7,
        "parameter_bytes": 1.33e6, "parameter_ratio": 0.319, "down_bytes": 821e6, "down_ratio": 0.197,
        "up_bytes": 0.56e6, "up_ratio": 0.135, "rounds_per_minute": 81.0,
        "history": [{"round": 1, "wer": None}, {"round": 2, "wer": 9.0, "down_bytes": 5, "up_bytes": 5}],
    }  # fmt: skip
    return [one, {**one, "variant": "S1E3M7@0.9", "finished": False, "rounds": 2}]


def printed(width: int, terminal: bool) -> list[str]:
    console = Console(file=io.StringIO(), width=width, force_terminal=terminal, color_system=None, _environ={})
    report.print_table(console, runs())
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue().splitlines()


@pytest.mark.parametrize("width", [40, 80, 200])
def test_in_a_pipe_the_table_has_all_columns_and_a_line_for_each_run(width: int) -> None:
    lines = printed(width, terminal=False)
    [header] = [line for line in lines if "format" in line and "┃" in line]
    assert [cell.strip() for cell in header.strip("┃").split("┃")] == list(HEADERS)
    rows = [line for line in lines if line.startswith("│")]
    assert len(rows) == 2 and all(row.endswith("81 │") for row in rows)
    assert all(any(cell in row for row in rows) for cell in CELLS)


@pytest.mark.parametrize("width", [72, 80, 120])
def test_on_a_narrow_terminal_the_table_folds_but_loses_no_column(width: int) -> None:
    lines = printed(width, terminal=True)
    assert all(len(line) <= width for line in lines)
    rows = [line for line in lines if line.startswith("│")]
    assert {row.count("│") for row in rows} == {len(HEADERS) + 1}
    assert sum("81 │" in row for row in rows) == 2


class _Page(HTMLParser):
    """Collects the elements around each table, the meta elements, and the text."""

    def __init__(self) -> None:
        super().__init__()
        self.around: list[list[dict[str, str | None]]] = []
        self.meta: list[dict[str, str | None]] = []
        self.text = ""
        self._open: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "meta":
            self.meta.append(dict(attrs))
            return
        if tag == "table":
            self.around.append([attributes for _, attributes in self._open])
        self._open.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        while self._open and self._open.pop()[0] != tag:
            pass

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture
def page(tmp_path: Path) -> _Page:
    made = _Page()
    made.feed(report.write_report(tmp_path, Settings(corpus_path="", rounds=3), runs()).read_text())
    return made


def test_on_a_phone_the_reports_table_scrolls_by_itself(page: _Page) -> None:
    assert {"name": "viewport", "content": "width=device-width, initial-scale=1"} in page.meta
    [around] = page.around
    assert any(attributes.get("class") == "wide" for attributes in around)
    assert ".wide { overflow-x: auto; }" in page.text


def test_the_report_names_the_settings_that_have_a_value(page: _Page) -> None:
    line = page.text[page.text.index("Settings: ") :].strip().removeprefix("Settings: ")
    named = dict(pair.split("=") for pair in line.split(", "))
    assert named["rounds"] == "3" and named["corpus"] == "digits" and named["augment"] == "False"
    assert all(named.values()) and not {"corpus_path", "transform", "clients"} & set(named)
