"""Every public name has a docstring that begins with a sentence, and what docstrings show is true."""

import ast
import doctest
import importlib
import inspect
import itertools
import pkgutil
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import fedomc

MODULES = [
    importlib.import_module(found.name)
    for found in pkgutil.walk_packages(fedomc.__path__, "fedomc.")
    if found.name != "fedomc.codec._native"
]
PUBLIC = [module for module in (fedomc, *MODULES) if hasattr(module, "__all__") and "._" not in module.__name__]
"""The public modules that say what is public in them."""


def documented_values(module: ModuleType) -> set[str]:
    """Return the names of a package's values that have a text behind them, wherever they are defined."""
    found = set()
    for each in (module, *MODULES):
        body = ast.parse(Path(str(each.__file__)).read_text(encoding="utf-8")).body
        for node, text in itertools.pairwise(body):
            targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
            if isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant):
                found |= {target.id for target in targets if isinstance(target, ast.Name)}
    return found


def members(cls: type) -> Iterator[tuple[str, Any]]:
    for name, value in vars(cls).items():
        target = getattr(value, "fget", None) or getattr(value, "__func__", value)
        if not name.startswith("_") and inspect.isfunction(target):
            yield name, target


@pytest.mark.parametrize("module", PUBLIC, ids=lambda module: module.__name__)
def test_public_names_have_a_first_sentence(module: ModuleType) -> None:
    values = documented_values(module)
    for name in module.__all__:
        value = getattr(module, name)
        if not callable(value):
            assert name in values, f"{module.__name__}.{name} has no text"
            continue
        texts = {name: value.__doc__}
        if inspect.isclass(value):
            texts |= {f"{name}.{each}": inspect.getdoc(member) for each, member in members(value)}
        for each, text in texts.items():
            first = (text or "").strip().split("\n\n")[0]
            assert first.endswith((".", ":")) and (first[:1].isupper() or first[:2] == "``"), f"{each}: {first!r}"


def test_examples_in_docstrings_give_what_they_say() -> None:
    attempted = 0
    for module in MODULES:
        result = doctest.testmod(module, extraglobs={"fedomc": fedomc, "torch": torch})
        assert result.failed == 0, module.__name__
        attempted += result.attempted
    assert attempted >= 2
