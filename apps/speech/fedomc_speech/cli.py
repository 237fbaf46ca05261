"""The command line: ``python -m fedomc_speech``."""

import os
import signal
import threading
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Annotated, Any, Final

import typer
from rich.console import Console
from rich.markup import escape

import fedomc
from fedomc_speech import corpus, federation, model, pretraining, report
from fedomc_speech.cost import cost_of
from fedomc_speech.errors import SettingsError
from fedomc_speech.experiments import command
from fedomc_speech.experiments.plan import Experiment
from fedomc_speech.experiments.runner import Runs
from fedomc_speech.progress import PretrainingProgress, RunProgress, minutes
from fedomc_speech.run_folder import RunFolder
from fedomc_speech.settings import Settings
from fedomc_speech.simulation import simulate

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)

DEFAULTS: Final = Settings()
EXPERIMENTS: Final = Path("apps/speech/experiments")
RESULTS: Final = Path("docs/results")
PRETRAINING: Final = pretraining.Pretraining()

# What Flower's simulation adds to the training itself, as measured with cohorts of 8: to start, and to each round.
START_SECONDS = 15.0
ROUND_SECONDS = 0.25


@app.callback()
def main() -> None:
    """Federated speech recognition with compressed parameters."""


@app.command()
def compare(
    formats: Annotated[list[str] | None, typer.Option("--format", "-f", help="A format; repeat it.")] = None,
    name: Annotated[str, typer.Option(help="The run's folder is OUTPUT/NAME.")] = "speech",
    output: Annotated[Path, typer.Option(help="Folder of all runs.")] = Path("runs"),
    resume: Annotated[bool, typer.Option(help="Go on from the last finished round.")] = False,
    corpus_name: Annotated[
        str, typer.Option("--corpus", help="digits, commands, an4 or librispeech.")
    ] = DEFAULTS.corpus,
    corpus_path: Annotated[str, typer.Option(help="Folder of an4 or librispeech.")] = DEFAULTS.corpus_path,
    split: Annotated[str, typer.Option(help="speaker (a client is a speaker) or iid.")] = DEFAULTS.split,
    clients: Annotated[int, typer.Option(help="Number of clients; 0: one a speaker.")] = DEFAULTS.clients,
    model_size: Annotated[str, typer.Option("--model", help="tiny or large.")] = DEFAULTS.model,
    streaming: Annotated[
        bool, typer.Option(help="A model that can run while the speaker speaks.")
    ] = DEFAULTS.streaming,
    initial: Annotated[str, typer.Option(help="Model file to begin with, as pretrain writes it.")] = DEFAULTS.initial,
    rounds: Annotated[int, typer.Option(help="Rounds of each format.")] = DEFAULTS.rounds,
    cohort: Annotated[int, typer.Option(help="Clients a round.")] = DEFAULTS.cohort,
    local_steps: Annotated[int, typer.Option(help="Steps of each client in a round.")] = DEFAULTS.local_steps,
    batch: Annotated[int, typer.Option(help="Utterances a step.")] = DEFAULTS.batch,
    client_rate: Annotated[float, typer.Option(help="Learning rate of the clients' SGD.")] = DEFAULTS.client_rate,
    clip_norm: Annotated[float, typer.Option(help="Of each variable's gradient.")] = DEFAULTS.clip_norm,
    augment: Annotated[bool, typer.Option(help="Change what a client hears at each sight.")] = DEFAULTS.augment,
    server_rate: Annotated[float, typer.Option(help="Highest rate of the server's Adam.")] = DEFAULTS.server_rate,
    warmup: Annotated[int, typer.Option(help="Rounds in which it rises.")] = DEFAULTS.warmup,
    evaluate_every: Annotated[int, typer.Option(help="Rounds between measurements.")] = DEFAULTS.evaluate_every,
    format_by_name: Annotated[
        str, typer.Option(help="Formats by variable, as in '*.conv.*=S1E2M3 head.*=S1E2M3'.")
    ] = DEFAULTS.format_by_name,
    transform: Annotated[str, typer.Option(help="Of each variable; empty: the format's best.")] = DEFAULTS.transform,
    weight_matrices_only: Annotated[
        bool, typer.Option(help="Leave biases and normalization in FP32.")
    ] = DEFAULTS.weight_matrices_only,
    rounding: Annotated[str, typer.Option(help="nearest, stochastic; empty: the format's best.")] = DEFAULTS.rounding,
    aggregate: Annotated[str, typer.Option(help="delta or weights.")] = DEFAULTS.aggregate,
    entropy_coding: Annotated[
        str, typer.Option(help="zstd on messages: none, down, up or both.")
    ] = DEFAULTS.entropy_coding,
    unquantized_format: Annotated[
        str, typer.Option(help="In which FP32 variables travel.")
    ] = DEFAULTS.unquantized_format,
    seed: Annotated[int, typer.Option(help="Of everything random.")] = DEFAULTS.seed,
    round_timeout: Annotated[
        float, typer.Option(help="Seconds to wait for a round's clients.")
    ] = DEFAULTS.round_timeout,
    tensorboard: Annotated[bool, typer.Option(help="Write bytes, seconds and errors of each round, too.")] = False,
) -> None:
    """Train the same model with several formats in Flower's simulation and compare them.

    A format is FP32, one part such as S1E3M7, or base and update such as S1E2M3+S1E2M1; @0.9 behind it compresses a
    random 90 per cent, different for each client and round.
    """
    console = Console()
    with _clear_errors():
        settings = Settings(
            formats=tuple(formats) if formats else DEFAULTS.formats,
            corpus=corpus_name,
            corpus_path=corpus_path,
            split=split,
            clients=clients,
            model=model_size,
            streaming=streaming,
            initial=initial,
            rounds=rounds,
            cohort=cohort,
            local_steps=local_steps,
            batch=batch,
            client_rate=client_rate,
            clip_norm=clip_norm,
            augment=augment,
            server_rate=server_rate,
            warmup=warmup,
            evaluate_every=evaluate_every,
            format_by_name=format_by_name,
            transform=transform,
            weight_matrices_only=weight_matrices_only,
            rounding=rounding,
            aggregate=aggregate,
            entropy_coding=entropy_coding,
            unquantized_format=unquantized_format,
            seed=seed,
            round_timeout=round_timeout,
        )
        _compare(settings, output / name, resume, tensorboard, console)


