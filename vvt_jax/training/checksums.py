"""SHA-256 sums of a checkpoint's files, which lie beside them."""

import hashlib
from collections.abc import Iterator

from etils import epath

from vvt_jax.system import storage

SUMS = "SHA256SUMS"  # `sha256sum --check SHA256SUMS` reads it
_CHUNK = 1 << 20  # bytes


class DamagedError(Exception):
    """A checkpoint whose files are not the ones that were written; says how."""


def write_sums(folder: epath.Path) -> None:
    """Lists all files of the folder; what orbax adds later is only a mark that it is complete."""
    sums = {path.relative_to(folder).as_posix(): _sum(path) for path in _files(folder)}
    (folder / SUMS).write_text("".join(f"{sums[name]}  {name}\n" for name in sorted(sums)))


def verify_sums(folder: epath.Path) -> None:
    """Raises `DamagedError`, unless all files on the folder's list are what was written."""
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
        except (OSError, ValueError) as error:  # the latter of a name that can be none
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
