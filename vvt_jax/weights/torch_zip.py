"""Zip archives, as in .pth files, opened with limits on how much is read."""

import contextlib
import os
import struct
import zipfile
from collections.abc import Iterator
from typing import BinaryIO

from vvt_jax.system import storage
from vvt_jax.system.storage import SizeLimit

# Bytes of a zip file's directory; in a training checkpoint of vvt_large it has about 2**18
_LARGEST_DIRECTORY = 2**22
# What zipfile raises for files that are damaged or malicious
ZIP_ERRORS = (
    OSError,
    EOFError,
    ValueError,  # includes UnicodeDecodeError, and offsets before the start of the file
    OverflowError,
    LookupError,
    struct.error,
    zipfile.BadZipFile,
    NotImplementedError,
    RuntimeError,  # an encrypted file
)


@contextlib.contextmanager
def open_zip(path: str | os.PathLike) -> Iterator[zipfile.ZipFile]:
    """Open a zip file, whose directory is only read if its length is plausible."""
    with storage.open_file(path, SizeLimit.WEIGHTS) as file:
        directory = _BoundedReads(file, _LARGEST_DIRECTORY)
        with zipfile.ZipFile(directory) as archive:  # type: ignore[call-overload]
            directory.most = None
            yield archive


class _BoundedReads:
    """A file that refuses to read more than `most` bytes at once.

    zipfile asks for whatever number of bytes the file itself states.
    """

    def __init__(self, file: BinaryIO, most: int | None):
        self._file, self.most = file, most
        self.seek, self.tell, self.seekable = file.seek, file.tell, file.seekable

    def read(self, size: int = -1) -> bytes:
        if self.most is not None and size > self.most:
            raise zipfile.BadZipFile(f"its list of files has {size} bytes")
        return self._file.read(size)


def shown(name: str) -> str:
    """Return a name from a file, shortened and on one line, for an error message."""
    return ascii(name)[1:-1][:100]
