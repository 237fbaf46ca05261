"""The folder of a run: settings and results; checkpoints lie beside them. Files are replaced atomically."""

import json
import shutil
from pathlib import Path
from typing import Any

from fedomc.serialization.atomic_file import replace_text
from fedomc_llm.errors import SettingsError
from fedomc_llm.settings import Settings

RESULTS, REPORT, CHECKPOINTS = "results.json", "report.html", "checkpoints"


class RunFolder:
    """The folder of one run.

    Args:
        path: the folder; it is created if it is missing.
        settings: settings of the run.
        resume: whether to continue the run in the folder; otherwise the run is replaced.

    Attributes:
        runs: the results of the finished variants.

    Raises:
        SettingsError: the folder cannot be written, there is nothing to resume, or the run had other settings.
    """

    def __init__(self, path: Path, settings: Settings, *, resume: bool) -> None:
        self.path, self.settings = path, settings
        self.runs: list[dict[str, Any]] = self._stored() if resume else []
        if resume:
            return
        try:
            path.mkdir(parents=True, exist_ok=True)
            shutil.rmtree(path / CHECKPOINTS, ignore_errors=True)
            (path / REPORT).unlink(missing_ok=True)
            self._write()
        except OSError as error:
            raise SettingsError(f"{path} cannot be written ({error}): choose another --output") from error

    def add(self, run: dict[str, Any]) -> None:
        """Add the result of a variant."""
        self.runs.append(run)
        self._write()

    def finished(self, variant: str) -> bool:
        """Return whether a variant has finished all its rounds."""
        return any(run["variant"] == variant for run in self.runs)

    def _stored(self) -> list[dict[str, Any]]:
        path = self.path / RESULTS
        try:
            stored = json.loads(path.read_text(encoding="utf-8"))
            settings, runs = dict(stored["settings"]), [dict(run) for run in stored["runs"]]
        except FileNotFoundError:
            raise SettingsError(f"there is nothing to resume in {self.path}: start without --resume") from None
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise SettingsError(f"{path} is damaged ({error}): delete it, or start again without --resume") from error
        changed = [key for key, value in self.settings.to_dict().items() if settings.get(key) != value]
        if changed:
            raise SettingsError(
                f"{self.path} was made with other settings ({', '.join(changed)}): "
                "resume with the same settings, or start without --resume"
            )
        return runs

    def _write(self) -> None:
        text = json.dumps({"settings": self.settings.to_dict(), "runs": self.runs}, indent=2)
        replace_text(self.path / RESULTS, text)
