"""The ServerApp for ``flwr run``; it reports its progress in Flower's log."""

from dataclasses import replace
from logging import INFO
from pathlib import Path
from typing import Any

from flwr.app import Context
from flwr.common.logger import log
from flwr.serverapp import Grid, ServerApp

from fedomc.cli.application import megabytes
from fedomc_speech import corpus, federation, report
from fedomc_speech.run_folder import RunFolder
from fedomc_speech.settings import Settings, Variant

app = ServerApp()


class _LogObserver:
    def started(self, variant: Variant, first_round: int) -> None:
        log(INFO, "%s: from round %d", variant, first_round)

    def round_done(self, variant: Variant, row: dict[str, Any]) -> None:
        measured = "" if row["wer"] is None else f", word error rate {row['wer']:.1f}%"
        log(
            INFO,
            "%s: round %d, %d clients, loss %.3f, %s down, %s up%s",
            variant,
            row["round"],
            row["clients"],
            row["loss"],
            megabytes(row["down_bytes"]),
            megabytes(row["up_bytes"]),
            measured,
        )

    def stop_requested(self) -> bool:
        return False


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run all formats of the run config, and write results and report to its ``output`` folder."""
    config = dict(context.run_config)
    output = Path(str(config.pop("output"))).expanduser().absolute()
    resume = bool(config.pop("resume"))
    settings = Settings.from_mapping(config)
    loaded = corpus.load(settings.corpus, settings.corpus_path, settings.corpus_digest)
    settings = replace(settings, corpus_digest=loaded.digest)  # no node and no later part of the run has another corpus
    folder = RunFolder(output, settings, resume=resume)
    federation.run(settings, grid, folder, _LogObserver())
    log(INFO, "Results: %s, %s", output, report.write_report(output, settings, folder.runs))
