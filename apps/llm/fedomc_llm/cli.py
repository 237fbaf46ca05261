"""The command line: ``python -m fedomc_llm``."""

import os
from pathlib import Path
from typing import Annotated, Final

import torch
import typer
from rich.console import Console

import fedomc
from fedomc.cli.application import clear_errors, megabytes, minutes
from fedomc.flower.simulation import log_to, simulate, stop_on_signal
from fedomc.huggingface import attach_quantizer
from fedomc_llm import federation, models, pretraining, report, texts
from fedomc_llm.client import app as client_app
from fedomc_llm.cost import cost_of
from fedomc_llm.errors import RunStopped
from fedomc_llm.progress import RunProgress
from fedomc_llm.run_folder import RunFolder
from fedomc_llm.settings import Settings

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)

DEFAULTS: Final = Settings()
START_SECONDS: Final = 15.0
"""What Flower's simulation takes to start."""


@app.callback()
def main() -> None:
    """Federated fine-tuning of causal language models with compressed parameters."""


@app.command()
def finetune(
    variants: Annotated[
        list[str] | None,
        typer.Option("--variant", "-v", help="full:FORMAT, lora:FORMAT or lora:FORMAT:ADAPTERS; may be repeated."),
    ] = None,
    name: Annotated[str, typer.Option(help="Name of the run; its folder is OUTPUT/NAME.")] = "llm",
    output: Annotated[Path, typer.Option(help="Folder of all runs.")] = Path("runs"),
    resume: Annotated[bool, typer.Option(help="Continue after the last finished round.")] = False,
    model: Annotated[
        str, typer.Option(help="Folder of a model, or a GGUF file; empty: the embedded model.")
    ] = DEFAULTS.model,
    texts_folder: Annotated[
        str, typer.Option("--texts", help="Folder with a text file for each client; empty: roles of Shakespeare.")
    ] = DEFAULTS.texts,
    rounds: Annotated[int, typer.Option(help="Rounds of each variant.")] = DEFAULTS.rounds,
    cohort: Annotated[int, typer.Option(help="Clients that train in a round; 0: all.")] = DEFAULTS.cohort,
    local_steps: Annotated[int, typer.Option(help="Training steps of each client in a round.")] = DEFAULTS.local_steps,
    batch: Annotated[int, typer.Option(help="Sequences in a step.")] = DEFAULTS.batch,
    length: Annotated[int, typer.Option(help="Tokens of a sequence.")] = DEFAULTS.length,
    learning_rate: Annotated[float, typer.Option(help="Learning rate of AdamW.")] = DEFAULTS.learning_rate,
    lora_learning_rate: Annotated[float, typer.Option(help="The same for adapters.")] = DEFAULTS.lora_learning_rate,
    rank: Annotated[int, typer.Option(help="Rank of the adapters.")] = DEFAULTS.rank,
    targets: Annotated[
        str, typer.Option(help="Names of the layers that get adapters, or all-linear.")
    ] = DEFAULTS.targets,
    held_out: Annotated[
        int, typer.Option(help="Sequences of each held-out text to measure on; 0: all.")
    ] = DEFAULTS.held_out,
    checkpointing: Annotated[
        bool, typer.Option(help="Compute layers again in the backward pass, for less memory.")
    ] = DEFAULTS.checkpointing,
    activations: Annotated[
        str, typer.Option(help="Format in which activations are held, such as S1E4M3; empty: as they are.")
    ] = DEFAULTS.activations,
    head_slice: Annotated[
        int, typer.Option(help="Entries of a large vocabulary whose logits are in memory at a time; 0: all.")
    ] = DEFAULTS.head_slice,
    prompt: Annotated[str, typer.Option(help="Beginning of the samples.")] = DEFAULTS.prompt,
    sample_tokens: Annotated[int, typer.Option(help="Tokens of a sample.")] = DEFAULTS.sample_tokens,
    pretraining_steps: Annotated[
        int, typer.Option(help="Steps in which the embedded model is pretrained.")
    ] = DEFAULTS.pretraining_steps,
    seed: Annotated[int, typer.Option(help="Seed of all random numbers.")] = DEFAULTS.seed,
    round_timeout: Annotated[
        float, typer.Option(help="Seconds to wait for the clients of a round.")
    ] = DEFAULTS.round_timeout,
) -> None:
    """Fine-tune the same model in several ways in Flower's simulation, and compare them."""
    console = Console()
    with clear_errors():
        settings = Settings(
            variants=tuple(variants) if variants else DEFAULTS.variants,
            model=str(Path(model).expanduser().absolute()) if model else "",
            texts=str(Path(texts_folder).expanduser().absolute()) if texts_folder else "",
            rounds=rounds,
            cohort=cohort,
            local_steps=local_steps,
            batch=batch,
            length=length,
            learning_rate=learning_rate,
            lora_learning_rate=lora_learning_rate,
            rank=rank,
            targets=targets,
            held_out=held_out,
            checkpointing=checkpointing,
            activations=activations,
            head_slice=head_slice,
            prompt=prompt,
            sample_tokens=sample_tokens,
            pretraining_steps=pretraining_steps,
            seed=seed,
            round_timeout=round_timeout,
        )
        _finetune(settings, output.absolute(), name, resume, console)


