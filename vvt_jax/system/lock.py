"""One run at a time in a workdir."""

import contextlib
import errno
from typing import IO

from vvt_jax.system import storage
from vvt_jax.system.errors import NO_ROOM, UserError
from vvt_jax.system.storage import AnyPath

_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP)


class WorkdirError(UserError):
    """A folder that can't hold a run."""


class WorkdirInUseError(UserError):
    """A workdir in which another run is going on."""


def check_workdir(workdir: AnyPath) -> None:
    """Refuses a folder that can't even be looked at.

    Raises:
        WorkdirError: its name is too long, or it lies where this user may not look.
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
    """Inside the `with`, a second one for the same folder is refused, in this process or another.

    The system holds the lock, on the file `lock`, and gives it up with the process, however that
    ends: the file may stay. Where the system, the file system or an object store knows no locks,
    this does nothing.

    Args:
        workdir: made if it is missing.

    Raises:
        WorkdirInUseError: another run holds it.
        WorkdirError: it can't be made.
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
            except (OSError, ValueError) as error:  # a zero byte in the name is a ValueError
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
