"""The command line: ``python -m fedomc_speech``."""

import os
import tomllib
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Final

import typer
from rich.console import Console

from fedomc.cli.application import clear_errors, megabytes, minutes
from fedomc.flower.simulation import simulate, stop_on_signal
from fedomc_speech import corpus, federation, model, pretraining, report
from fedomc_speech.client import app as client_app
from fedomc_speech.cost import cost_of
from fedomc_speech.errors import SettingsError
from fedomc_speech.experiments import command
from fedomc_speech.experiments.plan import Experiment
from fedomc_speech.experiments.runner import Runs
from fedomc_speech.progress import PretrainingProgress, RunProgress
from fedomc_speech.run_folder import RunFolder
from fedomc_speech.settings import Settings

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)

DEFAULTS: Final = Settings()
EXPERIMENTS: Final = Path("apps/speech/experiments")
RESULTS: Final = Path("docs/results")
CORPUS_HELP: Final = f"{', '.join(corpus.NAMES[:-1])} or {corpus.NAMES[-1]}."
PATH_HELP: Final = "Folder of an4, librispeech or, with --corpus folder, a corpus of your own."
SEED_HELP: Final = "Seed of all random numbers."
PRETRAINING: Final = pretraining.Pretraining()
STOPPING: Final = "Stopping after this round; Ctrl-C again stops at once."

# What Flower's simulation takes besides the training, measured with cohorts of 8: once to start, and in each round.
START_SECONDS = 15.0
ROUND_SECONDS = 0.25


@app.callback()
def main() -> None:
    """Federated speech recognition with compressed parameters."""


@app.command()
def compare(
    formats: Annotated[
        list[str] | None, typer.Option("--format", "-f", help="A format to train with; may be repeated.")
    ] = None,
    name: Annotated[str, typer.Option(help="Name of the run; its folder is OUTPUT/NAME.")] = "speech",
    output: Annotated[Path, typer.Option(help="Folder of all runs.")] = Path("runs"),
    resume: Annotated[bool, typer.Option(help="Continue after the last finished round.")] = False,
    corpus_name: Annotated[str, typer.Option("--corpus", help=CORPUS_HELP)] = DEFAULTS.corpus,
    corpus_path: Annotated[str, typer.Option(help=PATH_HELP)] = DEFAULTS.corpus_path,
    corpus_digest: Annotated[
        str, typer.Option(help="Digest that the corpus must have, from an earlier run's results.json; empty: any.")
    ] = DEFAULTS.corpus_digest,
    split: Annotated[str, typer.Option(help="speaker (a client holds whole speakers) or iid.")] = DEFAULTS.split,
    clients: Annotated[int, typer.Option(help="Number of clients; 0: one for each speaker.")] = DEFAULTS.clients,
    model_size: Annotated[str, typer.Option("--model", help="tiny or large.")] = DEFAULTS.model,
    streaming: Annotated[
        bool, typer.Option(help="A model that can recognize speech while it is spoken.")
    ] = DEFAULTS.streaming,
    initial: Annotated[str, typer.Option(help="Model file to begin with, as pretrain writes it.")] = DEFAULTS.initial,
    rounds: Annotated[int, typer.Option(help="Rounds to train with each format.")] = DEFAULTS.rounds,
    cohort: Annotated[int, typer.Option(help="Number of clients in each round.")] = DEFAULTS.cohort,
    local_steps: Annotated[int, typer.Option(help="Training steps of each client in a round.")] = DEFAULTS.local_steps,
    batch: Annotated[int, typer.Option(help="Utterances in a step.")] = DEFAULTS.batch,
    client_learning_rate: Annotated[
        float, typer.Option(help="Learning rate of the clients' SGD.")
    ] = DEFAULTS.client_learning_rate,
    clip_norm: Annotated[float, typer.Option(help="Largest norm of each variable's gradient.")] = DEFAULTS.clip_norm,
    augment: Annotated[bool, typer.Option(help="Vary the features whenever an utterance is used.")] = DEFAULTS.augment,
    server_learning_rate: Annotated[
        float, typer.Option(help="Peak learning rate of the server's Adam.")
    ] = DEFAULTS.server_learning_rate,
    warmup: Annotated[
        int, typer.Option(help="Rounds in which the server's learning rate rises to its peak.")
    ] = DEFAULTS.warmup,
    evaluate_every: Annotated[
        int, typer.Option(help="Measure the word error rate every so many rounds.")
    ] = DEFAULTS.evaluate_every,
    format_by_name: Annotated[
        str, typer.Option(help="Formats by variable, as in '*.conv.*=S1E2M3 head.*=S1E2M3'.")
    ] = DEFAULTS.format_by_name,
    transform: Annotated[
        str, typer.Option(help="Transformation of each variable; empty: the default for the format.")
    ] = DEFAULTS.transform,
    weight_matrices_only: Annotated[
        bool, typer.Option(help="Leave biases and normalization in FP32.")
    ] = DEFAULTS.weight_matrices_only,
    rounding: Annotated[
        str, typer.Option(help="nearest or stochastic; empty: the default for the format.")
    ] = DEFAULTS.rounding,
    aggregate: Annotated[str, typer.Option(help="delta or weights.")] = DEFAULTS.aggregate,
    entropy_coding: Annotated[
        str, typer.Option(help="zstd on messages: none, down, up or both.")
    ] = DEFAULTS.entropy_coding,
    unquantized_format: Annotated[
        str, typer.Option(help="Format in which variables that stay FP32 are sent; empty: FP32.")
    ] = DEFAULTS.unquantized_format,
    activations: Annotated[
        str, typer.Option(help="Format of what local steps keep for the backward pass, such as S1E4M3; empty: FP32.")
    ] = DEFAULTS.activations,
    seed: Annotated[int, typer.Option(help=SEED_HELP)] = DEFAULTS.seed,
    round_timeout: Annotated[
        float, typer.Option(help="Seconds to wait for the clients of a round.")
    ] = DEFAULTS.round_timeout,
    tensorboard: Annotated[
        bool, typer.Option(help="Also write bytes, seconds and errors of each round for TensorBoard.")
    ] = False,
) -> None:
    """Train the same model with several formats in Flower's simulation, and compare them.

    A format is FP32, a format in one part such as S1E3M7, or base and update such as S1E2M3+S1E2M1. With @0.9 appended,
    a random 90 percent of the parameters are compressed, others for each client and round.
    """
    console = Console()
    with clear_errors():
        settings = Settings(
            formats=tuple(formats) if formats else DEFAULTS.formats,
            corpus=corpus_name,
            corpus_path=corpus_path,
            corpus_digest=corpus_digest,
            split=split,
            clients=clients,
            model=model_size,
            streaming=streaming,
            initial=initial,
            rounds=rounds,
            cohort=cohort,
            local_steps=local_steps,
            batch=batch,
            client_learning_rate=client_learning_rate,
            clip_norm=clip_norm,
            augment=augment,
            server_learning_rate=server_learning_rate,
            warmup=warmup,
            evaluate_every=evaluate_every,
            format_by_name=format_by_name,
            transform=transform,
            weight_matrices_only=weight_matrices_only,
            rounding=rounding,
            aggregate=aggregate,
            entropy_coding=entropy_coding,
            unquantized_format=unquantized_format,
            activations=activations,
            seed=seed,
            round_timeout=round_timeout,
        )
        _compare(settings, output / name, resume, tensorboard, console)


