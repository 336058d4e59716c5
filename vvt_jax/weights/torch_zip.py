"""The zip archives that .pth files are, opened with bounds on what is read."""

import contextlib
import os
import struct
import zipfile
from collections.abc import Iterator
from typing import BinaryIO

from vvt_jax.system import storage
from vvt_jax.system.storage import SizeLimit

_LARGEST_DIRECTORY = 2**22  # bytes of a zip's list of its files; that checkpoint's has about 2**18
# What zipfile raises over files that are damaged, or made to confuse it
ZIP_ERRORS = (
    OSError,
    EOFError,
    ValueError,  # among them UnicodeDecodeError, and places before the start of the file
    OverflowError,
    LookupError,
    struct.error,
    zipfile.BadZipFile,
    NotImplementedError,
    RuntimeError,  # an encrypted file
)


@contextlib.contextmanager
def open_zip(path: str | os.PathLike) -> Iterator[zipfile.ZipFile]:
    """The zip file, whose list of files is only read where it has a sensible length."""
    with storage.open_file(path, SizeLimit.WEIGHTS) as file:
        directory = _BoundedReads(file, _LARGEST_DIRECTORY)
        with zipfile.ZipFile(directory) as archive:  # type: ignore[call-overload]
            directory.most = None
            yield archive


class _BoundedReads:
    """A file that refuses to read more than `most` bytes at once, since zipfile asks for as many as
    the file itself says."""

    def __init__(self, file: BinaryIO, most: int | None):
        self._file, self.most = file, most
        self.seek, self.tell, self.seekable = file.seek, file.tell, file.seekable

    def read(self, size: int = -1) -> bytes:
        if self.most is not None and size > self.most:
            raise zipfile.BadZipFile(f"its list of files has {size} bytes")
        return self._file.read(size)


def shown(name: str) -> str:
    """A name out of a file, short and on one line."""
    return ascii(name)[1:-1][:100]
