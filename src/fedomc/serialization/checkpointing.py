"""The state of a federated run after each round, as files to resume from."""

import json
import os
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from fedomc.errors import PayloadError
from fedomc.serialization.model_file import dense_piece, to_json, write_pieces

_KEY = "fedomc.round"
_VERSION = 1
_NAME = "round-{:08}.safetensors"


@dataclass(frozen=True)
class Checkpoint:
    """What a run needs to go on after a round.

    Attributes:
        progress: what JSON can hold: the round, what was counted and configured.
        arrays: model and optimizer state by kind, which has no slash, and name.
    """

    progress: dict[str, Any]
    arrays: dict[str, dict[str, np.ndarray[Any, Any]]] = field(default_factory=dict)

    def write(self, path: str | os.PathLike[str]) -> None:
        """Write to a file, which replaces the former one when it is whole and on the disk; same state, same bytes.

        Raises:
            PayloadError: an array of a dtype that the file cannot hold.
            OSError: the file cannot be written.
        """
        pieces = []
        for kind, arrays in self.arrays.items():
            for name, array in arrays.items():
                with warnings.catch_warnings():
                    warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
                    pieces.append(dense_piece(f"{kind}/{name}", torch.from_numpy(np.asarray(array, order="C"))))
        content = {"version": _VERSION, "kinds": list(self.arrays), "progress": self.progress}
        write_pieces(path, {_KEY: to_json(content)}, pieces)

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> "Checkpoint":
        """Read a file.

        Raises:
            PayloadError: it is damaged, or no checkpoint of a round.
            OSError: it cannot be read.
        """
        try:
            with safe_open(path, "np") as file:
                content = json.loads((file.metadata() or {})[_KEY])
                if content["version"] != _VERSION:
                    raise PayloadError(f"{path}: version {content['version']!r} is unknown: update fedomc")
                arrays: dict[str, dict[str, Any]] = {str(kind): {} for kind in content["kinds"]}
                for key in file.keys():
                    kind, _, name = key.partition("/")
                    arrays[kind][name] = file.get_tensor(key)
                return cls(dict(content["progress"]), arrays)
        except (SafetensorError, KeyError, ValueError, TypeError, RecursionError) as error:
            if isinstance(error, PayloadError):
                raise
            raise PayloadError(f"{path} is damaged: {error}") from None


class Checkpoints:
    """A folder with the checkpoints of a run's last rounds.

    Args:
        folder: made if it is missing; a run goes on with what is there, so a new run takes a new one.
        keep: how many.

    Raises:
        PayloadError: ``keep`` is less than 1.
        OSError: the folder cannot be made.
    """

    def __init__(self, folder: str | os.PathLike[str], keep: int = 3) -> None:
        if keep < 1:
            raise PayloadError(f"keep={keep} checkpoints leave nothing to resume from: keep 1 or more")
        self.folder = Path(folder)
        self.keep = keep
        self.folder.mkdir(parents=True, exist_ok=True)

    def save(self, number: int, checkpoint: Checkpoint) -> None:
        """Write the state after a round, and remove what is older than the last ``keep``."""
        checkpoint.write(self.folder / _NAME.format(number))
        for old in self.paths()[: -self.keep]:
            old.unlink(missing_ok=True)

    def load(self) -> Checkpoint | None:
        """Read the last whole one, if there is any; damaged ones are warned of and passed over.

        Raises:
            PayloadError: there are checkpoints, but none is whole.
        """
        paths = self.paths()
        for path in reversed(paths):
            try:
                return Checkpoint.read(path)
            except PayloadError as error:
                warnings.warn(f"passed over: {error}", stacklevel=2)
        if paths:
            raise PayloadError(f"no checkpoint in {self.folder} can be read: start again in another folder")
        return None

    def paths(self) -> list[Path]:
        """List the files, oldest first."""
        return sorted(self.folder.glob("round-*.safetensors"))
