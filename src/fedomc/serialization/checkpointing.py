"""Checkpoints of a federated run: the state after a round as a file, and the folder that keeps the last few."""

import json
import os
import re
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fedomc.errors import PayloadError
from fedomc.serialization import folder_lock
from fedomc.serialization.atomic_file import remove_abandoned
from fedomc.serialization.mapped_file import FileDraft, MappedFile, dtype_of
from fedomc.serialization.tensor_file import TensorFile, dense_piece, to_json, write_tensor_file

_KEY = "fedomc.round"
_VERSION = 2
_ROOM = 2**14  # bytes for the metrics of a round
_NAME = re.compile(r"round-(\d{8}|[1-9]\d{8,})\.safetensors", re.ASCII)


@dataclass(frozen=True)
class Checkpoint:
    """The state of a run after a round, from which it can go on.

    Attributes:
        progress: the round, counters and settings: whatever JSON can hold.
        arrays: the model and the optimizer's state: arrays by kind, whose name has no slash, and by name. Those of a
            checkpoint that was read stay in its file; what is modified in them is not written there.
        file: the file from which it was read. The names of its tensors are those of kind and array, as in
            ``model/layer.weight``.
    """

    progress: dict[str, Any]
    arrays: dict[str, dict[str, np.ndarray[Any, Any]]] = field(default_factory=dict)
    file: MappedFile | None = None

    def write(self, path: str | os.PathLike[str]) -> None:
        """Write the checkpoint to a file, which is replaced as a whole; the same state gives the same bytes.

        Raises:
            PayloadError: an array has a dtype that the file cannot hold.
            OSError: the file cannot be written.
        """
        pieces = []
        for kind, arrays in self.arrays.items():
            for name, array in arrays.items():
                with warnings.catch_warnings():
                    warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
                    pieces.append(dense_piece(f"{kind}/{name}", torch.from_numpy(np.asarray(array, order="C"))))
        write_tensor_file(path, _texts(self.arrays, self.progress), pieces)

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> "Checkpoint":
        """Read a checkpoint; every byte of it is checked against its digest.

        Raises:
            PayloadError: the file is damaged, or is no checkpoint.
            OSError: the file cannot be read.
        """
        with TensorFile.open(path) as file:
            try:
                content = json.loads(file.texts[_KEY])
                if content["version"] != _VERSION:
                    raise PayloadError(
                        f"{path}: checkpoint version {content['version']!r}, but this fedomc reads {_VERSION}: "
                        "use the fedomc that wrote it"
                    )
                mapped = MappedFile.open(path)
                arrays: dict[str, dict[str, Any]] = {str(kind): {} for kind in content["kinds"]}
                for key, (dtype, _, _) in mapped.places.items():
                    if dtype is torch.bfloat16:
                        raise TypeError(f"{key} is {dtype}, which no checkpoint has")
                    kind, _, name = key.partition("/")
                    arrays[kind][name] = mapped.copy(key)
                return cls(dict(content["progress"]), arrays, mapped)
            except (KeyError, ValueError, TypeError, RecursionError) as error:
                if isinstance(error, PayloadError):
                    raise
                raise PayloadError(f"{path} is not a checkpoint: {error!r}") from None


