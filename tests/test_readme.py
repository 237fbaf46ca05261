"""The README's examples run as they are printed."""

import re
import subprocess
import sys
from pathlib import Path

README = Path(__file__).parent.parent / "README.md"


def test_examples_run_as_printed() -> None:
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), flags=re.DOTALL)
    assert len(blocks) == 2
    code = "\n".join(blocks)
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)  # noqa: S603
    assert result.returncode == 0, result.stderr
    ratio = re.search(r"([0-9.]+)% of FP32", result.stdout)
    assert ratio is not None
    assert 31.2 < float(ratio[1]) < 33  # ten bits of 32, and the biases
