"""The commands under one name."""

import typer

from fedomc.cli.bench import bench
from fedomc.cli.compressing import compress
from fedomc.cli.info import info
from fedomc.cli.inspecting import inspect
from fedomc.cli.output import one_line_errors
from fedomc.cli.planning import plan

app = typer.Typer(
    help="Online Model Compression: look into model files, compress them, fit a budget, and measure this machine.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
for _command in (info, inspect, compress, plan, bench):
    app.command()(one_line_errors(_command))
