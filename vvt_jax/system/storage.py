"""Safe reading and writing of files on this machine and in object stores (`gs://`, `s3://`).

A file system can append to a file, sync it, and rename it once it is complete. An object store can
do none of this, but an object becomes visible only once it is complete. Only this module needs to
know the difference. Reading either succeeds or raises OSError with the reason in `strerror`, and
writing leaves either the old file or the new one, even if the program is killed at any moment.

Every local file that the user provides is opened by `open_file`, or by a function here that calls
it. After following links, it must be a regular file, and no larger than the limit for its kind:
reading a pipe could block forever, and a file that is far too large isn't the one that was meant.
"""

import contextlib
import enum
import errno
import importlib.util
import io
import logging
import os
import re
import stat
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, TypeAlias

from etils import epath

from vvt_jax.system.errors import UserError

AnyPath: TypeAlias = Path  # or `epath.Path`, which has the same methods
_PACKAGES = {"gs": ("gcsfs", "gcs"), "s3": ("s3fs", "s3")}  # and the extra that installs it
_AHEAD = 2**22  # bytes to fetch at once when an object is read sequentially
_SECONDS = 60  # between rewrites of a growing file


_KINDS = {  # names for what is not a regular file, by the result of `stat.S_IFMT`
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


class StorageError(UserError):
    """A file or folder can't be reached or written."""


class SizeLimit(enum.IntEnum):
    """The maximum sizes of files to read, by their kind, in bytes."""

    LABELS = 2**22  # class names, one per line; a million short ones
    CONFIG = 2**26  # a model's or a run's config.json; 20,000 class names take about 2^19
    DESCRIPTION = 2**26  # the JSON files that describe a prepared data set
    SUMS = 2**26  # the list of a checkpoint's files
    MASK = 2**28
    IMAGE = 2**29
    RECORD = 2**30  # one record of a data set; its file may have any size
    METRICS = 2**31  # metrics.jsonl; ten million lines
    ARRAYS = 2**32  # a raw data set, or the index of a prepared one, which is read whole
    WEIGHTS = 2**34  # model.safetensors or a .pth file; vvt_large's training state has 2^30


def is_remote(path: str | os.PathLike) -> bool:
    """Return whether a path is in an object store."""
    return "://" in os.fspath(path)


def locate(path: str | os.PathLike) -> AnyPath:
    """Return the path of a file or folder that the user named, whether or not it exists.

    Args:
        path: a path on this machine, or a URL such as `gs://bucket/folder`.

    Returns:
        A `pathlib.Path`, or an `epath.Path` for an object store, after checking that it responds.

    Raises:
        StorageError: the name is empty, the kind of URL is not supported, a package is missing, or
            the store can't be reached.
    """
    text = os.fspath(path)
    if not text:
        raise StorageError("The name of a file or folder is empty: '.' is the current folder.")
    scheme, separator, _ = text.partition("://")
    if not separator:
        if broken := re.match(rf"({'|'.join(_PACKAGES)}):/(?!/)", text):
            raise StorageError(
                f"{text!r} lost a slash to pathlib: give {broken[1]}:// addresses as a string."
            )
        try:
            return Path(text).expanduser()
        except RuntimeError as error:  # there is no such user
            raise StorageError(f"{text} can't be found: {str(error).rstrip('.')}.") from error
    if scheme not in _PACKAGES:
        known = " and ".join(f"{name}://" for name in _PACKAGES)
        raise StorageError(f"{text} is not known here: use a folder, or {known}.")
    package, extra = _PACKAGES[scheme]
    if importlib.util.find_spec(package) is None:
        raise StorageError(f"{text} needs {package}: pip install 'vvt_jax[{extra}]'.")
    logging.getLogger(package).setLevel(logging.CRITICAL)  # it logs a traceback of what it raises
    place = epath.Path(text)
    try:
        with _os_errors(text):
            place.exists()
    except OSError as error:
        raise StorageError(f"{text} can't be reached ({error.strerror}).") from error
    return place


def absolute(path: AnyPath) -> AnyPath:
    """Return the absolute path, which stays valid if the working directory changes."""
    return path if is_remote(path) else path.absolute()


def is_folder(path: AnyPath) -> bool:
    """Return whether a path is a folder; False if it can't be accessed."""
    # pathlib's method raises an error if access is denied.
    return path.is_dir() if is_remote(path) else os.path.isdir(path)


def open_file(path: str | os.PathLike, limit: int | None, *, buffering: int = -1) -> BinaryIO:
    """Open a file for reading; a file in an object store is fetched whole.

    Args:
        path: the file, or a link to it.
        limit: the maximum size in bytes, usually from `SizeLimit`; None allows any size.
        buffering: the same as for the built-in `open`.

    Raises:
        OSError: the file can't be read, is not a regular file, or is larger than the limit; the
            reason is in `strerror`.
    """
    if is_remote(path):
        return io.BytesIO(read_bytes(path, limit))
    # Without O_NONBLOCK, opening a pipe would wait for a writer.
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    try:
        status = os.fstat(descriptor)
        kind = stat.S_IFMT(status.st_mode)
        if kind == stat.S_IFDIR:
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), os.fspath(path))
        if kind != stat.S_IFREG:
            what = _KINDS.get(kind, "something else")
            raise OSError(errno.EINVAL, f"it is {what} and not a regular file", os.fspath(path))
        _check_size(path, status.st_size, limit)
        return os.fdopen(descriptor, "rb", buffering)
    except BaseException:
        os.close(descriptor)
        raise


