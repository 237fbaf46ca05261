"""Measures the peak memory of each process of a real deployment, with compressed parameters and with FP32.

    python -m benchmarks.deployment [--json out.json] [--rounds 1] [--formats S1E3M7@0.9 S1E2M3+S1E2M1] [--model large]

The deployment has the application's large model (about 115 M parameters), or the size that ``--model`` names, and a
SuperLink with TLS and two SuperNodes as processes of this machine. In a round each client makes one local step on one
utterance, the server applies FedAdam and then evaluates the model on the test set. Each format has processes of its
own. Rows ``{format, process, peak_rss_bytes, ratio, plain_ratio}``: the highest peak (``VmHWM``, which includes
imports) that any process of that kind reached, and its ratio to two baselines: ``FP32``, the same code without
compression, and ``FP32, plain``, with a client in the manner of Flower's examples (``flower_client.py``). Every message
to a client starts a ClientApp; its peak is that of the largest of them.
"""

import argparse
import json
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fedomc_speech import corpus
from fedomc_speech.deployment import Loopback
from fedomc_speech.deployment.loopback import APP, app_with_client

PLAIN, SAME = "FP32, plain", "FP32"
FORMATS = ("S1E3M7@0.9", "S1E2M3+S1E2M1")
PROCESSES = {
    "flower-superlink": "SuperLink",
    "flwr-serverapp": "ServerApp",
    "flower-supernode": "SuperNode",
    "flwr-clientapp": "ClientApp",
}
CLIENT = Path(__file__).with_name("flower_client.py")
NODES = 2
INTERVAL = 0.05  # seconds between two looks


def main() -> None:
    """Run all formats in turn, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="file for the rows")
    parser.add_argument("--rounds", type=int, default=1, help="of training")
    parser.add_argument("--formats", nargs="+", default=list(FORMATS), help="as the application's; FP32 always runs")
    parser.add_argument("--timeout", type=float, default=1800.0, help="seconds for one format")
    parser.add_argument("--model", default="large", help="size of the application's model: large or tiny")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # so that all processes are ended
    formats = list(dict.fromkeys((PLAIN, SAME, *options.formats)))
    print(f"{len(formats)} deployments, two to five minutes each, about 10 GB of memory and 2 GB of disk", flush=True)
    corpus.load("digits")  # made before the processes look for it
    peaks: dict[str, dict[str, int]] = {}
    for format in formats:
        began = time.monotonic()
        peaks[format] = run(format, options.rounds, options.timeout, options.model)
        print(f"{format} done in {time.monotonic() - began:.0f} s", flush=True)
        rows = [
            {
                "format": format,
                "process": process,
                "peak_rss_bytes": peak,
                "ratio": peak / peaks[SAME][process] if SAME in peaks else None,
                "plain_ratio": peak / peaks[PLAIN][process],
            }
            for format, found in peaks.items()
            for process, peak in found.items()
        ]
        if options.json:  # after each format: a run may be stopped
            options.json.write_text(json.dumps({"rounds": options.rounds, "rows": rows}, indent=2))
    for line in table(rows):
        print(line)


def run(format: str, rounds: int, timeout: float, model: str) -> dict[str, int]:
    """Run one deployment; give the peak of each kind of process in bytes."""
    peaks = dict.fromkeys(PROCESSES.values(), 0)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with Loopback(folder, NODES, {"OMP_NUM_THREADS": "1"}) as loopback:
            settings = {
                "model": f"'{model}'",
                "formats": f"'{format.partition(',')[0]}'",
                "split": "'iid'",
                "clients": NODES,
                "cohort": NODES,
                "rounds": rounds,
                "evaluate-every": rounds,
                "local-steps": 1,
                "batch": 1,
                "output": f"'{folder / 'results'}'",
            }
            app = app_with_client(folder / "app", CLIENT) if format == PLAIN else APP
            submitted = loopback.submit(" ".join(f"{k}={v}" for k, v in settings.items()), app, "run")
            started = [loopback.pid(name) for name in ("superlink", *(f"node-{i}" for i in range(NODES)))]
            deadline = time.monotonic() + timeout
            while submitted.poll() is None and time.monotonic() < deadline:
                for process, peak in looked_at(started):
                    peaks[process] = max(peaks[process], peak)
                time.sleep(INTERVAL)
            log = loopback.log("run")
        results = folder / "results" / "results.json"
        if not results.exists() or not json.loads(results.read_text())["runs"][0]["finished"]:
            sys.exit(f"{format} did not finish: {log[-4000:]}")
    assert all(peaks.values()), peaks
    return peaks


def looked_at(started: list[int]) -> Iterator[tuple[str, int]]:
    """Give kind and peak so far, in bytes, of each process that was started, and of all that these started."""
    found = {}
    for status in Path("/proc").glob("[0-9]*/status"):
        try:
            lines = dict(line.split(":", 1) for line in status.read_text().splitlines())
        except OSError:  # it ended meanwhile
            continue
        found[int(lines["Pid"])] = lines
    wanted = set(started)
    while more := {pid for pid, lines in found.items() if int(lines["PPid"]) in wanted} - wanted:
        wanted |= more
    for pid in wanted & found.keys():
        # The kernel cuts names off after 15 characters.
        kind = next((kind for name, kind in PROCESSES.items() if name[:15] == found[pid]["Name"].strip()), None)
        if kind is not None and "VmHWM" in found[pid]:
            yield kind, int(found[pid]["VmHWM"].split()[0]) * 1024


def table(rows: list[dict[str, Any]]) -> Iterator[str]:
    """Give the lines of the table."""
    yield f"{'peak, part of FP32, of plain FP32':<16}" + "".join(f"{name:>26}" for name in PROCESSES.values())
    for format in dict.fromkeys(row["format"] for row in rows):
        own = [row for row in rows if row["format"] == format]
        cells = (f"{r['peak_rss_bytes'] / 1e6:>9.0f} MB {r['ratio']:>6.1%} {r['plain_ratio']:>6.1%}" for r in own)
        yield f"{format:<33}" + "".join(cells)


if __name__ == "__main__":
    main()
