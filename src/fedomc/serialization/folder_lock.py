"""A lock on a folder, which one process holds at a time and which ends with that process, however it ends."""

import os
import socket
import threading
import warnings

from fedomc.errors import FolderLockedError

try:
    import fcntl
except ImportError:  # Windows
    import msvcrt

_NAME = ".lock"

_held: dict[tuple[int, str], int] = {}
"""The open lock files, by process (a forked child does not inherit its parent's locks) and folder."""

_guard = threading.Lock()


def acquire(folder: str | os.PathLike[str]) -> None:
    """Lock a folder for this process; nothing happens if the process has locked it before.

    The operating system ends the lock with the process, so that a killed one leaves nothing to clean up. The file
    ``.lock`` stays in the folder and names its last holder.

    Args:
        folder: an existing folder.

    Raises:
        FolderLockedError: another process holds the lock.
        OSError: the folder cannot be written to.
    """
    key = os.getpid(), os.path.realpath(folder)
    with _guard:
        if key not in _held:
            _held[key] = _locked(key[1])


def release(folder: str | os.PathLike[str]) -> None:
    """Unlock a folder; nothing happens if this process has not locked it."""
    with _guard:
        descriptor = _held.pop((os.getpid(), os.path.realpath(folder)), None)
        if descriptor is not None:
            os.close(descriptor)


def _locked(folder: str) -> int:
    """Open a folder's lock file, lock it, and write into it who did."""
    descriptor = os.open(os.path.join(folder, _NAME), os.O_RDWR | os.O_CREAT, 0o666)
    try:
        _lock(descriptor)
    except BlockingIOError:
        holder = os.read(descriptor, 200).decode(errors="replace").strip() if os.name == "posix" else "unknown"
        os.close(descriptor)
        raise FolderLockedError(
            f"{folder} is in use by a run in another process ({holder}): end that run first, or use another folder"
        ) from None
    except OSError as error:  # some network file systems have no locks
        warnings.warn(f"{folder} cannot be locked ({error}): make sure no other process writes to it", stacklevel=4)
        return descriptor
    os.truncate(descriptor, 0)
    os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
    return descriptor


def _lock(descriptor: int) -> None:
    if os.name == "posix":
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return
    try:
        msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined,unused-ignore]
    except PermissionError as error:
        raise BlockingIOError from error