def _check_size(path: str | os.PathLike, size: int, limit: int | None) -> None:
    if limit is not None and size > limit:
        reason = f"it has {size} bytes, and a file of its kind has at most {limit}"
        raise OSError(errno.EINVAL, reason, os.fspath(path))


def read_bytes(path: str | os.PathLike, limit: int | None = None) -> bytes:
    """Read a whole file; arguments and errors are the same as for `open_file`."""
    with _os_errors(path):
        if is_remote(path):
            if limit is not None:
                _check_size(path, _file_system(path).size(os.fspath(path)) or 0, limit)
            return _path(path).read_bytes()
        with open_file(path, limit) as file:
            # Read at most its size when opened, since `read` allocates as much as is requested.
            content = file.read(os.fstat(file.fileno()).st_size)
    return content


def read_text(path: str | os.PathLike, limit: int | None) -> str:
    """Read a whole file as UTF-8; other errors are the same as for `open_file`.

    Raises:
        UnicodeDecodeError: the file is not UTF-8.
    """
    return read_bytes(path, limit).decode("utf-8")


def read_range(path: str | os.PathLike, start: int, end: int) -> bytes:
    """Read a file's bytes from `start` up to, not including, `end`, or fewer if it is shorter."""
    with _os_errors(path):
        if is_remote(path):
            return _file_system(path).cat_file(os.fspath(path), start=start, end=end)
        # Open it each time, because data sets have more files than a process may keep open.
        with open_file(path, None, buffering=0) as file:
            return os.pread(file.fileno(), end - start, start)


@contextlib.contextmanager
def open_to_skim(path: str | os.PathLike) -> Iterator[BinaryIO]:
    """Open a file of which parts will be read in ascending order, with `seek` and `read`."""
    with _os_errors(path):
        if is_remote(path):
            files = _file_system(path)
            with files.open(path, "rb", block_size=_AHEAD, cache_type="readahead") as file:
                yield file
        else:
            with open_file(path, None, buffering=0) as file:
                yield file


def fingerprints(paths: Sequence[str]) -> list[tuple]:
    """Return what changes when each file does: its location, its size in bytes and its version."""
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
    """Return the names of the folders in a folder, and those of its files, both sorted."""
    with _os_errors(path):
        if is_remote(path):
            entries = _file_system(path).ls(os.fspath(path), detail=True)
            own = os.fspath(path).partition("://")[2].rstrip("/")  # some tools leave such a marker
            kinds = {e["name"].rstrip("/"): e["type"] for e in entries}
            named = sorted((n.rpartition("/")[2], kind) for n, kind in kinds.items() if n != own)
            folders = [name for name, kind in named if kind == "directory"]
            return folders, [name for name, kind in named if kind != "directory"]
        with os.scandir(path) as found:
            entries = list(found)
        folders = [e.name for e in entries if e.is_dir()]
        return sorted(folders), sorted(e.name for e in entries if not e.is_dir())


def replace(path: AnyPath, content: bytes) -> None:
    """Write a whole file, creating its folders; readers see either the old file or the new one.

    Raises:
        StorageError: the file can't be written.
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
    """Provide a local folder for a library that can only write to local folders.

    It is the folder itself, if that is local, or a temporary one whose files are copied to `path`
    at the end.
    """
    if not is_remote(path):
        yield Path(path)
        return
    with tempfile.TemporaryDirectory() as name:
        yield Path(name)
        for file in Path(name).rglob("*"):
            if file.is_file():
                replace(path / file.relative_to(name).as_posix(), file.read_bytes())


def open_journal(path: AnyPath, lines: Iterable[str]) -> "Journal":
    """Open a growing text file, replacing any earlier content with the given lines."""
    return _Rewritten(path, lines) if is_remote(path) else Journal(path, lines)


class Journal:
    """A growing text file whose lines are on disk when `add` returns."""

    def __init__(self, path: AnyPath, lines: Iterable[str]):
        replace(path, _joined(lines))
        self._file = path.open("ab")

    def add(self, line: str) -> None:
        """Append a line, given without its newline."""
        self._file.write(_joined([line]))
        self._file.flush()
        os.fsync(self._file.fileno())

    def flush(self) -> None:
        """Make sure that all lines are stored permanently when this returns."""

    def close(self) -> None:
        self.flush()
        self._file.close()


class _Rewritten(Journal):
    """A growing text file in an object store, which has to be rewritten as a whole.

    It is written on `flush`, and by `add` only if the last time is long enough ago: otherwise the
    whole file would be sent once for each line.
    """

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
    """Turn whatever the stores' libraries raise into an OSError with its reason."""
    try:
        yield
    except UserError:
        raise
    except FileNotFoundError as error:
        reason = error.strerror or os.strerror(errno.ENOENT)
        raise FileNotFoundError(errno.ENOENT, reason, os.fspath(path)) from error
    except Exception as error:  # whatever their network layers raise
        if isinstance(error, OSError) and error.strerror:
            raise
        reason = str(error).strip().partition("\n")[0][:200].rstrip(".")
        raise OSError(errno.EIO, f"{type(error).__name__}: {reason}", os.fspath(path)) from error
