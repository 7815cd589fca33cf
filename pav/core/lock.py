"""One writer at a time: a lock on what a command writes.

The kernel drops it with the process that holds it, however that ends, so nothing is left to clear
away after ``kill -9``. Over a network it reaches as far as the file system carries ``flock``: NFS
(version 4, or 3 with its lock service) and Lustre mounted with ``flock`` do; with ``local_lock``,
``nolock`` or ``localflock`` they tell the processes of one machine only.
"""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import sys
from contextlib import suppress
from pathlib import Path
from weakref import WeakSet

from pav.core.errors import UserError

LOCK = ".lock"
_NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS)


def beside(output: Path) -> Path:
    """The lock of an output that is a file; that of a directory is :data:`LOCK` in it."""
    return output.with_name(f".{output.name}{LOCK}")


class Lock:
    """Holds ``path`` for this process until it is closed; use as a context manager.

    Args:
        path: a file of the lock's own; it is gone when the lock is.
        output: what is written under the lock, as the user calls it.

    Raises:
        UserError: if another process holds it, or the file cannot be made.
    """

    def __init__(self, path: Path, output: object) -> None:
        self._path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            while not self._take(output):
                pass
        except OSError as error:
            raise UserError(
                f"output {str(output)!r} is not writable ({error.strerror}); choose another"
            ) from error
        _HELD.add(self)

    def _take(self, output: object) -> bool:
        """Whether the file that was locked is the one that others find."""
        self._file = self._path.open("a+b", buffering=0)
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self._file.seek(0)
            owner = self._file.read(200).decode(errors="replace") or "another process"
            self._file.close()
            raise UserError(
                f"output {str(output)!r} is being written by {owner}; wait for it or choose "
                "another output"
            ) from error
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                self._file.close()
                raise
            print(
                f"WARNING: the file system of {str(output)!r} has no locks ({error.strerror}); see "
                "to it that no second command writes there",
                file=sys.stderr,
            )
        # Its last holder may have removed it after we opened it.
        mine, found = os.fstat(self._file.fileno()), None
        with suppress(FileNotFoundError):
            found = self._path.stat()
        if found is None or not os.path.samestat(mine, found):
            self._file.close()
            return False
        with suppress(OSError):  # a full disk: the owner goes unnamed
            self._file.truncate(0)
            self._file.write(f"process {os.getpid()} on {socket.gethostname()}".encode())
        return True

    def close(self) -> None:
        """Let others have it."""
        if self._file.closed:
            return
        with suppress(OSError):
            self._path.unlink()
        self._file.close()

    def __enter__(self) -> Lock:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


_HELD: WeakSet[Lock] = WeakSet()


def _let_go() -> None:
    # A forked child shares the lock, and would hold it on after the death of its parent.
    for lock in list(_HELD):
        lock._file.close()


os.register_at_fork(after_in_child=_let_go)
