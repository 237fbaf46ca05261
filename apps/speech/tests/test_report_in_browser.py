"""The report in Chromium: as wide as a phone and as a desk, with charts, and with what a screen reader needs."""

import html
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from fedomc_speech import report
from fedomc_speech.settings import Settings

pytestmark = pytest.mark.browser

HISTORY = [{"round": i, "wer": 90.0 / i, "down_bytes": 4e8 * i, "up_bytes": 3e8 * i} for i in range(1, 6)]
RUNS = [
    {
        "variant": variant, "finished": True, "rounds": 5, "wer": 18.0, "wer_compressed": 18.2,
        "parameter_bytes": 1.33e6, "parameter_ratio": 0.319, "down_bytes": 821e6, "down_ratio": 0.197,
        "up_bytes": 0.56e6, "up_ratio": 0.135, "rounds_per_minute": 81.0, "history": HISTORY,
    }
    for variant in ("FP32", "S1E3M7", "S1E2M3+S1E3M0")
]  # fmt: skip

PROBE = """
const frame = document.querySelector("iframe");
const probe = () => {
  const page = frame.contentDocument, root = page.documentElement;
  const box = element => { const { width, height } = element.getBoundingClientRect(); return [width, height]; };
  const scrolling = [...page.querySelectorAll("*")].filter(
    element => ["auto", "scroll"].includes(frame.contentWindow.getComputedStyle(element).overflowX)
  );
  document.title = JSON.stringify({
    width: frame.contentWindow.innerWidth, page: root.scrollWidth,
    charts: [...page.querySelectorAll("figure > svg")].map(svg => [svg.getAttribute("role"),
      svg.getAttribute("aria-label"), ...box(svg)]),
    curves: [...page.querySelectorAll("svg [id^=line2d] path")].filter(path => box(path)[0] > 20).length,
    tables: [...page.querySelectorAll("table")].map(table => ({
      caption: table.caption && table.caption.innerText, columns: table.querySelectorAll("thead th[scope=col]").length,
      rows: table.querySelectorAll("tbody th[scope=row]").length, box: box(table),
      described: !!page.getElementById(table.getAttribute("aria-describedby")),
    })),
    scrolling: scrolling.map(element => {
      element.focus();
      return [element.getAttribute("aria-label"), element.tabIndex, page.activeElement === element];
    }),
    title: page.title, language: root.lang, headings: page.querySelectorAll("h1").length,
    outside: frame.contentWindow.performance.getEntriesByType("resource").length,
  });
};
if (frame.contentDocument.readyState === "complete" && frame.contentDocument.body.innerText) probe();
else frame.addEventListener("load", probe);
"""


def opened(folder: Path, width: int) -> tuple[dict[str, Any], str]:
    """Open the report in a window of a width, and give what the page shows and what the browser's console says."""
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        pytest.fail("no browser to open the report in: apt-get install chromium", pytrace=False)
    text = report.write_report(folder, Settings(corpus_path="", rounds=5), RUNS).read_text()
    around = folder / "around.html"
    frame = f'<iframe width="{width}" height="800" style="border: 0" srcdoc="{html.escape(text)}"></iframe>'
    around.write_text(f"<!doctype html><meta charset='utf-8'>{frame}<script>{PROBE}</script>")
    done = subprocess.run(  # noqa: S603
        [chromium, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--window-size=1600,1000",
         f"--user-data-dir={folder / 'profile'}", "--virtual-time-budget=5000", "--dump-dom", around.as_uri()],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    titles = re.findall(r"<title>(\{.*?\})</title>", done.stdout)
    assert titles, "the page was not measured: " + done.stderr
    return json.loads(html.unescape(titles[0])), done.stderr


@pytest.mark.parametrize("width", [360, 1280])
def test_the_report_is_whole_in_a_browser(tmp_path: Path, width: int) -> None:
    page, console = opened(tmp_path, width)
    assert "CONSOLE" not in console
    assert page["width"] == width and page["page"] <= width
    [(role, label, chart_width, chart_height)] = page["charts"]
    assert role == "img" and "Word error rate" in label and chart_width > 300 and chart_height > 100
    assert page["curves"] >= 2 * len(RUNS)
    [table] = page["tables"]
    assert table["caption"] == "Results by format" and table["columns"] == 7 and table["rows"] == len(RUNS)
    assert table["described"] and min(table["box"]) > 50
    assert page["scrolling"] == [["Results", 0, True], ["Curves", 0, True]]
    assert page["title"] and page["language"] == "en" and page["headings"] == 1 and page["outside"] == 0
