"""The folder of a run: settings, results and the state to resume from. Files are replaced atomically."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from fedomc.errors import PayloadError
from fedomc.serialization.atomic_file import replace_text
from fedomc.serialization.checkpointing import Checkpoint
from fedomc_speech.errors import SettingsError
from fedomc_speech.settings import Settings

RESULTS = "results.json"
CHECKPOINT = "checkpoint.safetensors"
REPORT = "report.html"


class RunFolder:
    """The folder of one run.

    Args:
        path: the folder; it is created if it is missing.
        settings: settings of the run.
        resume: whether to continue the run in the folder; otherwise the run is replaced.

    Raises:
        SettingsError: the folder cannot be written, there is nothing to resume, or the run was made with other settings
            or another corpus.
    """

    def __init__(self, path: Path, settings: Settings, *, resume: bool) -> None:
        self.path = path
        self.settings = settings
        if resume:
            self.runs = self._read_runs()
        else:
            self.runs = []
            try:
                path.mkdir(parents=True, exist_ok=True)
                for old in (CHECKPOINT, REPORT):
                    (path / old).unlink(missing_ok=True)
                self._write_results()
            except OSError as error:
                raise SettingsError(f"{path} cannot be written ({error}): choose another --output") from error

    def add(self, run: dict[str, Any]) -> None:
        """Add the result of a variant, or replace it."""
        self.runs = [old for old in self.runs if old["variant"] != run["variant"]] + [run]
        self._write_results()

    def finished(self, variant: str) -> bool:
        """Return whether a variant has finished all its rounds."""
        return any(run["variant"] == variant and run["finished"] for run in self.runs)

    def save(self, checkpoint: Checkpoint) -> None:
        """Save the state after a round."""
        checkpoint.write(self.path / CHECKPOINT)

    def drop_checkpoint(self) -> None:
        """Delete the saved state, which a finished run no longer needs."""
        (self.path / CHECKPOINT).unlink(missing_ok=True)

    def load(self) -> Checkpoint | None:
        """Load the state after the last finished round; None if there is none.

        Raises:
            SettingsError: the file is damaged.
        """
        path = self.path / CHECKPOINT
        if not path.exists():
            return None
        try:
            return Checkpoint.read(path)
        except (OSError, PayloadError) as error:
            raise SettingsError(f"{path} is damaged ({error}): delete it, or start again without --resume") from error

    def _read_runs(self) -> list[dict[str, Any]]:
        path = self.path / RESULTS
        try:
            stored = json.loads(path.read_text())
            settings = Settings.from_mapping(stored["settings"])
            runs: list[dict[str, Any]] = [
                {**run, "variant": str(run["variant"]), "finished": bool(run["finished"])} for run in stored["runs"]
            ]
        except FileNotFoundError:
            raise SettingsError(f"there is nothing to resume in {self.path}: start without --resume") from None
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise SettingsError(f"{path} is damaged ({error}): delete it, or start again without --resume") from error
        if Path(settings.initial).name == Path(self.settings.initial).name:  # files may have moved
            settings = replace(settings, corpus_path=self.settings.corpus_path, initial=self.settings.initial)
        if settings != self.settings:
            changed = [key for key, value in settings.to_dict().items() if value != self.settings.to_dict()[key]]
            if changed == ["corpus_digest"]:
                raise SettingsError(
                    f"{self.path} was made with another corpus: the digest of its lists and transcriptions is "
                    f"{settings.corpus_digest!r}, that of {self.settings.corpus_path} {self.settings.corpus_digest!r}. "
                    "Resume with the same corpus, or start without --resume"
                )
            raise SettingsError(
                f"{self.path} was made with other settings ({', '.join(changed)}): "
                "resume with the same settings, or start without --resume"
            )
        return runs

    def _write_results(self) -> None:
        text = json.dumps({"settings": self.settings.to_dict(), "runs": self.runs}, indent=2)
        replace_text(self.path / RESULTS, text)
