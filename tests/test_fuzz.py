"""A short run of the fuzzer, and that it finds what is broken; in processes of their own, whose memory it limits."""

import subprocess
import sys

BROKEN = """
import sys
import numpy as np
from fedomc.serialization import entropy, frame, model_file
from fedomc.flower import client, replies
from tests.fuzz import __main__

unzipped = entropy._unzipped

def hungry(*args):
    np.zeros(2**30, np.uint8)
    return unzipped(*args)

entropy._unzipped = hungry
frame.FormatError = KeyError  # so that it is not caught
client.view_dense = lambda array, _, **__: array.numpy()

class Forgetful(model_file.ModuleState):
    def fill(self, values, *_, **__):
        for _ in values:
            pass

model_file.ModuleState = Forgetful
replies.check_metrics = lambda *_: None
sys.exit(__main__.main())
"""


def run(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *command], capture_output=True, text=True, check=False)  # noqa: S603


def test_nothing_but_payload_errors() -> None:
    done = run("-m", "tests.fuzz", "--runs", "400")
    assert done.returncode == 0 and "400 attempts" in done.stdout and "0 findings" in done.stdout, done.stdout
    assert not done.stderr


def test_what_is_broken_is_found() -> None:
    done = run("-c", BROKEN, "--runs", "1500")
    assert done.returncode == 1, done.stdout + done.stderr
    for target in ("frame", "planes", "file", "message", "reply"):
        assert f"again: python -m tests.fuzz --seed 0 --targets {target} --only" in done.stdout, target
    assert "MemoryError of planes" in done.stdout
