"""Random access to TFRecord files, without TensorFlow.

A file is a sequence of records. Each consists of the length of the data (8 bytes), the masked
CRC32C of the length (4 bytes), the data, and the masked CRC32C of the data (4 bytes). Numbers are
little-endian. (Source: TensorFlow, core/lib/io/record_writer.h.)
"""

import contextlib
import hashlib
import io
import itertools
import os
import zipfile
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor

import google_crc32c
import numpy as np
from tqdm import tqdm

from vvt_jax.data.examples import DataError
from vvt_jax.system import storage
from vvt_jax.system.storage import AnyPath, SizeLimit, StorageError

_HEADER, _FOOTER = 12, 4  # bytes around a record's data
_FILES_AT_ONCE = 16  # to index: an object store is slow to answer, but serves many requests
_MEND = "copy or download the file again"


def masked_crc(data: bytes) -> int:
    """Return the checksum as TFRecord stores it: CRC32C, rotated by 15 bits, plus a constant."""
    crc = google_crc32c.value(data)
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def read_offsets(path: str | os.PathLike) -> np.ndarray:
    """Read the offsets of the records and of the end of the last one: int64 `[records + 1]`, bytes.

    Only the headers of the records are read.

    Raises:
        DataError: if the file can't be read, is truncated, or has a damaged header or a record that
            is too long.
    """
    offsets = [0]
    try:
        with storage.open_to_skim(path) as file:
            size = file.seek(0, os.SEEK_END)
            while offsets[-1] < size:
                file.seek(offsets[-1])
                header = file.read(_HEADER)
                if len(header) == _HEADER:
                    length = _length(header, path, offsets[-1])
                    end = offsets[-1] + _HEADER + length + _FOOTER
                    if length > SizeLimit.RECORD:
                        raise DataError(
                            f"{path} can't be read: its record at byte {offsets[-1]} has {length} "
                            f"bytes, and a record has at most {SizeLimit.RECORD}."
                        )
                if len(header) < _HEADER or end > size:
                    raise DataError(
                        f"{path} is truncated: its record at byte {offsets[-1]} reaches over the "
                        f"end of the file at {size}: {_MEND}."
                    )
                offsets.append(end)
    except OSError as error:
        raise DataError(f"{path} can't be read: {error.strerror}.") from error
    return np.array(offsets, np.int64)


def read_record(path: str | os.PathLike, start: int, end: int) -> bytes:
    """Read the data of the record between two offsets.

    Raises:
        DataError: if the file can't be read, or the record does not match its checksums.
    """
    try:
        record = storage.read_range(path, start, end)
    except OSError as error:
        raise DataError(f"{path} can't be read: {error.strerror}.") from error
    length = _length(record[:_HEADER], path, start)
    data, crc = record[_HEADER:-_FOOTER], record[-_FOOTER:]
    if len(data) != length or int.from_bytes(crc, "little") != masked_crc(data):
        raise DataError(f"{path} is damaged: its record at byte {start} is corrupt: {_MEND}.")
    return data


def _length(header: bytes, path: str | os.PathLike, start: int) -> int:
    length, crc = header[:8], header[8:]
    if len(header) < _HEADER or int.from_bytes(crc, "little") != masked_crc(length):
        raise DataError(
            f"{path} is damaged, or no TFRecord file: its header at byte {start} is corrupt: "
            f"{_MEND}."
        )
    return int.from_bytes(length, "little")


class TFRecords(Sequence[bytes]):
    """The records of several files, one file after the other.

    Args:
        parts: for each file, its path, the number of records to skip, the number to take, and the
            number that it should contain.
        cache_dir: a folder in which the offsets are cached for the next time; None for no cache.

    Raises:
        DataError: if a file is missing, damaged, or has a different number of records.
    """

    def __init__(
        self, parts: Iterable[tuple[str, int, int, int]], cache_dir: AnyPath | None = None
    ):
        self._parts = list(parts)
        self._offsets = _all_offsets([path for path, *_ in self._parts], cache_dir)
        for (path, _, _, expected), offsets in zip(self._parts, self._offsets, strict=True):
            if len(offsets) - 1 != expected:
                raise DataError(
                    f"{path} has {len(offsets) - 1} records where the data set's description has "
                    f"{expected}: {_MEND}."
                )
        # The number of the first record of each part
        self._firsts = [0, *itertools.accumulate(take for _, _, take, _ in self._parts)]

    def __len__(self) -> int:
        return self._firsts[-1]

    def __getitem__(self, index):
        if not 0 <= index < len(self):
            raise IndexError(f"There is no record {index} of {len(self)}.")
        part = int(np.searchsorted(self._firsts, index, side="right")) - 1
        path, skip, _, _ = self._parts[part]
        first = skip + index - self._firsts[part]
        return read_record(path, *self._offsets[part][first : first + 2].tolist())


def _all_offsets(paths: Sequence[str], cache_dir: AnyPath | None) -> list[np.ndarray]:
    """Return the offsets of each file, from the cache if the files have not changed."""
    cached = None
    if cache_dir is not None:
        try:
            state = storage.fingerprints(paths)
        except OSError as error:
            raise DataError(f"{error.filename} can't be read: {error.strerror}.") from error
        cached = cache_dir / f"{hashlib.sha256(repr(state).encode()).hexdigest()[:32]}.npz"
        # If the cached file is missing or damaged, index the files again
        with contextlib.suppress(OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
            with np.load(io.BytesIO(storage.read_bytes(cached, SizeLimit.ARRAYS))) as content:
                joined, counts = content["offsets"], content["counts"]
            if len(counts) == len(paths) and counts.sum() == len(joined):
                return np.split(joined, np.cumsum(counts)[:-1])
    with ThreadPoolExecutor(_FILES_AT_ONCE) as pool:
        indexed = pool.map(read_offsets, paths)
        shown = tqdm(
            indexed,
            total=len(paths),
            desc="Indexing TFRecord files",
            unit="file",
            disable=len(paths) < 16,
        )
        try:
            found = list(shown)
        except DataError:
            pool.shutdown(cancel_futures=True)
            raise
    if cached is not None:
        made = io.BytesIO()
        np.savez(made, offsets=np.concatenate(found), counts=[len(x) for x in found])
        with contextlib.suppress(StorageError):  # if it can't be written, index again next time
            storage.replace(cached, made.getvalue())
    return found
