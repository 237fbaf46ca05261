"""What all commands share: tables, JSON, and errors as one line."""

import functools
import json
import shutil
import sys
from collections.abc import Callable, Sequence
from typing import Annotated, Any, ParamSpec

import typer

from fedomc.errors import FormatError, OMCError, PolicyError

Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")]
"""The option that every command has."""

INVALID_INPUT, INVALID_USE = 1, 2
"""Exit codes: a file cannot be used as it is; or the command was given something that does not exist or fit."""

_P = ParamSpec("_P")


def one_line_errors(command: Callable[_P, None]) -> Callable[_P, None]:
    """Turn the errors that a user can mend into one line on stderr and an exit code."""

    @functools.wraps(command)
    def run(*args: _P.args, **kwargs: _P.kwargs) -> None:
        try:
            command(*args, **kwargs)
        except BrokenPipeError:
            raise  # a reader such as head has seen enough; typer knows what to do
        except OSError as error:
            fail(f"{error.filename}: {error.strerror}" if error.filename else str(error), INVALID_USE)
        except (FormatError, PolicyError) as error:
            fail(str(error), INVALID_USE)
        except OMCError as error:
            fail(str(error), INVALID_INPUT)

    return run


def fail(message: str, code: int) -> None:
    """Print an error as one line on stderr and exit.

    Raises:
        Exit: always.
    """
    complain(message)
    raise typer.Exit(code)


def complain(message: str) -> None:
    """Print a message as one line on stderr."""
    typer.echo(f"fedomc: {printable(' '.join(message.split()))}", err=True)


def printable(text: str) -> str:
    """Escape what a terminal would obey, as a file may call its variables anything."""
    return "".join(each if each.isprintable() else each.encode("unicode_escape").decode() for each in text)


def print_json(content: Any) -> None:
    """Print JSON; NaN and infinities, which JSON lacks, would be an error."""
    typer.echo(json.dumps(content, indent=2, allow_nan=False))


def print_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print right-aligned columns, of which the last is left-aligned.

    In a terminal, a last cell that is too wide goes on below itself. Files and pipes get a line for each row.
    """
    lines = [[printable(cell) for cell in line] for line in (header, *rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header) - 1)]
    indent = sum(widths) + 2 * len(widths)
    room = max(16, shutil.get_terminal_size((80, 24)).columns - indent)
    for line in lines:
        first, *others = folded(line[-1], room) if sys.stdout.isatty() else [line[-1]]
        cells = [cell.rjust(width) for cell, width in zip(line[:-1], widths, strict=True)]
        typer.echo("  ".join([*cells, first]).rstrip())
        for other in others:
            typer.echo(" " * indent + other)


def folded(text: str, width: int) -> list[str]:
    """Cut a text into pieces of a width."""
    return [text[start : start + width] for start in range(0, len(text), width)] or [""]


def human_bytes(count: int) -> str:
    """Return a number of bytes in the largest unit of 1000 that leaves at least 1, as in ``4.16 MB``."""
    size, units = float(count), ["kB", "MB", "GB", "TB"]
    if count < 1000:
        return f"{count} B"
    unit = ""
    while size >= 1000 and units:
        size, unit = size / 1000, units.pop(0)
    return f"{size:.2f} {unit}"


def human_shape(shape: Sequence[int]) -> str:
    """Return a shape as in ``64x3x3``; a scalar is ``()``."""
    return "x".join(map(str, shape)) or "()"
