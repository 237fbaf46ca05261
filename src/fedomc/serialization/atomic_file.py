"""Write files so that a reader finds the whole former file or the whole new one, never a part."""

import os
import re
import stat
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import BinaryIO

try:
    import fcntl
except ImportError:  # Windows, where an open file cannot be removed anyway
    fcntl = None  # type: ignore[assignment]

_TEMPORARY = re.compile(r"\.fedomc-[0-9a-f]{32}\.tmp")

_ABANDONED_AFTER = 3600.0
"""Seconds after its last change from which on a temporary file that nobody has locked is taken for abandoned."""


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """Open a temporary file that replaces ``path`` when the block ends without an error.

    The data is on the disk before the file takes its name, so that a crash leaves the former file or the new one. A
    file that is replaced keeps its permissions; a new one gets those that the umask allows. A symbolic link is written
    through. Temporary files that killed processes have left in the folder are removed.

    Args:
        path: of the file to write.

    Yields:
        The temporary file, opened for writing in binary mode.

    Raises:
        OSError: the file cannot be written; the former one is as it was.
    """
    path = os.path.realpath(path)
    try:
        mode = stat.S_IMODE(os.stat(path).st_mode)  # raises now if the name is too long, not when all is written
    except FileNotFoundError:
        mode = None
    remove_abandoned(os.path.dirname(path))
    # Nobody may read the temporary who may not read the file.
    temporary, descriptor = open_temporary(os.path.dirname(path), 0o666 if mode is None else 0o600)
    try:
        with open(descriptor, "wb") as file:
            yield file
            if mode is not None:
                os.chmod(temporary, mode)
            file.flush()
            os.fsync(descriptor)
        os.replace(temporary, path)
    except BaseException:
        with suppress(FileNotFoundError):
            os.unlink(temporary)
        raise
    sync_folder(os.path.dirname(path))


def replace_text(path: str | os.PathLike[str], text: str) -> None:
    """Replace a text file, in UTF-8; errors as in ``replacing``."""
    with replacing(path) as file:
        file.write(text.encode())


def open_temporary(folder: str, mode: int) -> tuple[str, int]:
    """Open a new temporary file for reading and writing, which ``remove_abandoned`` removes if this process is killed.

    Args:
        folder: where the file is made.
        mode: its permissions, which the umask limits.

    Returns:
        The path and the descriptor. The file counts as in use until the descriptor is closed.

    Raises:
        OSError: the file cannot be made.
    """
    temporary = os.path.join(folder, f".fedomc-{uuid.uuid4().hex}.tmp")
    descriptor = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL, mode)
    if fcntl is not None:
        with suppress(OSError):  # some network file systems have no locks; nothing is removed there
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    return temporary, descriptor


def sync_folder(folder: str) -> None:
    """Have the names in a folder written to the disk."""
    if os.name == "posix":  # elsewhere a folder cannot be opened
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def remove_abandoned(folder: str | os.PathLike[str], age: float = _ABANDONED_AFTER) -> None:
    """Remove the temporary files of this module that no living process writes.

    Args:
        folder: where they are.
        age: the number of seconds since its last change from which on a file is removed. 0 is for a folder to which
            only one process writes.
    """
    with suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            if _TEMPORARY.fullmatch(entry.name):
                with suppress(OSError):  # it is another user's, or another process was faster
                    if time.time() - entry.stat(follow_symlinks=False).st_mtime >= age:
                        _remove_unless_locked(entry.path)


def _remove_unless_locked(path: str) -> None:
    if fcntl is None:
        os.unlink(path)
        return
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)  # raises if its writer lives
        os.unlink(path)
    finally:
        os.close(descriptor)
