"""A lock that allows only one run at a time in a workdir."""

import contextlib
import errno
from typing import IO

from vvt_jax.system import storage
from vvt_jax.system.errors import NO_ROOM, UserError
from vvt_jax.system.storage import AnyPath

_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP)


class WorkdirError(UserError):
    """A folder can't be used as a workdir."""


class WorkdirInUseError(UserError):
    """Another run is in progress in a workdir."""


def check_workdir(workdir: AnyPath) -> None:
    """Check that a workdir can be accessed at all.

    Raises:
        WorkdirError: its name is too long, or this user has no permission to access it.
    """
    if storage.is_remote(workdir):
        return
    try:
        workdir.exists()
    except OSError as error:
        raise _unfit(workdir, error) from error


def _unfit(workdir: AnyPath, error: Exception) -> WorkdirError:
    reason = error.strerror if isinstance(error, OSError) else error
    return WorkdirError(f"{workdir} can't hold a run ({reason}): use another workdir.")


class WorkdirLock:
    """A context that holds the lock of a workdir, against this process and all others.

    The operating system locks the file `lock`, and releases the lock however the process ends, so
    the file can stay. This does nothing in object stores, or if the operating system or the file
    system doesn't support locks.

    Args:
        workdir: the workdir, which is created if it is missing.

    Raises:
        WorkdirInUseError: another run holds the lock.
        WorkdirError: the workdir can't be created.
    """

    def __init__(self, workdir: AnyPath):
        self._workdir = workdir
        self._file: IO[bytes] | None = None

    def __enter__(self) -> "WorkdirLock":
        try:
            import fcntl
        except ImportError:  # not a POSIX system
            return self
        if storage.is_remote(self._workdir):
            return self
        with contextlib.ExitStack() as stack:
            try:
                self._workdir.mkdir(parents=True, exist_ok=True)
                file = stack.enter_context((self._workdir / "lock").open("ab"))
            except (OSError, ValueError) as error:  # a null byte in the name is a ValueError
                if isinstance(error, OSError) and error.errno in NO_ROOM:
                    raise
                raise _unfit(self._workdir, error) from error
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise WorkdirInUseError(
                    f"Another run is going on in {self._workdir}: wait for its end, or use another "
                    "workdir."
                ) from error
            except OSError as error:
                if error.errno not in _NO_LOCKS:
                    raise
            stack.pop_all()
            self._file = file
        return self

    def __exit__(self, *_: object) -> None:
        if self._file:
            self._file.close()
