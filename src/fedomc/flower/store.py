"""Where the state of a run is between and during its rounds: in memory, or in the files that are its checkpoints."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Self

from flwr.app import ArrayRecord
from flwr.serverapp.strategy import Strategy

from fedomc.flower.arrays import stored_model
from fedomc.flower.checkpointing import (
    RunState,
    checked_resumption,
    digest,
    from_checkpoint,
    is_written,
    progress_of,
    to_checkpoint,
)
from fedomc.flower.server_optimizers import MODEL, RoundFiles
from fedomc.flower.traffic import Traffic
from fedomc.serialization.checkpointing import Checkpoint, Checkpoints
from fedomc.serialization.mapped_file import REPLACEABLE, MappedFile, Zeros


class Store:
    """The state of a run: kept in memory, or, with checkpoints, in the file of the last one.

    With checkpoints, the model is never in memory as a whole: it is mapped from the checkpoint of the last round (but
    where mapped files are not ``REPLACEABLE``, the state is in memory, and saved as a whole). A
    server optimizer of Flower reads that file and writes the next one, which takes its name when the round is
    complete. A process that is killed at any moment leaves the former checkpoint or the new one.

    As a context it unlocks the folder, which a run has locked, when the run ends, also with an error.

    Args:
        checkpoints: the folder; None keeps the state in memory.
        inner: the wrapped strategy.
        settings: the result of ``settings_of``.
        traffic: that of earlier rounds.
    """

    def __init__(
        self,
        checkpoints: Checkpoints | None,
        inner: Strategy,
        settings: Mapping[str, Any],
        traffic: Sequence[Traffic],
    ) -> None:
        self._checkpoints, self._inner, self._settings = checkpoints, inner, settings
        self._traffic = list(traffic)
        self._files: RoundFiles | None = None
        self._zeros = None if checkpoints is None else Zeros(checkpoints.folder)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._checkpoints is not None:
            self._checkpoints.release()

    def restored(self, arrays: ArrayRecord) -> RunState:
        """Return the state of the last checkpoint, and restore that of the strategy; at first, an initial state.

        Args:
            arrays: the initial model.
        """
        stored = None if self._checkpoints is None else self._checkpoints.resume()
        if stored is None:
            return RunState(0, arrays, "" if self._checkpoints is None else digest(arrays), self._traffic)
        return from_checkpoint(stored, self._inner, self._settings, arrays)

    def begin(self, arrays: ArrayRecord, num_rounds: int) -> RunState:
        """Return the state to start from, and log that a run is resumed or already finished.

        Args:
            arrays: the initial model. With checkpoints, it is written to the first one and not needed any more.
            num_rounds: the number of rounds of the run.
        """
        state = self.restored(arrays)
        if self._checkpoints is None:
            return state
        if state.round:
            return checked_resumption(state, arrays, num_rounds, self._checkpoints.folder)
        self.save(state)
        return state

    @contextmanager
    def round(self, state: RunState) -> Iterator[RoundFiles | None]:
        """Give the files of a round; what was written to them is removed if the round is not completed."""
        if self._checkpoints is None or self._zeros is None or not REPLACEABLE:
            yield None
            return
        self._files = RoundFiles(self._checkpoints.folder, self._zeros, progress_of(state, self._inner, self._settings))
        try:
            yield self._files
        finally:
            self._files.discard()
            self._files = None

    def save(self, state: RunState) -> None:
        """Write the checkpoint of a round, from where the model is read from then on."""
        if self._checkpoints is None:
            return
        files = self._files
        if files is not None and files.draft is not None and is_written(files, state, self._inner):
            progress = progress_of(state, self._inner, self._settings)
            self._checkpoints.save(state.round, Checkpoint(progress), files.draft)
            return
        path = self._checkpoints.save(state.round, to_checkpoint(state, self._inner, self._settings))
        if REPLACEABLE:
            state.arrays = stored_model(MappedFile.open(path), MODEL, state.arrays)
