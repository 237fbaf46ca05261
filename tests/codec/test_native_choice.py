"""Which backend and which instruction set serves, and that a fork changes nothing."""

import os
import subprocess
import sys

import pytest

from fedomc.codec import native


def run(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(  # noqa: S603
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, env={**os.environ, **environment}
    )


class TestChoice:
    code = "import fedomc.codec as c; print(c.backend('cpu'), c.backend('meta'))"

    def test_of_the_backend(self) -> None:
        assert run(self.code, FEDOMC_NATIVE="1").stdout.split() == ["native", "reference"]
        assert run(self.code, FEDOMC_NATIVE="auto").stdout.split() == ["native", "reference"]
        assert run(self.code, FEDOMC_NATIVE="0").stdout.split() == ["reference", "reference"]
        assert "FEDOMC_NATIVE='maybe'" in run(self.code, FEDOMC_NATIVE="maybe").stderr

    def test_where_it_cannot_be_loaded(self) -> None:
        broken = "import sys; sys.modules['fedomc.codec._native'] = None\n" + self.code
        result = run(broken, FEDOMC_NATIVE="auto")
        assert result.stdout.split() == ["reference", "reference"]
        assert result.stderr.count("much slower reference is used") == 1
        assert run(broken, FEDOMC_NATIVE="0").stderr == ""
        assert (
            "ImportError" in run(broken, FEDOMC_NATIVE="1").stderr
            or "ModuleNotFound" in run(broken, FEDOMC_NATIVE="1").stderr
        )

    @pytest.mark.parametrize("level", native.extension.levels() if native.extension is not None else [])
    def test_of_the_level(self, level: str) -> None:
        code = "from fedomc.codec import native; print(native.extension.level())"
        assert run(code, FEDOMC_LEVEL=level).stdout.strip() == level
        result = run(code, FEDOMC_LEVEL="mmx", FEDOMC_NATIVE="1")
        assert result.returncode != 0 and "baseline" in result.stderr


_FORKED = """
import os, torch
from fedomc.codec import native
torch.set_num_threads(2)
n = 20 * 65536
x, words = torch.linspace(-1, 1, n), torch.empty(n // 32 * 11, dtype=torch.int32)
sums, status = torch.empty(0, 5, dtype=torch.float64), torch.zeros(2, dtype=torch.int64)
native.extension.encode(x, 3, 7, 0, False, 0, 0, words, sums, status, 2)
before = words.numpy().copy()
words.numpy()[:] = 0
child = os.fork()
native.extension.encode(x, 3, 7, 0, False, 0, 0, words, sums, status, 2)
same = (words.numpy() == before).all()
if child == 0:
    os._exit(0 if same else 1)
print(same, os.waitpid(child, 0)[1])
"""


def test_after_fork() -> None:
    assert run(_FORKED).stdout.split() == ["True", "0"]
