"""SHA-256 checksums of a checkpoint's files, which are stored beside them."""

import hashlib
from collections.abc import Iterator

from etils import epath

from vvt_jax.system import storage

SUMS = "SHA256SUMS"  # in the format of `sha256sum --check SHA256SUMS`
_CHUNK = 1 << 20  # bytes


class DamagedError(Exception):
    """The files of a checkpoint are not as they were written; the message says which one."""


def write_sums(folder: epath.Path) -> None:
    """Write the checksums of all files in a folder.

    Orbax later adds only a file that marks the folder as complete.
    """
    sums = {path.relative_to(folder).as_posix(): _sum(path) for path in _files(folder)}
    (folder / SUMS).write_text("".join(f"{sums[name]}  {name}\n" for name in sorted(sums)))


def verify_sums(folder: epath.Path) -> None:
    """Raise `DamagedError` unless all files on the folder's list are as they were written."""
    try:
        content = storage.read_bytes(folder / SUMS, storage.SizeLimit.SUMS)
        lines = content.decode(errors="replace").splitlines()
    except OSError as error:
        raise DamagedError(f"{folder.name}/{SUMS} is missing") from error
    if not lines:
        raise DamagedError(f"{folder.name}/{SUMS} is empty")
    for line in lines:
        expected, _, name = line.partition("  ")
        try:
            found = _sum(folder / name)
        except (OSError, ValueError) as error:  # ValueError if the name isn't valid
            raise DamagedError(f"{folder.name}/{name} is missing") from error
        if found != expected:
            raise DamagedError(f"{folder.name}/{name} is not what was written")


def _sum(path: epath.Path) -> str:
    digest = hashlib.sha256()
    with storage.open_to_skim(path) as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def _files(folder: epath.Path) -> Iterator[epath.Path]:
    for path in folder.iterdir():
        if path.is_dir():
            yield from _files(path)
        else:
            yield path
