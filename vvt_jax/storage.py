"""Files on this machine and in object stores (`gs://`, `s3://`), and how they are written to last.

A file system appends to a file, syncs it and gives it a name when it is whole. An object store does
none of that, but shows an object only once all of it is there. This module alone knows which is
which: it reads what is there or raises OSError with the reason in `strerror`, and it writes so that
a kill at any moment leaves the old file or the new one.
"""

import contextlib
import errno
import importlib.util
import io
import logging
import os
import re
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, TypeAlias

from etils import epath

from vvt_jax.errors import UserError

AnyPath: TypeAlias = Path  # or an `epath.Path`, which has the same methods
_PACKAGES = {"gs": ("gcsfs", "gcs"), "s3": ("s3fs", "s3")}  # and the extra that has it
_AHEAD = 2**22  # bytes that are fetched at once where an object is read from its start to its end
_SECONDS = 60  # between two times that a growing file is written anew


class StorageError(UserError):
    """A place that can't be reached or written."""


def is_remote(path: str | os.PathLike) -> bool:
    """Whether it lies in an object store."""
    return "://" in os.fspath(path)


def locate(path: str | os.PathLike) -> AnyPath:
    """The path of a file or folder that a user named, there already or not.

    Args:
        path: of this machine, or a URL such as `gs://bucket/folder`.

    Returns:
        A `pathlib.Path`, or an `epath.Path` of an object store, which was asked whether it answers.

    Raises:
        StorageError: another kind of URL, a package that is missing, or a store that can't be
            reached.
    """
    text = os.fspath(path)
    scheme, separator, _ = text.partition("://")
    if not separator:
        if broken := re.match(rf"({'|'.join(_PACKAGES)}):/(?!/)", text):
            raise StorageError(
                f"{text!r} lost a slash to pathlib: give {broken[1]}:// addresses as a string."
            )
        return Path(text)
    if scheme not in _PACKAGES:
        known = " and ".join(f"{name}://" for name in _PACKAGES)
        raise StorageError(f"{text} is not known here: use a folder, or {known}.")
    package, extra = _PACKAGES[scheme]
    if importlib.util.find_spec(package) is None:
        raise StorageError(f"{text} needs {package}: pip install 'vvt_jax[{extra}]'.")
    logging.getLogger(package).setLevel(logging.CRITICAL)  # it logs with a traceback what it raises
    place = epath.Path(text)
    try:
        with _os_errors(text):
            place.exists()
    except OSError as error:
        raise StorageError(f"{text} can't be reached ({error.strerror}).") from error
    return place


def absolute(path: AnyPath) -> AnyPath:
    """The same place, whatever the working folder will be."""
    return path if is_remote(path) else path.absolute()


def is_folder(path: AnyPath) -> bool:
    """Whether it is a folder; False where that can't be seen."""
    # pathlib's raises where it may not look
    return path.is_dir() if is_remote(path) else os.path.isdir(path)


def read_bytes(path: str | os.PathLike) -> bytes:
    """A whole file."""
    with _os_errors(path):
        return _path(path).read_bytes()


def fetched(path: str) -> str | BinaryIO:
    """What a library can open that reads files of this machine only: the path, or the content."""
    return io.BytesIO(read_bytes(path)) if is_remote(path) else path


def read_range(path: str | os.PathLike, start: int, end: int) -> bytes:
    """The bytes of a file from `start` up to, not including, `end`; fewer where it is shorter."""
    with _os_errors(path):
        if is_remote(path):
            return _file_system(path).cat_file(os.fspath(path), start=start, end=end)
        # Opened anew: data sets have more files than a process may keep open.
        with open(path, "rb", buffering=0) as file:
            return os.pread(file.fileno(), end - start, start)


@contextlib.contextmanager
def open_to_skim(path: str | os.PathLike) -> Iterator[BinaryIO]:
    """A file of which parts are read in their order, by `seek` and `read`."""
    with _os_errors(path):
        if is_remote(path):
            files = _file_system(path)
            with files.open(path, "rb", block_size=_AHEAD, cache_type="readahead") as file:
                yield file
        else:
            with open(path, "rb", buffering=0) as file:
                yield file


def fingerprints(paths: Sequence[str]) -> list[tuple]:
    """Of each file, what changes when it does: its place, its size in bytes and its version."""
    listings: dict[str, dict[str, Any]] = {}
    found: list[tuple] = []
    for path in paths:
        with _os_errors(path):
            if is_remote(path):
                folder, _, name = path.rpartition("/")
                if folder not in listings:  # one request for all of them
                    entries = _file_system(path).ls(folder, detail=True, refresh=True)
                    listings[folder] = {e["name"].rpartition("/")[2]: e for e in entries}
                if name not in listings[folder]:
                    raise FileNotFoundError
                entry = listings[folder][name]
                version = entry.get("generation") or entry.get("ETag")
                found.append((path, entry["size"], version))
            else:
                status = os.stat(path)
                found.append((os.path.abspath(path), status.st_size, status.st_mtime_ns))
    return found