@app.command()
def pretrain(
    path: Annotated[Path, typer.Argument(metavar="FILE", help="Of the model, for compare --initial.")],
    corpus_name: Annotated[str, typer.Option("--corpus", help="digits, commands, an4 or librispeech.")] = "commands",
    corpus_path: Annotated[str, typer.Option(help="Folder of an4 or librispeech.")] = DEFAULTS.corpus_path,
    model_size: Annotated[str, typer.Option("--model", help="tiny or large.")] = DEFAULTS.model,
    streaming: Annotated[
        bool, typer.Option(help="A model that can run while the speaker speaks.")
    ] = DEFAULTS.streaming,
    initial: Annotated[str, typer.Option(help="Model file to begin with.")] = DEFAULTS.initial,
    augment: Annotated[bool, typer.Option(help="Change the features at each sight.")] = True,
    steps: Annotated[int, typer.Option(help="Steps.")] = PRETRAINING.steps,
    batch: Annotated[int, typer.Option(help="Utterances a step.")] = PRETRAINING.batch,
    rate: Annotated[float, typer.Option(help="Highest rate of AdamW.")] = PRETRAINING.rate,
    warmup: Annotated[int, typer.Option(help="Steps in which it rises.")] = PRETRAINING.warmup,
    weight_decay: Annotated[float, typer.Option(help="Of the matrices.")] = PRETRAINING.weight_decay,
    clip_norm: Annotated[float, typer.Option(help="Of the whole gradient.")] = PRETRAINING.clip_norm,
    seed: Annotated[int, typer.Option(help="Of everything random.")] = PRETRAINING.seed,
) -> None:
    """Train a model in one place, for a federation to begin with.

    The file is written at the end; Ctrl-C leaves what was there.
    """
    console = Console()
    with _clear_errors():
        settings = pretraining.Pretraining(steps, batch, rate, warmup, weight_decay, clip_norm, seed)
        start = Settings(
            corpus=corpus_name,
            corpus_path=corpus_path,
            model=model_size,
            streaming=streaming,
            initial=initial,
            augment=augment,
            seed=seed,
        )
        model.check_size(model_size)
        loaded = _load_corpus(start)
        with PretrainingProgress(settings.steps, console) as progress:
            wer = pretraining.make(path, start, settings, progress.step_done)
        console.print(f"{path}: WER {wer:.1f}% on the {len(loaded.test)} test utterances of {corpus_name}")


