"""Errors that the user can fix: commands print them as one sentence and exit with status 1."""

import contextlib
import errno
import os
from collections.abc import Iterator

USER_ERROR = 1  # exit status of errors that only the user can fix: another attempt fails, too
CRASH = 70  # exit status of any other error (EX_SOFTWARE): another attempt may succeed
_LONGEST = 8000  # characters in a message; a path can have up to 4096
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)


class UserError(ValueError):
    """Bad input. The message is one sentence that says what is wrong and how to fix it.

    The message stays on one line and can't control a terminal, whatever a file's name or content
    put into it: unprintable characters are written as Python escapes, and the middle of a message
    that is longer than 8000 characters is left out.
    """

    def __init__(self, message: str):
        if len(message) > _LONGEST:
            message = f"{message[: _LONGEST - 100]} ... {message[-90:]}"
        super().__init__("".join(c if c.isprintable() else ascii(c)[1:-1] for c in message))


class UnwrittenError(UserError):
    """A file of a run can't be written, most often because the disk is full."""


class MissingPackageError(UserError):
    """A package that only pictures need is not installed."""


@contextlib.contextmanager
def telling_of_full_disks(folder: str | os.PathLike) -> Iterator[None]:
    """Turn errors from a full disk into an UnwrittenError that names the file.

    Args:
        folder: the run's folder, named if the system doesn't name the file.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in NO_ROOM:
            raise
        raise UnwrittenError(
            f"{error.filename or folder} can't be written ({error.strerror}): checkpoints that are "
            "complete stay as they are; with room on the disk, the same command goes on from there."
        ) from error