def list_folder(path: AnyPath) -> tuple[list[str], list[str]]:
    """The names of the folders in a folder, and those of its files; both sorted."""
    with _os_errors(path):
        if is_remote(path):
            entries = _file_system(path).ls(os.fspath(path), detail=True)
            own = os.fspath(path).partition("://")[2].rstrip("/")  # a marker that some tools leave
            kinds = {e["name"].rstrip("/"): e["type"] for e in entries}
            named = sorted((n.rpartition("/")[2], kind) for n, kind in kinds.items() if n != own)
            folders = [name for name, kind in named if kind == "directory"]
            return folders, [name for name, kind in named if kind != "directory"]
        with os.scandir(path) as found:
            entries = list(found)
        folders = [e.name for e in entries if e.is_dir()]
        return sorted(folders), sorted(e.name for e in entries if not e.is_dir())


def replace(path: AnyPath, content: bytes) -> None:
    """Writes a whole file, with the folders it is in; a reader sees the old one or the new one.

    Raises:
        StorageError: it can't be written.
    """
    try:
        with _os_errors(path):
            if is_remote(path):
                path.write_bytes(content)
                return
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary = path.with_name(f"{path.name}.tmp")
            temporary.write_bytes(content)
            temporary.replace(path)
    except OSError as error:
        raise StorageError(f"{path} can't be written: {error.strerror}.") from error


@contextlib.contextmanager
def local_folder(path: AnyPath) -> Iterator[Path]:
    """A folder on this machine for a library that writes there only: the folder itself, or one
    whose files are copied to it at the end."""
    if not is_remote(path):
        yield Path(path)
        return
    with tempfile.TemporaryDirectory() as name:
        yield Path(name)
        for file in Path(name).rglob("*"):
            if file.is_file():
                replace(path / file.relative_to(name).as_posix(), file.read_bytes())


def open_journal(path: AnyPath, lines: Iterable[str]) -> "Journal":
    """A text file of lines that grows; what it had before is replaced by the lines given."""
    return _Rewritten(path, lines) if is_remote(path) else Journal(path, lines)


class Journal:
    """Lines are on disk when `add` returns."""

    def __init__(self, path: AnyPath, lines: Iterable[str]):
        replace(path, _joined(lines))
        self._file = path.open("ab")

    def add(self, line: str) -> None:
        """Appends a line, without its end."""
        self._file.write(_joined([line]))
        self._file.flush()
        os.fsync(self._file.fileno())

    def flush(self) -> None:
        """All lines are there to last when this returns."""

    def close(self) -> None:
        self.flush()
        self._file.close()


class _Rewritten(Journal):
    """The whole object is written anew: on `flush`, and by `add` where the last time is long ago,
    since a file that grows line by line would be sent as often as it has lines."""

    def __init__(self, path: AnyPath, lines: Iterable[str]):
        self._path, self._content = path, io.BytesIO()
        self._content.write(_joined(lines))
        self._write()

    def add(self, line: str) -> None:
        self._content.write(_joined([line]))
        self._written = False
        if time.monotonic() - self._since >= _SECONDS:
            self._write()

    def flush(self) -> None:
        if not self._written:
            self._write()

    def close(self) -> None:
        self.flush()

    def _write(self) -> None:
        replace(self._path, self._content.getvalue())
        self._since, self._written = time.monotonic(), True


def _joined(lines: Iterable[str]) -> bytes:
    return "".join(f"{line}\n" for line in lines).encode()


def _path(path: str | os.PathLike) -> AnyPath:
    return epath.Path(path) if is_remote(path) else Path(path)


def _file_system(path: str | os.PathLike) -> Any:
    import fsspec  # comes with the packages that need it

    return fsspec.filesystem(os.fspath(path).partition("://")[0])


@contextlib.contextmanager
def _os_errors(path: str | os.PathLike) -> Iterator[None]:
    """Gives one kind of error, with its reason, to what the stores' libraries raise."""
    try:
        yield
    except UserError:
        raise
    except FileNotFoundError as error:
        reason = error.strerror or os.strerror(errno.ENOENT)
        raise FileNotFoundError(errno.ENOENT, reason, os.fspath(path)) from error
    except Exception as error:  # whatever their network layers do
        if isinstance(error, OSError) and error.strerror:
            raise
        reason = str(error).strip().partition("\n")[0][:200].rstrip(".")
        raise OSError(errno.EIO, f"{type(error).__name__}: {reason}", os.fspath(path)) from error
