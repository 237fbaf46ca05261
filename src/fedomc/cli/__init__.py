"""The command line ``fedomc``, which needs the extra ``cli``; ``docs/cli.md`` shows its commands."""

import sys


def main() -> None:
    """Run the command line; without the extra, say how to install it and exit with 2."""
    try:
        import rich  # noqa: F401
        import typer  # noqa: F401
    except ImportError as error:
        sys.stderr.write(f"fedomc: {error}: install the command line with pip install 'fedomc[cli]'\n")
        sys.exit(2)
    from fedomc.cli.app import app

    app(prog_name="fedomc")