class CheckpointDraft:
    """A checkpoint whose arrays are written a stretch at a time, before the progress of the round is known.

    Args:
        folder: of the checkpoint.
        arrays: the dtype and shape of each array, by kind and name.
        progress: as long as that of the checkpoint will about be; if this is too short, the file is written twice.

    Raises:
        OSError: the folder cannot be written to, or the disk has no room for the file.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        arrays: Mapping[str, Mapping[str, tuple[np.dtype[Any], tuple[int, ...]]]],
        progress: Mapping[str, Any],
    ) -> None:
        self._kinds = list(arrays)
        tensors = {
            f"{kind}/{name}": (dtype_of(dtype), shape)
            for kind, each in arrays.items()
            for name, (dtype, shape) in each.items()
        }
        length = len(_texts(self._kinds, progress)[_KEY])
        self._draft = FileDraft(folder, tensors, 2 * length + _ROOM)
        self.file = self._draft.file

    def write(self, kind: str, name: str, values: np.ndarray[Any, Any]) -> None:
        """Write the next values of an array; they are contiguous and of its dtype.

        Raises:
            OSError: they cannot be written.
        """
        self._draft.write(f"{kind}/{name}", values)

    def array(self, kind: str, name: str) -> np.ndarray[Any, Any]:
        """Return an array that has been written; it cannot be modified."""
        return self.file.values(f"{kind}/{name}")

    def commit(self, path: str | os.PathLike[str], progress: Mapping[str, Any]) -> None:
        """Complete the checkpoint with the progress, and give it its name.

        Raises:
            OSError: the file cannot be written.
        """
        self._draft.commit(path, _texts(self._kinds, progress))

    def discard(self) -> None:
        """Remove what was written, unless the checkpoint is complete."""
        self._draft.discard()


class Checkpoints:
    """A folder that keeps the checkpoints of a run's last rounds.

    Only files with the names that ``save`` gives, ``round-00000012.safetensors``, are read, counted or removed; others
    may lie beside them. While a run is on, its process locks the folder.

    Args:
        folder: is made if it is missing. A run goes on from what it finds here, so give a new run a new folder.
        keep: how many checkpoints stay.

    Raises:
        PayloadError: ``keep`` is less than 1.
        OSError: the folder cannot be made.
    """

    def __init__(self, folder: str | os.PathLike[str], keep: int = 3) -> None:
        if keep < 1:
            raise PayloadError(f"keep={keep} would leave no checkpoint to resume from: keep at least 1")
        self.folder = Path(folder)
        self.keep = keep
        self.folder.mkdir(parents=True, exist_ok=True)

    def save(self, number: int, checkpoint: Checkpoint, draft: CheckpointDraft | None = None) -> Path:
        """Write the checkpoint of a round, and remove those of rounds before the last ``keep`` up to this one.

        Args:
            number: of the round. Checkpoints of later rounds stay as they are.
            checkpoint: what to write.
            draft: its arrays, which have been written to the same folder.

        Returns:
            The file.

        Raises:
            FolderLockedError: a run in another process writes its checkpoints here.
            PayloadError: the number is negative, or the checkpoint cannot be written as a file.
            OSError: the file cannot be written.
        """
        if number < 0:
            raise PayloadError(f"round {number} is negative: a checkpoint needs a number of 0 or more")
        folder_lock.acquire(self.folder)
        path = self.folder / f"round-{number:08}.safetensors"
        if draft is None:
            checkpoint.write(path)
        else:
            draft.commit(path, checkpoint.progress)
        for old in [each for each in self.paths() if _number(each) <= number][: -self.keep]:
            old.unlink(missing_ok=True)
        return path

    def resume(self) -> Checkpoint | None:
        """Lock the folder for the run that starts now, and read the checkpoint from which it goes on, as ``load`` does.

        Raises:
            FolderLockedError: a run in another process writes its checkpoints here.
            PayloadError: there are checkpoints, but all are damaged.
        """
        folder_lock.acquire(self.folder)
        remove_abandoned(self.folder, 0.0)  # as long as the folder is locked, no other run writes to it
        return self.load()

    def release(self) -> None:
        """Unlock the folder after a run; the end of the process does the same."""
        folder_lock.release(self.folder)

    def load(self) -> Checkpoint | None:
        """Read the newest checkpoint that is whole; None if the folder has none.

        A damaged one is reported in a warning and the one before is taken. Other processes may use the folder
        meanwhile.

        Raises:
            PayloadError: there are checkpoints, but all are damaged.
        """
        while paths := self.paths():
            try:
                for path in reversed(paths):
                    try:
                        return Checkpoint.read(path)
                    except PayloadError as error:
                        warnings.warn(f"{error}; the checkpoint before it is used instead", stacklevel=2)
            except FileNotFoundError:  # another process removed it as too old: there are newer ones
                continue
            raise PayloadError(f"every checkpoint in {self.folder} is damaged: use another folder to start a new run")
        return None

    def paths(self) -> list[Path]:
        """List the checkpoints, in the order of their rounds."""
        files = (path for path in self.folder.iterdir() if _NAME.fullmatch(path.name) and path.is_file())
        return sorted(files, key=_number)


def _texts(kinds: Iterable[str], progress: Mapping[str, Any]) -> dict[str, str]:
    """Return the metadata of a checkpoint's file."""
    return {_KEY: to_json({"version": _VERSION, "kinds": list(kinds), "progress": dict(progress)})}


def _number(path: Path) -> int:
    """Return the round of a checkpoint, which is in its name."""
    match = _NAME.fullmatch(path.name)
    assert match is not None
    return int(match[1])
