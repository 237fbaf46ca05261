"""The ServerApp for ``flwr run``; it reports its progress in Flower's log."""

from logging import INFO
from pathlib import Path
from typing import Any

from flwr.app import Context
from flwr.common.logger import log
from flwr.serverapp import Grid, ServerApp

from fedomc.cli.application import megabytes
from fedomc_llm import federation, pretraining, report
from fedomc_llm.run_folder import RunFolder
from fedomc_llm.settings import Settings, Variant
from fedomc_llm.training import perplexity

app = ServerApp()


class _LogObserver:
    def started(self, variant: Variant) -> None:
        log(INFO, "%s", variant)

    def round_done(self, variant: Variant, row: dict[str, Any]) -> None:
        sent = megabytes(row["down_bytes"] + row["up_bytes"])
        log(INFO, "%s: round %d, perplexity %.2f, %s", variant, row["round"], perplexity(row["loss"]), sent)

    def stop_requested(self) -> bool:
        return False


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run all variants of the run config, and write results and report to its ``output`` folder."""
    config = dict(context.run_config)
    output = Path(str(config.pop("output"))).expanduser().absolute()
    resume = bool(config.pop("resume"))
    settings = Settings.from_mapping(config)
    folder = RunFolder(output, settings, resume=resume)
    place = settings.model or str(pretraining.prepared(output, settings.pretraining_steps, settings.seed))
    federation.run(settings, place, grid, folder, _LogObserver())
    log(INFO, "Results: %s, %s", output, report.write_report(output, settings, folder.runs))
