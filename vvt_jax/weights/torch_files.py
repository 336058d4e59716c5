"""PyTorch's `.pth` files, read and written without PyTorch.

Such a file is a zip archive of a pickle and the bytes of each tensor. A pickle is a program:
unpickling it runs any code that it names. Here, nothing is unpickled. The few operations that a
checkpoint consists of are read as data, the names in it are never looked up, and anything else is
refused, so that files from untrusted sources are safe to read.
"""

import math
import os
import struct
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from vvt_jax.system import storage
from vvt_jax.weights.checks import WeightsError
from vvt_jax.weights.torch_pickle import PickleReader
from vvt_jax.weights.torch_zip import ZIP_ERRORS, open_zip, shown

_LARGEST_PICKLE = 2**22  # bytes; a training checkpoint of vvt_large has about 2**19


def read_file(path: str | os.PathLike) -> Any:
    """Read a file that `torch.save` wrote: plain values and containers of them, and `Tensor`s.

    An `argparse.Namespace` becomes a dict of its attributes. Nothing in the file is ever executed.

    Raises:
        WeightsError: the file is missing, damaged or not PyTorch's, or holds anything but weights,
            numbers and texts; the message is one sentence.
    """
    try:
        with open_zip(path) as archive:
            entries = archive.infolist()
            pickles = [
                e for e in entries if e.filename.count("/") == 1 and _is(e.filename, "data.pkl")
            ]
            if len(pickles) != 1:
                raise WeightsError(f"{path} is a zip file, but not one that torch.save wrote.")
            folder = pickles[0].filename.removesuffix("data.pkl")
            sizes: dict[str, int] = {}
            for entry in entries:
                name = shown(entry.filename)
                if entry.compress_type != zipfile.ZIP_STORED:  # torch.save never does
                    raise WeightsError(
                        f"{path} was not written by torch.save: {name} is compressed."
                    )
                if entry.file_size != entry.compress_size:
                    raise WeightsError(
                        f"{path} is damaged: {name} has {entry.compress_size} bytes in one place "
                        f"and {entry.file_size} in another."
                    )
                if entry.filename in sizes:
                    raise WeightsError(f"{path} is damaged: it has two entries {name}.")
                sizes[entry.filename] = entry.file_size
            if pickles[0].file_size > _LARGEST_PICKLE:
                raise WeightsError(
                    f"{path} is not a checkpoint: its pickle has {pickles[0].file_size} bytes."
                )
            program = archive.read(pickles[0])
            order = f"{folder}byteorder"
            big = sizes.get(order) == len(b"big") and archive.read(order) == b"big"
    except WeightsError:
        raise
    except ZIP_ERRORS as error:
        raise _unreadable(Path(path), error) from error
    return PickleReader(path, folder, sizes, ">" if big else "<").run(program)


def _is(name: str, file: str) -> bool:
    return name.rpartition("/")[2] == file


def _unreadable(path: Path, error: Exception) -> WeightsError:
    if isinstance(error, OSError) and error.strerror:
        return WeightsError(f"{path} can't be read: {error.strerror}.")
    try:
        with storage.open_file(path, None) as file:
            start = file.read(64)
    except OSError:
        start = b""
    if start[:1] == b"\x80":  # how a pickle begins; before PyTorch 1.6, files were bare pickles
        return WeightsError(
            f"{path} has PyTorch's format from before 1.6, or is another pickle: load it with "
            "torch.load(..., weights_only=True) and write it with torch.save again."
        )
    if not start:
        return WeightsError(f"{path} is empty.")
    what = (
        "is damaged or cut short"
        if start[:2] == b"PK"
        else "is neither a model folder nor a PyTorch file"
    )
    reason = shown(str(error).rstrip(".")) or type(error).__name__
    return WeightsError(f"{path} {what}: {reason}.")


def write_file(path: str | os.PathLike, arrays: Mapping[str, np.ndarray]) -> None:
    """Write a state dict of float32 tensors in the format of `torch.save`.

    `torch.load(path, weights_only=True)` returns an OrderedDict of CPU tensors. An existing file is
    replaced.

    Args:
        path: the file to write.
        arrays: the arrays by name, of any floating-point dtype; they are stored as float32.
    """
    path = Path(path)
    temporary = path.with_name(f"{path.name}.tmp")
    with zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED) as archive:

        def add(name: str, content: bytes) -> None:
            # torch.load memory-maps tensors, so they must start at multiples of 64 bytes
            entry = zipfile.ZipInfo(f"archive/{name}")
            start = archive.fp.tell() + 30 + len(entry.filename) + 4  # type: ignore[union-attr]
            padding = -start % 64
            entry.extra = struct.pack("<HH", 0x4246, padding) + b"Z" * padding  # "FB", as torch
            archive.writestr(entry, content)

        add("data.pkl", _state_dict_pickle({k: np.shape(a) for k, a in arrays.items()}))
        add("byteorder", b"little")
        for key, array in enumerate(arrays.values()):
            add(f"data/{key}", np.ascontiguousarray(array, "<f4").tobytes())
        add("version", b"3\n")
    temporary.replace(path)


def _state_dict_pickle(shapes: Mapping[str, tuple[int, ...]]) -> bytes:
    """Return a pickle (protocol 2) that creates an OrderedDict of contiguous tensors."""

    def name(module: str, attribute: str) -> bytes:
        return f"c{module}\n{attribute}\n".encode()

    def text(value: str) -> bytes:
        encoded = value.encode()
        return b"X" + struct.pack("<I", len(encoded)) + encoded

    def number(value: int) -> bytes:
        if value < 2**31:
            return b"J" + struct.pack("<i", value)
        content = value.to_bytes(value.bit_length() // 8 + 1, "little")
        return b"\x8a" + bytes([len(content)]) + content

    def many(values) -> bytes:
        return b"(" + b"".join(map(number, values)) + b"t"

    empty_dict = name("collections", "OrderedDict") + b")R"
    program = b"\x80\x02" + empty_dict + b"("
    for key, (tensor, shape) in enumerate(shapes.items()):
        strides = [math.prod(shape[axis + 1 :]) for axis in range(len(shape))]
        storage = text("storage") + name("torch", "FloatStorage") + text(str(key)) + text("cpu")
        program += text(tensor) + name("torch._utils", "_rebuild_tensor_v2") + b"("
        program += b"(" + storage + number(math.prod(shape)) + b"tQ"
        program += number(0) + many(shape) + many(strides) + b"\x89" + empty_dict + b"tR"
    return program + b"u."
