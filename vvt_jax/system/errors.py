"""What a user can mend: commands print it as one sentence and exit with status 1."""

import contextlib
import errno
import os
from collections.abc import Iterator

USER_ERROR = 1  # exit status: what only the user can mend, so that another try fails likewise
CRASH = 70  # exit status of any other error (EX_SOFTWARE): another try may succeed
_LONGEST = 8000  # characters of a message; a path has up to 4096
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)


class UserError(ValueError):
    """Bad input. The message is one sentence that names the thing and the mend.

    It stays on one line and does not act on a terminal, whatever a file's name or its content has
    put into it: characters that can't be printed are written as Python's escapes, and of a message
    of more than 8000 characters the middle is left out.
    """

    def __init__(self, message: str):
        if len(message) > _LONGEST:
            message = f"{message[: _LONGEST - 100]} ... {message[-90:]}"
        super().__init__("".join(c if c.isprintable() else ascii(c)[1:-1] for c in message))


class UnwrittenError(UserError):
    """A file of a run that can't be written, most often because the disk is full."""


class MissingPackageError(UserError):
    """A package that only pictures need is not installed."""


@contextlib.contextmanager
def telling_of_full_disks(folder: str | os.PathLike) -> Iterator[None]:
    """Says which file of a run has no room on its disk.

    Args:
        folder: of the run, named where the system does not name the file.
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