@app.command()
def pack(
    model: Annotated[str, typer.Argument(help="Folder of a model, or a GGUF file.")],
    folder: Annotated[Path, typer.Argument(help="Folder to write.")],
    format: Annotated[str, typer.Option(help="Format of the weight matrices.")] = "S1E2M3/64",
) -> None:
    """Write a model packed, for clients to read as a base: --model FOLDER --variant lora:FORMAT."""
    with clear_errors():
        packed = models.load(model, format)
        attach_quantizer(packed).save_pretrained(folder)  # type: ignore[arg-type]
        models.tokenizer(model).save_pretrained(folder)
        Console().print(f"{folder}: {fedomc.parameter_bytes(packed).ratio:.1%} of FP32", soft_wrap=True)


def _finetune(settings: Settings, output: Path, name: str, resume: bool, console: Console) -> None:
    clients = len(texts.read(settings.texts))
    federation.check_cohort(settings, clients)
    folder = RunFolder(output / name, settings, resume=resume)
    log_to(folder.path / "flower.log")
    torch.set_num_threads(1)
    stopping = "Stopping after this round; Ctrl-C again stops at once."
    with stop_on_signal(lambda: console.print(stopping)) as stop, RunProgress(settings.rounds, console, stop) as shown:
        try:
            place = settings.model or str(
                pretraining.prepared(
                    output,
                    settings.pretraining_steps,
                    settings.seed,
                    lambda step, loss: shown.pretraining(settings.pretraining_steps, step, loss),
                )
            )
            console.print(_cost(settings, place, clients, folder), soft_wrap=True)
            simulate(
                lambda grid: federation.run(settings, place, grid, folder, shown),
                client_app,
                clients,
                folder.path / "flower.log",
            )
        except RunStopped:
            pass
    report.print_table(console, folder.runs)
    console.print(f"{folder.path / 'results.json'}, {report.write_report(folder.path, settings, folder.runs)}")
    if len(folder.runs) < len(settings.variants):
        console.print("Stopped. The same command with --resume continues after the last finished round.")
        raise typer.Exit(130)


def _cost(settings: Settings, place: str, clients: int, folder: RunFolder) -> str:
    """Describe what the run will send, hold and take, from a step of each variant that is to run."""
    cores = os.cpu_count() or 1
    visits = settings.rounds * (settings.cohort or clients)
    lines, seconds, sent = [], START_SECONDS, 0
    for variant in settings.parsed:
        if folder.finished(str(variant)):
            continue
        cost = cost_of(settings, variant, place)
        measuring = cost.step_seconds * settings.held_out / settings.batch / 3 * (settings.rounds + 1) * clients
        seconds += (cost.step_seconds * settings.local_steps * visits + measuring) / cores
        sent += (cost.down_bytes + cost.up_bytes) * visits
        lines.append(
            f"{variant}: a client holds {megabytes(cost.held_bytes)} of parameters and optimizer state, "
            f"receives {megabytes(cost.down_bytes)} and sends {megabytes(cost.up_bytes)} in a round"
        )
    lines.append(
        f"{settings.rounds} rounds with {settings.cohort or clients} of {clients} clients. The run will send about "
        f"{megabytes(sent)} in all and take about {minutes(seconds)} on {cores} cores."
    )
    return "\n".join(lines)
