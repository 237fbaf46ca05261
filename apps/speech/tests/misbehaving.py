"""A ClientApp that fails on demand; only the tests know it.

The environment variable ``FEDOMC_TEST_FAULTS`` names a file, ``{"2": {"0": "garbage"}}``: what goes wrong, by round and
part of the data. It is read for each message, so that nodes that run already can be told.
"""

import json
import os
import time
from pathlib import Path

import numpy as np
from flwr.app import Array, ArrayRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp

from fedomc.flower import collect
from fedomc_speech import client, model

FAULTS = "FEDOMC_TEST_FAULTS"
CONTENTS = ("garbage", "shapes", "nan")
"""What can be wrong in a reply."""

app = ClientApp()
app.query()(client.identify)


@app.train()
def train(message: Message, context: Context) -> Message:
    """Train as the app does, and spoil it."""
    partition = int(context.node_config["partition-id"])
    faults = Path(os.environ[FAULTS])
    number = int(message.content["config"]["server-round"])  # type: ignore[arg-type, call-overload, index]
    fault = json.loads(faults.read_text()).get(str(number), {}).get(str(partition))
    began = time.monotonic()
    reply = client.train(message, context)
    if fault in CONTENTS:
        reply.content = spoilt(fault, reply.content)
    elif fault == "late":
        settings = client.read_settings(message.content["config"])  # type: ignore[arg-type]
        time.sleep(settings.round_timeout + 3 - (time.monotonic() - began))
    elif fault == "killed":
        (faults.parent / f"killed-{number}-{partition}").touch()
        time.sleep(3600)  # until someone does
    elif fault is not None:
        raise ValueError(fault)
    return reply


def spoilt(fault: str, content: RecordDict) -> RecordDict:
    """Make a reply one of random bytes, of another model, or of numbers that are none."""
    arrays: ArrayRecord = content.array_records["arrays"]
    if fault == "shapes":
        wrong = collect(model.build("tiny", 7, seed=0))
    else:
        wrong = ArrayRecord()
        for name, array in arrays.items():
            if fault == "garbage":
                wrong[name] = Array(
                    array.dtype, tuple(array.shape), array.stype, np.random.default_rng(0).bytes(len(array.data))
                )
            elif array.stype == "numpy.ndarray":
                wrong[name] = Array(np.full(array.shape, np.nan, np.float32))
            else:
                wrong[name] = array
    return RecordDict({**content, "arrays": wrong})
