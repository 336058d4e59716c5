"""Files on this machine and in object stores (`gs://`, `s3://`), and how they are written to last.

A file system appends to a file, syncs it and gives it a name when it is whole. An object store does
none of that, but shows an object only once all of it is there. This module alone knows which is
which: it reads what is there or raises OSError with the reason in `strerror`, and it writes so that
a kill at any moment leaves the old file or the new one.

Every local file that the program is given is opened by `open_file`, or by a function here that
calls it. After following links it must be a regular file, of at most the size that its kind allows:
a pipe would block for ever, and a file that is far too large belongs to something else.
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

AnyPath: TypeAlias = Path  # or an `epath.Path`, which has the same methods
_PACKAGES = {"gs": ("gcsfs", "gcs"), "s3": ("s3fs", "s3")}  # and the extra that has it
_AHEAD = 2**22  # bytes that are fetched at once where an object is read from its start to its end
_SECONDS = 60  # between two times that a growing file is written anew


_KINDS = {  # of what is not a regular file, by what `stat.S_IFMT` gives
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


class StorageError(UserError):
    """A place that can't be reached or written."""


class SizeLimit(enum.IntEnum):
    """The largest file that is read of each kind, in bytes."""

    LABELS = 2**22  # class names, one a line; a million short ones
    CONFIG = 2**26  # a model's or a run's config.json; 20,000 class names take about 2^19
    DESCRIPTION = 2**26  # the JSON files that describe a prepared data set
    SUMS = 2**26  # the list of a checkpoint's files
    MASK = 2**28
    IMAGE = 2**29
    RECORD = 2**30  # one record of a data set; its file may have any size
    METRICS = 2**31  # metrics.jsonl; ten million lines
    ARRAYS = 2**32  # a raw data set, or the index of a prepared one, that is read whole
    WEIGHTS = 2**34  # model.safetensors or a .pth file; vvt_large's training state has 2^30


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
        StorageError: an empty name, another kind of URL, a package that is missing, or a store
            that can't be reached.
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


def open_file(path: str | os.PathLike, limit: int | None, *, buffering: int = -1) -> BinaryIO:
    """Opens a file to read it; one of an object store is fetched whole.

    Args:
        path: the file, or a link to it.
        limit: its largest size in bytes, most often of `SizeLimit`; None: any size.
        buffering: as for the built-in `open`.

    Raises:
        OSError: it can't be read, is not a regular file, or is larger than the limit; the reason is
            in `strerror`.
    """
    if is_remote(path):
        return io.BytesIO(read_bytes(path, limit))
    # Without O_NONBLOCK, opening a pipe waits for somebody who writes into it
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
    """A whole file; arguments and errors as for `open_file`."""
    with _os_errors(path):
        if is_remote(path):
            if limit is not None:
                _check_size(path, _file_system(path).size(os.fspath(path)) or 0, limit)
            return _path(path).read_bytes()
        with open_file(path, limit) as file:
            # No more than it had when it was opened, since `read` makes room for what it is told
            content = file.read(os.fstat(file.fileno()).st_size)
    return content


def read_text(path: str | os.PathLike, limit: int | None) -> str:
    """A whole file of UTF-8; further errors as for `open_file`.

    Raises:
        UnicodeDecodeError: it is not UTF-8.
    """
    return read_bytes(path, limit).decode("utf-8")


def read_range(path: str | os.PathLike, start: int, end: int) -> bytes:
    """The bytes of a file from `start` up to, not including, `end`; fewer where it is shorter."""
    with _os_errors(path):
        if is_remote(path):
            return _file_system(path).cat_file(os.fspath(path), start=start, end=end)
        # Opened anew: data sets have more files than a process may keep open.
        with open_file(path, None, buffering=0) as file:
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
            with open_file(path, None, buffering=0) as file:
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
