"""An experiment as data: a TOML file that names settings, the rows of its table, and the seeds.

title = "From scratch, non-streaming, by speaker"
paper = "LibriSpeech by speaker"     # what of the paper it stands for
model = "Conformer"                  # as the tables call it
seeds = [0, 1, 2]
pooled = true                        # whether it counts in the mean over experiments
formats = ["FP32", "S1E3M7@0.9"]     # a row each
[settings]                           # of all rows, as in `fedomc_speech.settings`
rounds = 300
[[rows]]                             # a row with settings of its own
name = "no transformation"
format = "S1E3M7@0.9"
transform = "none"
"""

import dataclasses
import hashlib
import json
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fedomc import OMCError
from fedomc_speech import corpus
from fedomc_speech.errors import SettingsError
from fedomc_speech.pretraining import Pretraining
from fedomc_speech.settings import FP32, Settings, Variant

SUMMARY = "summary"
"""The name of the file with all rows, next to a file for each experiment."""

VERSION = 2
"""Of what a run gives: raise it with every change to training, model, features or defaults by which the same settings
give something else."""

_COMPRESSION = (
    "format_by_name",
    "transform",
    "weight_matrices_only",
    "rounding",
    "aggregate",
    "entropy_coding",
    "unquantized_format",
)
"""Settings that mean nothing to a run in FP32."""

_FP32_CLIENT_RATE = 0.1
"""Of runs in FP32 with one local step, whatever that of a row: it is a mere unit there, as Adam on the server divides
by the size of what comes back. To a format it is more: how far the step stands out from what the weights are rounded
to."""

_KEYS = {"title", "paper", "model", "seeds", "pooled", "formats", "settings", "pretraining", "rows"}


@dataclass(frozen=True)
class Initial:
    """A model to begin with.

    Attributes:
        start: corpus, model and augmentation.
        training: how it is trained.
    """

    start: Settings
    training: Pretraining

    @property
    def name(self) -> str:
        """Name its file, by all that decides what is in it."""
        described = {**_told(self.start), **dataclasses.asdict(self.training)}
        return f"initial-{self.start.corpus}-{_digest(described)}.safetensors"


@dataclass(frozen=True)
class Row:
    """A row of a table.

    Attributes:
        name: as the table calls it.
        settings: with one format; the seed is that of each run.
        further: whether it is left out where nobody asks for it or for further rows.
    """

    name: str
    settings: Settings
    further: bool = False

    @property
    def baseline(self) -> Settings:
        """The settings of the same training in FP32."""
        values = self.settings.to_dict()
        plain = {key: value for key, value in values.items() if key not in _COMPRESSION}
        if self.settings.local_steps == 1:
            plain["client_rate"] = _FP32_CLIENT_RATE
        return Settings.from_mapping({**plain, "formats": [FP32]})

    def run(self, seed: int) -> Settings:
        """Return the settings of the run with a seed."""
        whole = self.baseline if self.settings.formats == (FP32,) else self.settings
        return replace(whole, seed=seed)


