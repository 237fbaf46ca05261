"""The site is built without a warning and without the network, has every public name, and can be searched from disk."""

import os
import re
import shutil
import subprocess
import sys
import zlib
from pathlib import Path

import pytest

from tests.docs.pages import REPOSITORY
from tests.docs.test_docstrings import PUBLIC

CHROMIUM = shutil.which("chromium")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    done = subprocess.run(  # noqa: S603
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)],
        cwd=REPOSITORY, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert "WARNING" not in done.stderr
    return folder


def test_every_public_name_is_in_the_reference(site: Path) -> None:
    inventory = zlib.decompress((site / "objects.inv").read_bytes().split(b"\n", 4)[4]).decode()
    known = {line.split()[0] for line in inventory.splitlines()}
    public = [f"{module.__name__}.{name}" for module in PUBLIC for name in module.__all__]
    assert len(public) > 60 and [name for name in public if name not in known] == []


def test_no_page_loads_anything_from_elsewhere(site: Path) -> None:
    pages = list(site.rglob("*.html"))
    loaded = r"""<(?:script|link|img|iframe)\b[^>]*\b(?:src|href)="((?:https?:)?//[^"]+)"|@import|url\(["']?https?:"""
    assert len(pages) > 40
    for page in pages:
        assert re.findall(loaded, page.read_text(encoding="utf-8")) == [], page.name


@pytest.mark.browser
def test_a_page_from_disk_can_be_searched(site: Path, tmp_path: Path) -> None:
    if CHROMIUM is None:
        pytest.fail("no browser to search the site in: apt-get install chromium", pytrace=False)
    address = f"{(site / 'index.html').as_uri()}?q=stochastic"
    options = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        f"--user-data-dir={tmp_path}",
        "--virtual-time-budget=10000",
    ]
    done = subprocess.run(  # noqa: S603
        [CHROMIUM, *options, "--dump-dom", address], capture_output=True, text=True, check=True, timeout=120
    )
    found = re.findall(r'<a href="[^"]*/(\w[\w-]*)\.html[^"]*" class="md-search-result__link"', done.stdout)
    assert "rounding" in found
