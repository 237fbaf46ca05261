"""``fedomc inspect``: the variables of a file and the bytes that they take."""

from pathlib import Path
from typing import Annotated

import typer

from fedomc.cli.output import Json, human_bytes, human_shape, print_json, print_table, printable
from fedomc.serialization.contents import Contents, read_contents


def inspect(
    file: Annotated[Path, typer.Argument(help="A file of fedomc.save_model, or any safetensors file.")],
    verify: Annotated[bool, typer.Option("--verify", help="Read all values and check them against digests.")] = False,
    json: Json = False,
) -> None:
    """List the variables of a model file: shape, dtype or format, and bytes against FP32."""
    contents = read_contents(file, verify=verify)
    if json:
        print_json(_as_json(contents, verify))
        return
    rows = [
        (each.held, human_shape(each.shape), human_bytes(each.nbytes), _percent(each.nbytes, each.fp32), each.name)
        for each in contents.variables
    ]
    print_table(("held as", "shape", "bytes", "of FP32", "variable"), rows)
    packed = sum(variable.packed for variable in contents.variables)
    total = f"{human_bytes(contents.nbytes)} of {human_bytes(contents.fp32)} in FP32"
    typer.echo(
        f"\n{len(rows)} variables, {packed} of them packed: {total} ({_percent(contents.nbytes, contents.fp32)})"
    )
    for name, first in contents.tied.items():
        typer.echo(printable(f"{name} is tied to {first}"))
    if verify:
        typer.echo("all values match the digests" if contents.described else "the file has no digests to check")


def _as_json(contents: Contents, verify: bool) -> dict[str, object]:
    rows = [
        {
            "name": variable.name,
            "shape": list(variable.shape),
            "held_as": variable.held,
            "packed": variable.packed,
            "bytes": variable.nbytes,
            "fp32_bytes": variable.fp32,
        }
        for variable in contents.variables
    ]
    return {
        "variables": rows,
        "bytes": contents.nbytes,
        "fp32_bytes": contents.fp32,
        "tied": contents.tied,
        "metadata": contents.texts,
        "written_by_fedomc": contents.described,
        "verified": verify and contents.described,
    }


def _percent(part: int, whole: int) -> str:
    return f"{part / whole:.1%}" if whole else "-"
