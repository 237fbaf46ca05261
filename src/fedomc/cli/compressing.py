"""``fedomc compress``: a safetensors file becomes a packed model file."""

import math
import os
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from fedomc.cli.output import INVALID_USE, Json, complain, fail, human_bytes, print_json, print_table, printable
from fedomc.serialization.file_compression import compress_file
from fedomc.training.fidelity import Distance, warning_of
from fedomc.training.policy import CompressionPolicy


def compress(
    source: Annotated[Path, typer.Argument(metavar="IN", help="A safetensors file with dense tensors.")],
    target: Annotated[Path, typer.Argument(metavar="OUT", help="The file to write, which fedomc.load_model reads.")],
    format: Annotated[str, typer.Option("--format", help="A format, such as S1E3M7, S1E2M3/64 or NF4.")],
    exclude: Annotated[
        list[str] | None, typer.Option(help="Name pattern of variables to leave as they are; may be repeated.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite OUT.")] = False,
    json: Json = False,
) -> None:
    """Pack the matrices of a safetensors file, one tensor at a time, and show what is lost."""
    policy = CompressionPolicy.parse(format, exclude=exclude or ())
    if not source.is_file():
        fail(f"{source}: no such file", INVALID_USE)
    if target.is_dir() or not target.parent.is_dir():
        fail(f"{target}: name a file in a folder that exists", INVALID_USE)
    if target.exists() and not force:
        fail(f"{target} exists: use --force to overwrite it", INVALID_USE)
    former = os.path.getsize(source)
    with Progress(
        TextColumn("{task.percentage:>3.0f}%"),
        BarColumn(),
        DownloadColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.description}", markup=False),
        console=Console(stderr=True),
        transient=True,
        disable=not sys.stderr.isatty(),
    ) as progress:
        task = progress.add_task("", total=former)
        distances = compress_file(
            source,
            target,
            policy,
            lambda name, nbytes: progress.update(task, advance=nbytes, description=name),
        )
    warning = warning_of(distances, format)
    present = os.path.getsize(target)
    if json:
        rows = [
            {"name": name, "relative_error": relative_error(distance), "lost_share": _finite(distance.lost_share)}
            for name, distance in sorted(distances.items())
        ]
        print_json(
            {"format": str(policy), "variables": rows, "bytes": present, "input_bytes": former, "warning": warning}
        )
    else:
        rows_of_text = [
            (_percent(relative_error(distance)), _percent(_finite(distance.lost_share)), name)
            for name, distance in sorted(distances.items())
        ]
        print_table(("error", "lost", "packed variable"), rows_of_text)
        typer.echo(
            f"\n{printable(str(target))}: {human_bytes(present)}, from {human_bytes(former)} ({present / former:.1%})"
        )
    if warning is not None:
        complain(f"warning: {warning}")


def relative_error(distance: Distance) -> float | None:
    """Return the norm of the errors over that of the values; None where a square is larger than float32 holds."""
    if not distance.size:
        return 0.0
    return _finite(math.sqrt(distance.error / distance.size))


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.2%}"
