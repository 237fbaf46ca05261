"""The wheel in dist, in a bare virtual environment without an index (``make wheel test-wheel``)."""

import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.wheel

CHECK = """
import json, sys, numpy, torch
from fedomc import CompressedTensor, CompressionPolicy, compress_
from fedomc.codec import native
from fedomc.serialization import frame

folder = sys.argv[1]
expected = json.load(open(f"{folder}/e3m7-one-more.json"))
found = frame.from_bytes(open(f"{folder}/e3m7-one-more.frame", "rb").read())
values = found.packed.decode(torch.empty(found.packed.numel)).numpy()
assert values.tobytes() == numpy.float32(expected["values"]).tobytes()
model = torch.nn.Linear(512, 512)
compress_(model, CompressionPolicy("S1E3M7"))
assert isinstance(model.weight, CompressedTensor) or isinstance(model.weight.data, CompressedTensor)
model(torch.randn(4, 512)).sum().backward()
print(native.extension.__file__)
"""


def run(*command: str | Path) -> str:
    own = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "PIP_"))}
    settings = {"FEDOMC_NATIVE": "1", "PIP_CONFIG_FILE": os.devnull, "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    done = subprocess.run(command, capture_output=True, text=True, cwd="/", env=own | settings)  # noqa: S603
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Install the wheel and its command line into a new environment, and give the folder of its programs."""
    version = f"cp{sys.version_info.major}{sys.version_info.minor}"
    wheels = sorted((ROOT / "dist").glob(f"fedomc-*-{version}-{version}-manylinux_*_{platform.machine()}.whl"))
    if not wheels:
        pytest.fail(f"dist has no manylinux wheel of {version} for {platform.machine()}: make wheel", pytrace=False)
    environment = tmp_path_factory.mktemp("bare")
    run(sys.executable, "-m", "venv", environment)
    dependencies = ROOT / "build/dependencies"
    programs = environment / "bin"
    run(
        programs / "pip",
        "install",
        "--no-index",
        "--find-links",
        dependencies,
        f"{max(wheels, key=os.path.getmtime)}[cli]",
    )
    return programs


def test_info_finds_the_kernels(bare: Path) -> None:
    info = json.loads(run(bare / "fedomc", "info", "--json"))
    assert info["codec"] == "native" and "flwr" not in info["packages"]


def test_bench_runs(bare: Path) -> None:
    rows = run(bare / "fedomc", "bench", "--values", "65536")
    assert "decode" in rows and "update" in rows


def test_a_vector_is_decoded_and_a_model_trains(bare: Path) -> None:
    extension = run(bare / "python", "-c", CHECK, ROOT / "tests/vectors").strip()
    assert Path(extension).is_relative_to(bare.parent)
