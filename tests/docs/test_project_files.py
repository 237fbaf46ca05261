"""The files that a forge and its tools read are valid, and agree with what they stand for."""

import re
import subprocess
import sys
import tomllib

import pytest
import yaml

import fedomc
from tests.docs.pages import PAGES, REPOSITORY

PYPROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))
WORKFLOWS = sorted((REPOSITORY / ".github" / "workflows").glob("*.yml"))
TEMPLATES = sorted(path for path in (REPOSITORY / ".github" / "ISSUE_TEMPLATE").glob("*.yml") if path.stem != "config")
SCHEMAS = [
    *(("vendor.github-workflows", path) for path in WORKFLOWS),
    *(("vendor.github-issue-forms", path) for path in TEMPLATES),
    ("vendor.github-issue-config", REPOSITORY / ".github" / "ISSUE_TEMPLATE" / "config.yml"),
    ("vendor.citation-file-format", REPOSITORY / "CITATION.cff"),
]


@pytest.mark.parametrize("schema, path", SCHEMAS, ids=lambda each: getattr(each, "name", each))
def test_files_follow_their_schema(schema, path) -> None:  # type: ignore[no-untyped-def]
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", schema, str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_citation_is_of_this_version() -> None:
    citation = yaml.safe_load((REPOSITORY / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == fedomc.__version__ == PYPROJECT["project"]["version"]
    assert citation["license"] == PYPROJECT["project"]["license"]


def test_pre_commit_does_what_make_lint_does() -> None:
    makefile = (REPOSITORY / "Makefile").read_text(encoding="utf-8")
    recipe = re.search(r"^lint:.*\n((?:\t.*\n)+)", makefile, re.MULTILINE)
    assert recipe is not None
    lint = {line.strip().replace("$(BIN)", ".venv/bin") for line in recipe[1].splitlines()}
    hooks = yaml.safe_load((REPOSITORY / ".pre-commit-config.yaml").read_text(encoding="utf-8"))["repos"][0]["hooks"]
    assert len(hooks) == len(lint)
    for hook in hooks:
        assert any(line.startswith(hook["entry"]) for line in lint), hook


def test_the_workflow_has_what_the_project_supports() -> None:
    matrix = yaml.safe_load((REPOSITORY / ".github/workflows/ci.yml").read_text(encoding="utf-8"))
    matrix = matrix["jobs"]["versions"]["strategy"]["matrix"]
    assert matrix["python"][0] == PYPROJECT["project"]["requires-python"].removeprefix(">=")
    text = (REPOSITORY / ".github/workflows/ci.yml").read_text(encoding="utf-8")
    torch = next(each for each in PYPROJECT["project"]["dependencies"] if each.startswith("torch"))
    (flwr,) = PYPROJECT["project"]["optional-dependencies"]["flower"]
    assert f"torch=={torch.removeprefix('torch>=')}.*" in text
    assert re.findall(r"\d+\.\d+", flwr) == re.findall(r"flwr\[simulation\](?:==|<)(\d+\.\d+)", text)


def test_the_support_matrix_has_the_versions_that_are_tested() -> None:
    pinned = dict(re.findall(r"^([\w-]+)==(\S+)$", (REPOSITORY / "constraints.txt").read_text("utf-8"), re.MULTILINE))
    rows = re.findall(r"^\| (\w+) \|[^|]*\| ([\d.]+) \|", PAGES["docs/support.md"], re.MULTILINE)
    tested = {name: version for name, version in rows if name in pinned}
    assert len(tested) >= 7 and tested == {name: pinned[name] for name in tested}
