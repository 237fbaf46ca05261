"""Experiments as TOML files, which name settings, the rows of a table, and seeds.

For example::

    title = "From scratch, non-streaming, by speaker"
    paper = "LibriSpeech by speaker"     # the paper's experiment that it corresponds to
    model = "Conformer"                  # the model's name in the tables
    seeds = [0, 1, 2]
    pooled = true                        # whether it counts in the mean over experiments
    formats = ["FP32", "S1E3M7@0.9"]     # one row for each
    [settings]                           # of all rows, see `fedomc_speech.settings`
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
"""Part of every key. Raise it with each change to training, model, features or defaults after which the same settings
give other results."""

_COMPRESSION = (
    "format_by_name",
    "transform",
    "weight_matrices_only",
    "rounding",
    "aggregate",
    "entropy_coding",
    "unquantized_format",
    "activations",
)
"""Settings that have no effect on a run in FP32."""

_FP32_CLIENT_LEARNING_RATE = 0.1
"""The clients' learning rate of FP32 runs with one local step, whatever that of the row is. It has no effect there,
because the server's Adam divides by the size of what comes back, so that rows share these runs. It matters to a format
that rounds the step to the grid of the weights."""

_OF_START = ("corpus", "corpus_path", "augment")
"""Settings of a pre-training that are not in ``Pretraining``."""

_KEYS = {"title", "paper", "model", "seeds", "pooled", "formats", "settings", "pretraining", "rows"}


@dataclass(frozen=True)
class Initial:
    """The model that the runs of an experiment begin with.

    Attributes:
        start: settings that name the corpus, the model and the augmentation.
        training: how it is trained.
    """

    start: Settings
    training: Pretraining

    @property
    def name(self) -> str:
        """The name of its file, with a digest of all that decides what is in it."""
        described = {**_described(self.start), **dataclasses.asdict(self.training)}
        return f"initial-{self.start.corpus}-{_digest(described)}.safetensors"


@dataclass(frozen=True)
class Row:
    """A row of a table.

    Attributes:
        name: its name in the table.
        settings: settings with one format; each run replaces the seed.
        further: whether it is left out unless it is asked for, by name or with ``further``.
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
            plain["client_learning_rate"] = _FP32_CLIENT_LEARNING_RATE
        return Settings.from_mapping({**plain, "formats": [FP32]})

    def run(self, seed: int) -> Settings:
        """Return the settings of the run with a seed."""
        whole = self.baseline if self.settings.formats == (FP32,) else self.settings
        return replace(whole, seed=seed)


@dataclass(frozen=True)
class Experiment:
    """The contents of a TOML file.

    Attributes:
        name: name of the file, without its suffix.
        title: title of the table.
        paper: the paper's experiment that it corresponds to.
        model: the model's name in the tables.
        seeds: the seeds of each row's runs.
        pooled: whether it counts in the mean over experiments.
        rows: the rows of the table.
        initial: the model that all rows begin with; None for a random one.
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
            path: the file.
            overrides: settings that replace the file's shared ones; a row's own settings stay.

        Raises:
            SettingsError: the file cannot be read, or something in it is wrong.
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
            raise SettingsError(f"pooled must be true or false, and no experiment may be named {SUMMARY}")
        seeds = stored.get("seeds", [0])
        if not isinstance(seeds, list) or not seeds or not all(type(seed) is int for seed in seeds):
            raise SettingsError(f"seeds={seeds!r}: a list of whole numbers is expected")
        if len(set(seeds)) != len(seeds):
            raise SettingsError(f"seeds={seeds!r}: each seed may occur only once")
        formats, own = stored.get("formats", []), stored.get("rows", [])
        if not isinstance(formats, list) or not isinstance(own, list):
            raise SettingsError("formats and rows must be lists")
        described = [{"format": text} for text in formats] + own
        initial = _initial(stored, shared) if "pretraining" in stored else None
        if initial is not None:
            if "initial" in shared:
                raise SettingsError("initial and pretraining both name a model to begin with: remove one of them")
            shared["initial"] = initial.name
        rows = tuple(_row(one, shared) for one in described)
        names = [row.name for row in rows]
        if not rows or len(set(names)) != len(names):
            raise SettingsError(f"rows {names}: there must be at least one, each with a name of its own")
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
        list(made.runs())  # raises the error of a seed
        if "folder" in made.needs_path():
            raise SettingsError("the corpus folder needs corpus_path, the path of the folder: set it beside corpus")
        return made

    def only(self, rows: Sequence[str], seeds: Sequence[int], *, further: bool = True) -> "Experiment":
        """Return a part of the experiment.

        Args:
            rows: names of rows; empty means all.
            seeds: seeds; empty means all.
            further: whether "all" includes the further rows.

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
        """Return the names of the corpora of which a path must be given, as the file gives none."""
        given = [row.settings for row in self.rows] + ([self.initial.start] if self.initial else [])
        return {one.corpus for one in given if one.corpus in corpus.RECORDED and not one.corpus_path}

    def at(self, paths: Mapping[str, Path | None], folder: Path) -> "Experiment":
        """Return the experiment with the corpora and initial models where they are on this machine.

        The settings then name the digest of each corpus, which is part of a run's key.

        Args:
            paths: folders of the corpora by name; one that is named here takes the place of the file's.
            folder: of the initial models.

        Raises:
            CorpusError: a corpus cannot be loaded.
        """
        digests: dict[tuple[str, str], str] = {}

        def placed(settings: Settings) -> Settings:
            path = paths.get(settings.corpus) or settings.corpus_path
            if not path:
                return settings
            where = settings.corpus, str(Path(path).absolute())
            if where not in digests:
                digests[where] = corpus.load(*where, settings.corpus_digest).digest
            return replace(settings, corpus_path=where[1], corpus_digest=digests[where])

        initial = self.initial and replace(self.initial, start=placed(self.initial.start))
        rows = tuple(replace(row, settings=placed(row.settings)) for row in self.rows)
        if initial:
            start = str(folder.absolute() / initial.name)
            rows = tuple(replace(row, settings=replace(row.settings, initial=start)) for row in rows)
        return replace(self, rows=rows, initial=initial)

    def runs(self) -> Iterator[Settings]:
        """Yield the runs of all rows, each after its baseline, seed by seed."""
        for seed in self.seeds:
            for row in self.rows:
                yield replace(row.baseline, seed=seed)
                yield row.run(seed)


