"""Runs the blocks of a page as a reader would: those in Python one after the other, in one namespace and one folder."""

import contextlib
import io
import re
import shlex
import tomllib
import warnings
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from tests.cli.conftest import run as run_command
from tests.docs.pages import REPOSITORY, Block, blocks

PYPROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))
PACKAGES = re.findall(r"^([\w.-]+)==", (REPOSITORY / "constraints.txt").read_text(encoding="utf-8"), re.MULTILINE)
TARGETS = re.findall(r"^([\w-]+):(?!=)", (REPOSITORY / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
_ELSEWHERE = {"docs/deployment.md": "bash"}
"""Pages whose blocks in a language are run by tests of their own: ``make test-deployment``."""
_REPORT = re.compile(r"(\w+(?:Error|Warning)): (.*)", re.DOTALL)


@dataclass
class Outcome:
    """What a page left behind.

    Attributes:
        names: what its Python defined.
        output: what its Python printed.
        ran: how many blocks were run or checked.
    """

    names: dict[str, Any]
    output: str = ""
    ran: int = 0
    unchecked: list[Block] = field(default_factory=list)


def execute(page: str, text: str) -> Outcome:
    """Run a page in the current folder; what is printed, raised and warned of must be what the page says.

    A block of ``text`` right after one of Python has its output, or the error or warning that it gives, with ``...``
    for what differs. Commands of ``fedomc`` are run; those that install, build or take minutes are checked against what
    exists. A block with a reason in front of it is not run.
    """
    outcome = Outcome({"__name__": Path(page).stem})
    found = blocks(text)
    for block, following in zip(found, [*found[1:], None], strict=True):
        where = f"{page}:{block.line}"
        if block.reason or _ELSEWHERE.get(page) == block.language:
            continue
        if block.language == "python":
            said = following.code.rstrip("\n") if following and following.follows == "python" else None
            outcome.output += _run_python(block, where, outcome.names, said if _is_text(following) else None)
        elif block.language == "console":
            for line in commands(block.code):
                check_command(line, where)
        elif block.language == "toml":
            tomllib.loads(block.code)
        elif block.language == "text":
            if block.follows != "python":
                outcome.unchecked.append(block)
        else:
            raise AssertionError(f"{where}: a block in {block.language or 'no language'}: run it, or say why not")
        outcome.ran += 1
    return outcome


def _is_text(block: Block | None) -> bool:
    return block is not None and block.language == "text"


def _run_python(block: Block, where: str, names: dict[str, Any], said: str | None) -> str:
    code = compile("\n" * (block.line - 1) + block.code, where, "exec")
    report = _REPORT.fullmatch(said or "")
    printed, error = io.StringIO(), None
    with contextlib.redirect_stdout(printed), warnings.catch_warnings(record=True) as given:
        warnings.simplefilter("always")
        try:
            exec(code, names)  # noqa: S102
        except Exception as raised:
            if report is None:
                raise
            error = raised
    if report is not None:
        reported = [error] if error is not None else [each.message for each in given]
        texts = [f"{type(each).__name__}: {each}" for each in reported]
        assert any(matches(said or "", each) for each in texts), f"{where} gives {texts}, but the page says {said}"
    elif said is not None:
        assert matches(said, printed.getvalue().rstrip("\n")), f"{where} prints {printed.getvalue()!r}, not {said!r}"
    return printed.getvalue()


def matches(said: str, real: str) -> bool:
    """Tell whether a text is what a page says, with ``...`` for anything."""
    return re.fullmatch(".*".join(map(re.escape, said.split("..."))), real, re.DOTALL) is not None


def commands(code: str) -> list[list[str]]:
    """Split a block of commands into their words, without comments, settings and the folder of the environment."""
    lines = [shlex.split(line, comments=True) for line in code.replace("\\\n", " ").splitlines()]
    found = []
    for words in filter(None, lines):
        while re.fullmatch(r"[A-Z_]+=.*", words[0]):
            words = words[1:]
        found.append([words[0].removeprefix(".venv/bin/"), *words[1:]])
    return found


def check_command(words: list[str], where: str) -> None:
    """Run a command of ``fedomc``; of others, check that what they name exists."""
    match words:
        case ["fedomc", *arguments]:
            result = run_command(*arguments)
            assert result.exit_code == 0 and result.stdout and not result.stderr, f"{where}: {words}: {result.output}"
        case ["pip", "install", "--constraint", file, *arguments]:
            assert (REPOSITORY / file).is_file(), f"{where}: {file} does not exist"
            check_command(["pip", "install", *arguments], where)
        case ["pip", "install", *arguments]:
            for argument in arguments:
                _check_installable(argument, where)
        case ["make", *arguments]:
            for target in (each for each in arguments if "=" not in each):
                assert target in TARGETS, f"{where}: the Makefile has no target {target}"
        case ["python", "-m", module, *arguments]:
            _check_module(module, arguments, where)
        case ["python", script, *_]:
            assert (REPOSITORY / script).is_file(), f"{where}: {script} does not exist"
        case _:
            raise AssertionError(f"{where}: {shlex.join(words)}: run it, or say why not")


def _check_installable(argument: str, where: str) -> None:
    if argument.startswith("-"):
        return
    if extras := re.fullmatch(r"\.(?:\[(.*)\])?", argument):
        for extra in filter(None, (extras[1] or "").split(",")):
            assert extra in PYPROJECT["project"]["optional-dependencies"], f"{where}: there is no extra {extra}"
    elif argument.startswith("./"):
        assert (REPOSITORY / argument / "pyproject.toml").is_file(), f"{where}: {argument} is no project"
    else:
        assert argument.lower() in map(str.lower, PACKAGES), f"{where}: {argument} is not in constraints.txt"


def _check_module(module: str, arguments: list[str], where: str) -> None:
    spec = find_spec(module)
    assert spec is not None and spec.origin, f"{where}: there is no module {module}"
    origin = Path(spec.origin)
    sources = origin.parent.rglob("*.py") if origin.name == "__init__.py" else [origin]
    text = "".join(path.read_text(encoding="utf-8") for path in sources)
    for option in (each for each in arguments if each.startswith("--")):
        assert option in text or option.removeprefix("--").replace("-", "_") in text, (
            f"{where}: {module} has no {option}"
        )


def language_model(folder: Path) -> None:
    """Write the configuration that ``fedomc plan`` reads in the pages."""
    from transformers import LlamaConfig

    LlamaConfig(
        vocab_size=512, hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=4,
        architectures=["LlamaForCausalLM"],
    ).save_pretrained(folder)  # fmt: skip


def dense_model(path: Path) -> None:
    """Write the safetensors file that the commands of the pages begin with."""
    from safetensors.torch import save_file

    from tests.cli.conftest import network

    save_file(network().state_dict(), path, {"format": "pt"})
    torch.manual_seed(0)
