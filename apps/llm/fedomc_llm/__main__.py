"""Run the command line."""

from fedomc_llm.cli import app

app(prog_name="python -m fedomc_llm")