def key_of(run: Settings) -> str:
    """Name a run by its settings and its corpus, so that rows of any experiments that need the same run share it.

    The corpus counts by its digest: the same lists and transcriptions in another folder are the same run, others in the
    same folder are another one. Settings at their defaults do not count: a new setting leaves the names of earlier runs
    as they are.
    """
    format = run.formats[0].replace("/", "_")  # the name is that of a folder
    return f"{run.corpus}-{run.split}-{format}-seed{run.seed}-{_digest(_described(run))}"


def chosen(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings that are not at their defaults, as plain values."""
    defaults = Settings().to_dict()
    return {key: value for key, value in settings.items() if value != defaults.get(key)}


def _described(settings: Settings) -> dict[str, Any]:
    """Return the settings that are not at their defaults, without the places of files on this machine."""
    described: dict[str, Any] = {"version": VERSION} if VERSION > 1 else {}
    described |= {key: value for key, value in chosen(settings.to_dict()).items() if key != "corpus_path"}
    if settings.initial:
        described["initial"] = Path(settings.initial).name
    return described


def _digest(values: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:10]


def _table(stored: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    value = stored.get(key, {})
    if not isinstance(value, Mapping):
        raise SettingsError(f"{key} must be a table")
    return value


def _initial(stored: Mapping[str, Any], shared: Mapping[str, Any]) -> Initial:
    values = dict(_table(stored, "pretraining"))
    of_start: dict[str, Any] = {key: values.pop(key) for key in _OF_START if key in values}
    same = {key: shared[key] for key in ("model", "streaming") if key in shared}
    kinds = {field.name: type(field.default) for field in dataclasses.fields(Pretraining)}
    for key, value in values.items():
        if key not in kinds:
            raise SettingsError(f"pretraining: {key} is unknown: there are {', '.join([*_OF_START, *kinds])}")
        if type(value) is not kinds[key] and not (kinds[key] is float and type(value) is int):
            raise SettingsError(f"pretraining: {key}={value!r}: a value of type {kinds[key].__name__} is expected")
    return Initial(Settings.from_mapping({"corpus": "commands", **same, **of_start}), Pretraining(**values))


def _row(described: Any, shared: Mapping[str, Any]) -> Row:
    if not isinstance(described, Mapping) or not isinstance(described.get("format"), str):
        raise SettingsError(f"row {described!r}: a table with a format is expected")
    own = {key: value for key, value in described.items() if key not in ("name", "format", "further")}
    for wrong in {"formats", "seed"} & (set(own) | set(shared)):
        raise SettingsError(f"{wrong} does not belong into settings: write formats and seeds at the top of the file")
    name = str(described.get("name", described["format"]))
    if "|" in name or "\n" in name:
        raise SettingsError(f"row {name!r}: a name without | and line breaks is expected, for the tables")
    further = described.get("further", False)
    if type(further) is not bool:
        raise SettingsError(f"row {name!r}: further={further!r}, true or false is expected")
    format = str(Variant.parse(described["format"]))
    return Row(name, Settings.from_mapping({**shared, **own, "formats": [format]}), further)
