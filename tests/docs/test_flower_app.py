"""The Flower apps of the pages: Flower finds what their files define, and one runs as its page says."""

import tomllib
from pathlib import Path

import pytest
from flwr.supercore.object_ref import validate

from tests.docs.pages import README, REPOSITORY, blocks
from tests.flwr_run import run_as_page_says

PAGE = "docs/flower.md"


def first_block(page: str, language: str) -> str:
    return next(b.code for b in blocks((REPOSITORY / page).read_text(encoding="utf-8")) if b.language == language)


def after_the_change() -> str:
    (diff,) = [block.code for block in blocks(README) if block.language == "diff"]
    return "\n".join(line[1:] for line in diff.splitlines() if line[:1] != "-")


@pytest.mark.parametrize("page", ["README.md", PAGE, "docs/lora.md"])
def test_flower_finds_the_two_objects_without_running_the_file(page: str, tmp_path: Path) -> None:
    code = after_the_change() if page == "README.md" else first_block(page, "python")
    (tmp_path / "app.py").write_text(code)
    for name in ("server", "client"):
        assert validate(f"app:{name}", project_dir=tmp_path) == (True, None)


def write_app(folder: Path) -> Path:
    """Write the app that the page describes, and return its folder."""
    app = folder / "my-app"
    app.mkdir()
    (app / "app.py").write_text(first_block(PAGE, "python"))
    (app / "pyproject.toml").write_text(first_block(PAGE, "toml"))
    return app


def test_its_settings_name_what_its_file_defines(tmp_path: Path) -> None:
    app = write_app(tmp_path)
    components = tomllib.loads((app / "pyproject.toml").read_text())["tool"]["flwr"]["app"]["components"]
    for reference in components.values():
        assert validate(reference, project_dir=app) == (True, None)


@pytest.mark.deployment
def test_the_app_runs_as_the_page_says(tmp_path: Path) -> None:
    write_app(tmp_path)
    printed = run_as_page_says(PAGE, tmp_path / "flower", nodes=4, app_folder=tmp_path)
    assert "round 3" in printed.lower()