@dataclass(frozen=True)
class Experiment:
    """What a TOML file describes.

    Attributes:
        name: of the file.
        title: of the table.
        paper: what of the paper it stands for.
        model: as the tables call it.
        seeds: of each row.
        pooled: whether it counts in the mean over experiments.
        rows: of the table.
        initial: the model that all rows begin with; None if that is a random one.
    """

    name: str
    title: str
    paper: str
    model: str
    seeds: tuple[int, ...]
    pooled: bool
    rows: tuple[Row, ...]
    initial: Initial | None = None

    @classmethod
    def read(cls, path: Path, overrides: Mapping[str, Any] | None = None) -> "Experiment":
        """Read a TOML file.

        Args:
            path: of the file.
            overrides: settings that take the place of the file's; those that a row has of its own stay.

        Raises:
            SettingsError: it cannot be read, or something in it is wrong.
        """
        try:
            stored = tomllib.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise SettingsError(f"{path} cannot be read: {error}") from None
        try:
            return cls._of(path.stem, stored, overrides or {})
        except OMCError as error:
            raise SettingsError(f"{path}: {error}") from None

    @classmethod
    def _of(cls, name: str, stored: Mapping[str, Any], overrides: Mapping[str, Any]) -> "Experiment":
        unknown = set(stored) - _KEYS
        if unknown:
            raise SettingsError(f"{', '.join(sorted(unknown))} is unknown: there are {', '.join(sorted(_KEYS))}")
        shared = {**_table(stored, "settings"), **overrides}
        if name == SUMMARY or type(stored.get("pooled", False)) is not bool:
            raise SettingsError(f"pooled must be true or false, and {SUMMARY} is no name for an experiment")
        seeds = stored.get("seeds", [0])
        if not isinstance(seeds, list) or not seeds or not all(type(seed) is int for seed in seeds):
            raise SettingsError(f"seeds={seeds!r}: a list of whole numbers is expected")
        if len(set(seeds)) != len(seeds):
            raise SettingsError(f"seeds={seeds!r}: one is there twice")
        formats, own = stored.get("formats", []), stored.get("rows", [])
        if not isinstance(formats, list) or not isinstance(own, list):
            raise SettingsError("formats and rows must be lists")
        described = [{"format": text} for text in formats] + own
        initial = _initial(stored, shared) if "pretraining" in stored else None
        if initial is not None:
            if "initial" in shared:
                raise SettingsError("initial and pretraining: one of them says with which model to begin")
            shared["initial"] = initial.name
        rows = tuple(_row(one, shared) for one in described)
        names = [row.name for row in rows]
        if not rows or len(set(names)) != len(names):
            raise SettingsError(f"rows {names}: each needs a name of its own, and there must be one")
        made = cls(
            name,
            title=str(stored.get("title", name)),
            paper=str(stored.get("paper", "")),
            model=str(stored.get("model", "")),
            seeds=tuple(seeds),
            pooled=stored.get("pooled", False),
            rows=rows,
            initial=initial,
        )
        list(made.runs())  # raises what is wrong with a seed
        return made

    def only(self, rows: Sequence[str], seeds: Sequence[int], *, further: bool = True) -> "Experiment":
        """Return a part of the experiment.

        Args:
            rows: by name; empty means all.
            seeds: empty means all.
            further: whether all rows are the further ones, too.

        Raises:
            SettingsError: there is no such row.
        """
        names = [row.name for row in self.rows]
        missing = [name for name in rows if name not in names]
        if missing:
            raise SettingsError(f"{self.name} has no row {', '.join(missing)}: there are {', '.join(names)}")
        return replace(
            self,
            rows=tuple(row for row in self.rows if row.name in rows or (not rows and (further or not row.further))),
            seeds=tuple(dict.fromkeys(seeds)) or self.seeds,
        )

    def needs_path(self) -> set[str]:
        """Name the corpora of which the path must be known."""
        initial = {self.initial.start.corpus} if self.initial else set()
        return ({row.settings.corpus for row in self.rows} | initial) & set(corpus.PUBLISHED)

    def at(self, paths: Mapping[str, Path | None], folder: Path) -> "Experiment":
        """Return the experiment with corpora and initial models where they are on this machine.

        Args:
            paths: of the corpora.
            folder: of the initial models.
        """

        def placed(settings: Settings) -> Settings:
            path, initial = paths.get(settings.corpus), settings.initial
            if self.initial and initial:
                initial = str(folder.absolute() / self.initial.name)
            return replace(
                settings, corpus_path=str(path.absolute()) if path else settings.corpus_path, initial=initial
            )

        rows = tuple(replace(row, settings=placed(row.settings)) for row in self.rows)
        initial = self.initial and replace(self.initial, start=placed(self.initial.start))
        return replace(self, rows=rows, initial=initial)

    def runs(self) -> Iterator[Settings]:
        """List the runs that the rows need, each with its baseline, seed by seed."""
        for seed in self.seeds:
            for row in self.rows:
                yield replace(row.baseline, seed=seed)
                yield row.run(seed)


def key_of(run: Settings) -> str:
    """Name a run by its settings, so that rows of any experiments that need the same run share it.

    Settings at their defaults do not count: one that is new leaves the names of older runs as they are.
    """
    return f"{run.corpus}-{run.split}-{run.formats[0]}-seed{run.seed}-{_digest(_told(run))}"


def chosen(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return those of the settings, as plain values, that are not at their defaults."""
    defaults = Settings().to_dict()
    return {key: value for key, value in settings.items() if value != defaults.get(key)}


def _told(settings: Settings) -> dict[str, Any]:
    """Tell the settings that are not at their defaults, without where things are on this machine."""
    told: dict[str, Any] = {"version": VERSION} if VERSION > 1 else {}
    told |= {key: value for key, value in chosen(settings.to_dict()).items() if key != "corpus_path"}
    if settings.initial:
        told["initial"] = Path(settings.initial).name
    return told


def _digest(values: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:10]


def _table(stored: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    value = stored.get(key, {})
    if not isinstance(value, Mapping):
        raise SettingsError(f"{key} must be a table")
    return value


def _initial(stored: Mapping[str, Any], shared: Mapping[str, Any]) -> Initial:
    values = dict(_table(stored, "pretraining"))
    of_start: dict[str, Any] = {key: values.pop(key) for key in ("corpus", "augment") if key in values}
    same = {key: shared[key] for key in ("model", "streaming") if key in shared}
    kinds = {field.name: type(field.default) for field in dataclasses.fields(Pretraining)}
    for key, value in values.items():
        if key not in kinds:
            raise SettingsError(f"pretraining: {key} is unknown: there are corpus, augment, {', '.join(kinds)}")
        if type(value) is not kinds[key] and not (kinds[key] is float and type(value) is int):
            raise SettingsError(f"pretraining: {key}={value!r}: a value of type {kinds[key].__name__} is expected")
    return Initial(Settings.from_mapping({"corpus": "commands", **same, **of_start}), Pretraining(**values))


def _row(described: Any, shared: Mapping[str, Any]) -> Row:
    if not isinstance(described, Mapping) or not isinstance(described.get("format"), str):
        raise SettingsError(f"row {described!r}: a table with a format is expected")
    own = {key: value for key, value in described.items() if key not in ("name", "format", "further")}
    for wrong in {"formats", "seed"} & (set(own) | set(shared)):
        raise SettingsError(f"{wrong} does not belong into settings: it is the rows that have formats, and all seeds")
    name = str(described.get("name", described["format"]))
    if "|" in name or "\n" in name:
        raise SettingsError(f"row {name!r}: a name without | and line breaks is expected, for the tables")
    further = described.get("further", False)
    if type(further) is not bool:
        raise SettingsError(f"row {name!r}: further={further!r}, true or false is expected")
    format = str(Variant.parse(described["format"]))
    return Row(name, Settings.from_mapping({**shared, **own, "formats": [format]}), further)
