"""Run the command line."""

from fedomc_speech.cli import app

app(prog_name="python -m fedomc_speech")