@app.command()
def experiments(
    files: Annotated[list[Path] | None, typer.Argument(help="TOML files; all of EXPERIMENTS by default.")] = None,
    folder: Annotated[Path, typer.Option("--experiments", help="Folder of the TOML files.")] = EXPERIMENTS,
    row: Annotated[list[str] | None, typer.Option(help="Only this row; repeat it.")] = None,
    seed: Annotated[list[int] | None, typer.Option(help="Only this seed; repeat it.")] = None,
    further: Annotated[bool, typer.Option("--further", help="The rows, too, that go further than the paper.")] = False,
    an4: Annotated[Path | None, typer.Option(help="Folder of AN4; without it what needs AN4 is left out.")] = None,
    librispeech: Annotated[Path | None, typer.Option(help="Folder of LibriSpeech, likewise.")] = None,
    setting: Annotated[list[str] | None, typer.Option("--set", help="NAME=VALUE in the files, as model=large.")] = None,
    output: Annotated[Path, typer.Option(help="Folder of the runs.")] = Path("runs/experiments"),
    results: Annotated[Path, typer.Option(help="Folder for tables and figures.")] = RESULTS,
    workers: Annotated[int, typer.Option(min=1, help="Runs at a time, a core each.")] = os.cpu_count() or 1,
) -> None:
    """Run the paper's experiments, each run in a process; what is finished is not run again."""
    console = Console()
    with _clear_errors():
        if setting and results == RESULTS:
            raise SettingsError("--set makes another experiment: give --results, a folder for its tables")
        paths = {"an4": an4, "librispeech": librispeech}
        chosen = []
        for file in files or sorted(folder.glob("*.toml")):
            experiment = Experiment.read(file, dict(_assignment(text) for text in setting or []))
            missing = experiment.needs_path() - {name for name, path in paths.items() if path}
            if missing:
                console.print(f"{file}: left out, as it needs --{' and --'.join(sorted(missing))}", soft_wrap=True)
                continue
            chosen.append(experiment.at(paths, output))
        if not chosen:
            raise SettingsError(f"no experiment to run in {folder}: name a TOML file")
        with _stop_on_interrupt(console) as stop:
            rows, seeds = row or [], seed or []
            if not command.run(chosen, rows, seeds, Runs(output), results, workers, console, stop, further=further):
                raise typer.Exit(130)


def _assignment(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not equals:
        raise SettingsError(f"--set {text}: NAME=VALUE is expected")
    try:
        return name, tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        return name, value


def _compare(settings: Settings, path: Path, resume: bool, tensorboard: bool, console: Console) -> None:
    model.check_size(settings.model)
    loaded = _load_corpus(settings)
    parts = corpus.split(loaded.train, settings.split, settings.clients or None, settings.seed)
    federation.check_cohort(settings, len(parts))
    cost = _cost(settings, loaded, parts)
    folder = RunFolder(path, settings, resume=resume)
    console.print(cost, soft_wrap=True)
    with _stop_on_interrupt(console) as stop:
        with RunProgress(settings, console, stop) as progress:
            done: list[bool] = []
            simulate(
                lambda grid: done.append(federation.run(settings, grid, folder, progress, tensorboard=tensorboard)),
                len(parts),
                path / "flower.log",
            )
    console.print(report.table(folder.runs))
    console.print(f"{path / 'results.json'}, {report.write_report(path, settings, folder.runs)}")
    if not done[0]:
        console.print("Stopped. The same command with --resume goes on from the last finished round.")
        raise typer.Exit(130)


def _load_corpus(settings: Settings) -> corpus.Corpus:
    with corpus.progress_bar() as progress:
        where = Path(settings.corpus_path) if settings.corpus_path else None
        return corpus.load(settings.corpus, where, progress=progress)


def _cost(settings: Settings, loaded: corpus.Corpus, parts: list[tuple[corpus.Utterance, ...]]) -> str:
    """Say what the run will send (without entropy coding) and take, from one local step of each format."""
    visits = settings.rounds * settings.cohort
    cores = os.cpu_count() or 1
    overhead = START_SECONDS + ROUND_SECONDS * settings.rounds * len(settings.formats)
    costs = [cost_of(settings, variant) for variant in settings.variants]
    seconds = sum(cost.step_seconds for cost in costs) * settings.local_steps * visits
    sent = sum(cost.visit_bytes for cost in costs) * visits
    return (
        f"{len(settings.formats)} formats, {settings.rounds} rounds of {settings.cohort} out of {len(parts)} clients, "
        f"{len(loaded.train)} utterances to train and {len(loaded.test)} to test. "
        f"It will send about {report.megabytes(sent)} in all and take about {minutes(seconds / cores + overhead)} "
        f"on {cores} cores."
    )


@contextmanager
def _clear_errors() -> Iterator[None]:
    """Show what the user can mend as one line, with exit code 2."""
    try:
        yield
    except fedomc.OMCError as error:
        Console(stderr=True).print("[bold red]error:[/]", escape(str(error)), highlight=False, soft_wrap=True)
        raise typer.Exit(2) from None


@contextmanager
def _stop_on_interrupt(console: Console) -> Iterator[threading.Event]:
    """Turn the first Ctrl-C into a stop after the round; a second one ends at once."""
    stop = threading.Event()

    def request(number: int, frame: FrameType | None) -> None:
        if stop.is_set():
            raise KeyboardInterrupt
        stop.set()
        console.print("Stopping after this round. Ctrl-C again ends at once.")

    previous: Any = signal.signal(signal.SIGINT, request)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGINT, previous)
