"""A character language model on the documentation of Python's standard library; a package is an author."""

import ast
import functools
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.recipes.tasks import Examples, Task

AUTHORS = ("email", "asyncio", "turtle", "logging", "xml", "importlib", "unittest", "http")
ENDS = {"train": 4800, "validation": 7200, "test": 13200}
"""Where the parts of an author's text end, in characters."""
CHARACTERS = ["\n", *map(chr, range(32, 127))]
LENGTH = 48
"""Characters of an example."""
LEAST_DOCSTRING = 40


class Text(Task):
    """The score is the accuracy of the next character on text of the same authors that no client has."""

    name = "text"
    skew = "by-group"
    batch = 8
    rounds = {"1-step": 80, "4-steps": 30, "epoch-sgdm": 8, "epoch-adamw": 8}  # noqa: RUF012
    rates = {  # noqa: RUF012
        "1-step": (3.0, 6.0, 12.0),
        "4-steps": (3.0, 10.0, 30.0),
        "epoch-sgdm": (0.3, 1.0, 3.0),
        "epoch-adamw": (0.001, 0.003, 0.01),
    }
    server_rates = (0.03, 0.1, 0.3)

    @functools.cache  # noqa: B019
    def examples(self, part: str) -> Examples:
        """Return characters ``[N, 48]`` and those that follow, as numbers."""
        numbers = {character: number for number, character in enumerate(CHARACTERS)}
        starts = dict(zip(ENDS, [0, *ENDS.values()], strict=False))
        inputs, targets, groups = [], [], []
        for author, package in enumerate(AUTHORS):
            written = documentation(package)
            if len(written) < ENDS["test"]:
                raise ValueError(f"{package}: {len(written)} characters of documentation, {ENDS['test']} are needed")
            text = torch.tensor([numbers.get(one, 1) for one in written[starts[part] : ENDS[part] + 1]])
            count = (len(text) - 1) // LENGTH
            inputs.append(text[: count * LENGTH].view(count, LENGTH))
            targets.append(text[1 : count * LENGTH + 1].view(count, LENGTH))
            groups.append(torch.full((count,), author))
        return Examples(torch.cat(inputs), torch.cat(targets), torch.cat(groups))

    def model(self) -> nn.Module:
        """Build the model, of about 78 000 parameters."""
        return CharacterModel()

    def loss(self, model: nn.Module, batch: Examples) -> Tensor:
        """Return the cross entropy of the next characters."""
        return F.cross_entropy(model(batch.inputs).flatten(0, 1), batch.targets.flatten())

    def score(self, model: nn.Module, examples: Examples) -> float:
        """Return the accuracy in per cent."""
        return 100 * float((model(examples.inputs).argmax(-1) == examples.targets).float().mean())


class CharacterModel(nn.Module):
    """An embedding, a GRU and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(len(CHARACTERS), 32)
        self.recurrent = nn.GRU(32, 128, batch_first=True)
        self.head = nn.Linear(128, len(CHARACTERS))

    def forward(self, characters: Tensor) -> Tensor:
        """Return the scores of the next characters ``[N, L, 96]`` of characters ``[N, L]``."""
        predicted: Tensor = self.head(self.recurrent(self.embedding(characters))[0])
        return predicted


def documentation(package: str) -> str:
    """Return the docstrings of a package of the standard library, each once, without importing it."""
    return "\n\n".join(dict.fromkeys(docstrings(Path(sysconfig.get_path("stdlib")), package)))


def docstrings(folder: Path, package: str) -> Iterator[str]:
    """Yield the docstrings of a package or module in a folder that are longer than a line."""
    path = folder / package
    for file in sorted(path.rglob("*.py")) if path.is_dir() else [path.with_suffix(".py")]:
        if "tests" in file.relative_to(folder).parts:
            continue
        for node in ast.walk(ast.parse(file.read_bytes())):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                found = ast.get_docstring(node)
                if found and len(found) > LEAST_DOCSTRING:
                    yield found


TASK = Text()