@app.command()
def pretrain(
    path: Annotated[Path, typer.Argument(metavar="FILE", help="File to write, for compare --initial.")],
    corpus_name: Annotated[str, typer.Option("--corpus", help=CORPUS_HELP)] = "commands",
    corpus_path: Annotated[str, typer.Option(help=PATH_HELP)] = DEFAULTS.corpus_path,
    model_size: Annotated[str, typer.Option("--model", help="tiny or large.")] = DEFAULTS.model,
    streaming: Annotated[
        bool, typer.Option(help="A model that can recognize speech while it is spoken.")
    ] = DEFAULTS.streaming,
    initial: Annotated[str, typer.Option(help="Model file to begin with.")] = DEFAULTS.initial,
    augment: Annotated[bool, typer.Option(help="Vary the features whenever an utterance is used.")] = True,
    steps: Annotated[int, typer.Option(help="Number of training steps.")] = PRETRAINING.steps,
    batch: Annotated[int, typer.Option(help="Utterances in a step.")] = PRETRAINING.batch,
    learning_rate: Annotated[float, typer.Option(help="Peak learning rate of AdamW.")] = PRETRAINING.learning_rate,
    warmup: Annotated[
        int, typer.Option(help="Steps in which the learning rate rises to its peak.")
    ] = PRETRAINING.warmup,
    weight_decay: Annotated[float, typer.Option(help="Weight decay of the matrices.")] = PRETRAINING.weight_decay,
    clip_norm: Annotated[float, typer.Option(help="Largest norm of the whole gradient.")] = PRETRAINING.clip_norm,
    seed: Annotated[int, typer.Option(help=SEED_HELP)] = PRETRAINING.seed,
) -> None:
    """Train a model on one machine, for a federation to begin with.

    The file is written at the end; Ctrl-C leaves an earlier file as it was.
    """
    console = Console()
    with clear_errors():
        settings = pretraining.Pretraining(steps, batch, learning_rate, warmup, weight_decay, clip_norm, seed)
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
    files: Annotated[list[Path] | None, typer.Argument(help="TOML files; without any, all in the folder.")] = None,
    folder: Annotated[Path, typer.Option("--experiments", help="Folder of the TOML files.")] = EXPERIMENTS,
    row: Annotated[list[str] | None, typer.Option(help="Run only this row; may be repeated.")] = None,
    seed: Annotated[list[int] | None, typer.Option(help="Run only this seed; may be repeated.")] = None,
    further: Annotated[bool, typer.Option("--further", help="Also run the rows that go beyond the paper.")] = False,
    an4: Annotated[
        Path | None, typer.Option(help="Folder of AN4; without it, experiments that need AN4 are left out.")
    ] = None,
    librispeech: Annotated[Path | None, typer.Option(help="Folder of LibriSpeech, likewise.")] = None,
    setting: Annotated[
        list[str] | None, typer.Option("--set", help="NAME=VALUE: replaces a setting of the files, as in model=large.")
    ] = None,
    output: Annotated[Path, typer.Option(help="Folder of the runs.")] = Path("runs/experiments"),
    results: Annotated[Path, typer.Option(help="Folder for tables and figures.")] = RESULTS,
    workers: Annotated[
        int, typer.Option(min=1, help="Number of runs at the same time, one on each core.")
    ] = os.cpu_count() or 1,
) -> None:
    """Run the paper's experiments, each run in its own process; finished runs are not repeated."""
    console = Console()
    with clear_errors():
        if setting and results == RESULTS:
            raise SettingsError("--set makes another experiment: choose a folder for its tables with --results")
        paths = {"an4": an4, "librispeech": librispeech}
        chosen = []
        for file in files or sorted(folder.glob("*.toml")):
            experiment = Experiment.read(file, dict(_assignment(text) for text in setting or []))
            missing = experiment.needs_path() - {name for name, path in paths.items() if path}
            if missing:
                console.print(f"{file}: left out, because it needs --{' and --'.join(sorted(missing))}", soft_wrap=True)
                continue
            chosen.append(experiment.at(paths, output))
        if not chosen:
            raise SettingsError(f"there is no experiment to run in {folder}: name a TOML file")
        with stop_on_signal(lambda: console.print(STOPPING)) as stop:
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
    settings = replace(settings, corpus_digest=loaded.digest)
    parts = corpus.split(loaded.train, settings.split, settings.clients or None, settings.seed)
    federation.check_cohort(settings, len(parts))
    cost = _cost(settings, loaded, parts)
    folder = RunFolder(path, settings, resume=resume)
    console.print(cost, soft_wrap=True)
    with stop_on_signal(lambda: console.print(STOPPING)) as stop:
        with RunProgress(settings, console, stop) as progress:
            done: list[bool] = []
            simulate(
                lambda grid: done.append(federation.run(settings, grid, folder, progress, tensorboard=tensorboard)),
                client_app,
                len(parts),
                path / "flower.log",
            )
    report.print_table(console, folder.runs)
    console.print(f"{path / 'results.json'}, {report.write_report(path, settings, folder.runs)}")
    if not done[0]:
        console.print("Stopped. The same command with --resume continues after the last finished round.")
        raise typer.Exit(130)


def _load_corpus(settings: Settings) -> corpus.Corpus:
    with corpus.progress_bar() as progress:
        return corpus.load(settings.corpus, settings.corpus_path, settings.corpus_digest, progress=progress)


def _cost(settings: Settings, loaded: corpus.Corpus, parts: list[tuple[corpus.Utterance, ...]]) -> str:
    """Describe what the run will send (before entropy coding) and how long it will take, from a step of each format."""
    visits = settings.rounds * settings.cohort
    cores = os.cpu_count() or 1
    overhead = START_SECONDS + ROUND_SECONDS * settings.rounds * len(settings.formats)
    costs = [cost_of(settings, variant) for variant in settings.variants]
    seconds = sum(cost.step_seconds for cost in costs) * settings.local_steps * visits
    sent = sum(cost.visit_bytes for cost in costs) * visits
    return (
        f"{len(settings.formats)} formats, {settings.rounds} rounds of {settings.cohort} out of {len(parts)} clients, "
        f"{len(loaded.train)} utterances to train on and {len(loaded.test)} to test on. The run will send about "
        f"{megabytes(sent)} in all and take about {minutes(seconds / cores + overhead)} on {cores} cores."
    )
