"""What the tasks have in common: examples, how they are divided among clients, and the interface of a task."""

import functools
import hashlib
import importlib
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

CLIENTS = 4
CONCENTRATION = 0.3
"""Of the Dirichlet distribution by which a class is divided among clients."""
LEAST = 16
"""Examples that each client has at least."""


class UnavailableError(Exception):
    """A task cannot run on this machine; the message says what is missing and how to get it."""


@dataclass(frozen=True)
class Examples:
    """Examples, or a client's part of them.

    Attributes:
        inputs: ``[N, ...]``.
        targets: ``[N, ...]``.
        groups: the class, author or speaker of each, ``[N]``.
    """

    inputs: Tensor
    targets: Tensor
    groups: Tensor

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, index: Tensor) -> "Examples":
        return Examples(self.inputs[index], self.targets[index], self.groups[index])


class Task(ABC):
    """A model and its data.

    Attributes:
        name: its name in the design.
        skew: what the split ``non-iid`` is: ``dirichlet-0.3`` by class, or ``by-group``, of which each client holds
            whole ones.
        batch: examples of a local step.
        rounds: number of rounds by local work.
        rates: the clients' learning rates that are tried, by local work.
        server_rates: the server's learning rates that are tried with FedAdam.
        exclude: patterns of variables that are never compressed.
    """

    name: ClassVar[str]
    skew: ClassVar[str]
    batch: ClassVar[int]
    rounds: ClassVar[Mapping[str, int]]
    rates: ClassVar[Mapping[str, Sequence[float]]]
    server_rates: ClassVar[Sequence[float]] = (0.003, 0.01, 0.03, 0.1)
    exclude: ClassVar[Sequence[str]] = ()

    @functools.cached_property
    def digest(self) -> str:
        """Of all examples, in the order training, validation, test."""
        found = hashlib.sha256()
        for part in ("train", "validation", "test"):
            examples = self.examples(part)
            for tensor in (examples.inputs, examples.targets, examples.groups):
                found.update(tensor.contiguous().numpy().tobytes())
        return found.hexdigest()[:16]

    @abstractmethod
    def examples(self, part: str) -> Examples:
        """Return the examples of ``train``, ``validation`` or ``test``; calls after the first cost nothing."""

    @abstractmethod
    def model(self) -> nn.Module:
        """Build the model that training begins with; random values are drawn from torch's generator."""

    def skeleton(self) -> nn.Module:
        """Build the model without values, which a message will fill."""
        with torch.device("meta"):
            return self.model()

    @abstractmethod
    def loss(self, model: nn.Module, batch: Examples) -> Tensor:
        """Return the loss of a batch; what is random is drawn from torch's generator."""

    @abstractmethod
    def score(self, model: nn.Module, examples: Examples) -> float:
        """Measure a model, in points from 0 to 100 of which more is better."""

    def clients(self, split: str, seed: int) -> list[Examples]:
        """Divide the training examples among the clients."""
        examples = self.examples("train")
        generator = torch.Generator().manual_seed(seed)
        if split == "iid":
            parts = list(torch.randperm(len(examples), generator=generator).chunk(CLIENTS))
        elif self.skew == "by-group":
            parts = by_group(examples.groups, generator)
        else:
            parts = by_dirichlet(examples.groups, seed)
        return [examples[part] for part in parts]


def by_group(groups: Tensor, generator: torch.Generator) -> list[Tensor]:
    """Give each client whole groups, as many to each as possible."""
    count = int(groups.max()) + 1
    shares = torch.randperm(count, generator=generator).chunk(CLIENTS)
    return [torch.isin(groups, share).nonzero().flatten() for share in shares]


def by_dirichlet(groups: Tensor, seed: int) -> list[Tensor]:
    """Divide each class by shares from a Dirichlet distribution, drawn again until each client has enough examples."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        shares = torch.distributions.Dirichlet(torch.full((CLIENTS,), CONCENTRATION))
        while True:
            parts: list[list[Tensor]] = [[] for _ in range(CLIENTS)]
            for group in groups.unique():
                members = (groups == group).nonzero().flatten()
                members = members[torch.randperm(len(members))]
                ends = (shares.sample().cumsum(0) * len(members)).round().long()[:-1]
                for part, piece in zip(parts, members.tensor_split(ends), strict=True):
                    part.append(piece)
            found = [torch.cat(part) for part in parts]
            if min(map(len, found)) >= LEAST:
                return found


@functools.cache
def task(name: str) -> Task:
    """Return a task by its name; its module is imported now, as each needs packages of its own.

    Raises:
        UnavailableError: a package is missing.
    """
    try:
        module = importlib.import_module(f"benchmarks.recipes.{name}")
    except ModuleNotFoundError as error:
        raise UnavailableError(f"{name} needs {error.name}: pip install '.[benchmarks]'") from error
    found: Task = module.TASK
    return found
