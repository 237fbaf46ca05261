"""A corpus that is made in a moment: in the layout of AN4, each word a tone."""

import logging
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from flwr.supercore.task_identity import TaskIdentity

from fedomc_speech import client

RATE = 16000
WORDS = {"LOW": 400.0, "MIDDLE": 1000.0, "HIGH": 2500.0}


def _write_tones(root: Path, speakers: int = 4, utterances: int = 6) -> Path:
    """Write a training part of some speakers and a test part of one more."""
    random = np.random.default_rng(0)
    words = list(WORDS)
    for part, folder, names in (
        ("train", "an4_clstk", [f"speaker{i}" for i in range(speakers)]),
        ("test", "an4test_clstk", ["unseen"]),
    ):
        ids, lines = [], []
        for name in names:
            for number in range(utterances):
                text = [words[int(i)] for i in random.integers(len(words), size=2 + number % 2)]
                time = np.arange(int(0.4 * RATE)) / RATE
                tones = [0.3 * np.sin(2 * np.pi * WORDS[word] * time) * np.hanning(len(time)) for word in text]
                audio = np.concatenate(tones) + 0.003 * random.standard_normal(len(tones) * len(time))
                path = root / "wav" / folder / name / f"{name}-{number}.wav"
                path.parent.mkdir(parents=True, exist_ok=True)
                soundfile.write(path, audio, RATE, subtype="PCM_16")
                ids.append(f"{folder}/{name}/{name}-{number}")
                lines.append(f"<s> {' '.join(text)} </s> ({name}-{number})")
        etc = root / "etc"
        etc.mkdir(exist_ok=True)
        (etc / f"an4_{part}.fileids").write_text("\n".join(ids) + "\n")
        (etc / f"an4_{part}.transcription").write_text("\n".join(lines) + "\n")
    return root


@pytest.fixture(scope="session")
def tones(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the corpus."""
    return _write_tones(tmp_path_factory.mktemp("tones"))


@pytest.fixture(scope="session")
def write_tones() -> Callable[..., Path]:
    """Write another such corpus."""
    return _write_tones


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Sums in the same order whatever the machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
    client.load_client_data.cache_clear()


@pytest.fixture
def identity(monkeypatch: pytest.MonkeyPatch) -> None:
    """Messages can only be made by a process that Flower gave an identity."""
    for name in ("_run_id", "_node_id", "_task_id"):
        monkeypatch.setattr(TaskIdentity, name, 1)


@pytest.fixture
def flower_log(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> pytest.LogCaptureFixture:
    """What Flower's logger says, also after a simulation that kept it to a file."""
    monkeypatch.setattr(logging.getLogger("flwr"), "propagate", True)
    return caplog
