"""Files that are replaced as a whole: permissions, leftovers of killed processes, names of any length."""

import fcntl
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from fedomc.serialization.atomic_file import replace_text, replacing


def write(path: str | Path, data: bytes = b"new") -> None:
    with replacing(path) as file:
        file.write(data)


def mode(path: Path) -> int:
    return path.stat().st_mode & 0o777


def make_old(path: Path, seconds: float = 7200) -> None:
    os.utime(path, (time.time() - seconds, time.time() - seconds))


@contextmanager
def umask(mask: int) -> Iterator[None]:
    before = os.umask(mask)
    try:
        yield
    finally:
        os.umask(before)


@pytest.mark.parametrize("kept", [0o600, 0o640, 0o666, 0o444])
def test_a_replaced_file_keeps_its_permissions(tmp_path: Path, kept: int) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")
    path.chmod(kept)
    with umask(0o022), replacing(path) as file:
        (temporary,) = set(tmp_path.iterdir()) - {path}
        assert mode(temporary) & ~kept & 0o077 == 0  # nor can others read it before it is in place
        file.write(b"new")
    assert mode(path) == kept and path.read_bytes() == b"new"


@pytest.mark.parametrize(("mask", "expected"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_a_new_file_gets_what_the_umask_allows(tmp_path: Path, mask: int, expected: int) -> None:
    with umask(mask):
        write(tmp_path / "file")
    assert mode(tmp_path / "file") == expected


def test_a_link_is_written_through_and_a_bare_name_is_one_in_this_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "folder").mkdir()
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "folder" / "file")
    write(link)
    assert link.is_symlink() and (tmp_path / "folder" / "file").read_bytes() == b"new"
    monkeypatch.chdir(tmp_path)
    write("bare")
    assert (tmp_path / "bare").read_bytes() == b"new"


KILLED = """
import os, signal, sys
from fedomc.serialization.atomic_file import replacing
with replacing(sys.argv[1]) as file:
    file.write(b"half")
    file.flush()
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_what_a_killed_process_left_is_removed_by_a_later_write(tmp_path: Path) -> None:
    killed = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path / "model")], check=False)  # noqa: S603
    (left,) = tmp_path.iterdir()
    assert killed.returncode == -signal.SIGKILL and left.read_bytes() == b"half"
    write(tmp_path / "other")
    assert left.exists()  # it might be another machine's that writes at this moment
    make_old(left)
    write(tmp_path / "other")
    assert [path.name for path in tmp_path.iterdir()] == ["other"]


def test_what_is_being_written_and_what_is_of_others_stays(tmp_path: Path) -> None:
    writing = tmp_path / f".fedomc-{'a' * 32}.tmp"
    others = [tmp_path / name for name in (".fedomc-1.tmp", f"fedomc-{'a' * 32}.tmp", f".fedomc-{'a' * 32}.tmp2")]
    for path in (writing, *others):
        path.write_bytes(b"")
        make_old(path)
    with open(writing, "wb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        make_old(writing)
        write(tmp_path / "model")
        assert writing.exists()
    make_old(writing)
    write(tmp_path / "model")
    assert not writing.exists() and all(path.exists() for path in others)


def test_a_slow_writer_keeps_its_file(tmp_path: Path) -> None:
    with replacing(tmp_path / "slow") as file:
        file.write(b"slow")
        file.flush()
        (temporary,) = tmp_path.iterdir()
        make_old(temporary)
        write(tmp_path / "fast")
    assert (tmp_path / "slow").read_bytes() == b"slow"


@pytest.mark.parametrize("length", [200, 242, 255])
def test_any_name_that_the_system_allows(tmp_path: Path, length: int) -> None:
    for _ in range(2):
        write(tmp_path / ("n" * length))
    assert [len(path.name) for path in tmp_path.iterdir()] == [length]


def test_a_name_that_is_too_long_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"name too long.*nnnn"), replacing(tmp_path / ("n" * 256)):
        raise AssertionError("the file was opened")
    assert not list(tmp_path.iterdir())


def test_a_text_replaces_the_former_one(tmp_path: Path) -> None:
    replace_text(tmp_path / "text", "a longer text")
    replace_text(tmp_path / "text", "größer")
    assert (tmp_path / "text").read_bytes() == "größer".encode()
    assert [each.name for each in tmp_path.iterdir()] == ["text"]
