"""``python -m fedomc_speech.deployment``: make keys, or run the app as a real deployment on this machine."""

import signal
import sys
from pathlib import Path
from typing import Annotated

import typer

from fedomc.errors import OMCError
from fedomc_speech.deployment.keys import make_keys
from fedomc_speech.deployment.loopback import Loopback

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)


@app.command()
def keys(
    folder: Annotated[Path, typer.Argument(help="Folder for the files; nothing in it is replaced.")],
    nodes: Annotated[int, typer.Option(help="Number of SuperNodes.")] = 3,
    host: Annotated[list[str] | None, typer.Option(help="Address or name of the SuperLink; may be repeated.")] = None,
    days: Annotated[int, typer.Option(help="Number of days for which the certificates are valid.")] = 365,
) -> None:
    """Make a certificate authority, the SuperLink's certificate, and a key pair for each SuperNode."""
    make_keys(folder, nodes, host or ("127.0.0.1", "localhost"), days)
    typer.echo(f"{folder}: ca.crt, server.crt, server.key, {nodes} node keys")


@app.command()
def run(
    folder: Annotated[Path, typer.Argument(help="Folder for keys, Flower's files and logs.")],
    nodes: Annotated[int, typer.Option(help="Number of SuperNodes.")] = 3,
    run_config: Annotated[str, typer.Option(help="More settings, as flwr run takes them.")] = "",
) -> None:
    """Start a SuperLink and SuperNodes on this machine, run the app once, and stop them all."""
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # so that all processes are stopped
    typer.echo(f"Starting a SuperLink and {nodes} SuperNodes; logs are in {folder / 'logs'}")
    with Loopback(folder, nodes) as loopback:
        settings = f"split='iid' clients={nodes} cohort={nodes} output='{folder.absolute() / 'results'}'"
        raise SystemExit(loopback.submit(f"{settings} {run_config}").wait())


if __name__ == "__main__":
    try:
        app()
    except OMCError as error:
        typer.echo(f"error: {error}", err=True)
        raise SystemExit(2) from None
