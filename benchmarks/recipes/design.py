"""The cells of the matrix: which local work, server and split each task is trained with.

[Note: a Latin square]
Local works and servers are numbered 0 to 3, and so are the tasks. A square has the cells in which task = local XOR
server: each task meets each local work once and each server once, and each local work each server. The split is bit 0
of the local work XOR bit 1 of the server, so that it meets every task, local work and server with both values. Sixteen
cells so cover each pair of values of the four axes. A further square replaces the task by task XOR its number; all
four squares are the full product of tasks, local works and servers.
"""

from collections.abc import Sequence
from dataclasses import dataclass

TASKS = ("digits", "text", "documents", "speech")
LOCALS = ("1-step", "4-steps", "epoch-sgdm", "epoch-adamw")
SERVERS = ("FedAvg", "FedAvgM", "FedAdam", "FedProx")
SPLITS = ("iid", "non-iid")
SQUARES = (0, 2, 1, 3)
"""The order of the squares: the first two already meet each pair of local work and server in digits and text alone."""


@dataclass(frozen=True)
class Cell:
    """One way to train.

    Attributes:
        task: one of ``TASKS``.
        local: what a client does in a round, one of ``LOCALS``.
        server: Flower's strategy, one of ``SERVERS``.
        split: how the data is divided among the clients, one of ``SPLITS``.
    """

    task: str
    local: str
    server: str
    split: str

    def __str__(self) -> str:
        return f"{self.task}/{self.local}/{self.server}/{self.split}"


def cells(tasks: Sequence[str] = TASKS, squares: int = 1) -> list[Cell]:
    """Return the cells of some tasks, square by square.

    Args:
        tasks: which of ``TASKS``.
        squares: how many squares, from 1 to 4: each has four cells of a task.
    """
    found = []
    for square in SQUARES[:squares]:
        for local, local_name in enumerate(LOCALS):
            for server, server_name in enumerate(SERVERS):
                task = TASKS[local ^ server ^ square]
                if task in tasks:
                    found.append(Cell(task, local_name, server_name, SPLITS[(local & 1) ^ (server >> 1)]))
    return found
