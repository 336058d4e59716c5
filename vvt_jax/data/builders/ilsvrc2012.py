"""ImageNet's original archives, read in place: ILSVRC2012_img_train.tar and ILSVRC2012_img_val.tar.

The features are those of tfds's imagenet2012, whose own builder needs TensorFlow. That builder also
converts one PNG and 22 CMYK files to RGB JPEG. Here they stay unchanged, because Pillow can read
them.
"""

import dataclasses
import os
import tarfile
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds
from tqdm import tqdm

from vvt_jax.data.examples import DataError
from vvt_jax.system import storage
from vvt_jax.system.storage import SizeLimit

NAME, VERSION = "imagenet2012", "5.1.0"
_TRAIN, _VALIDATION = "ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar"
_LABELS = "datasets/imagenet2012/labels.txt"
_VALIDATION_LABELS = "datasets/imagenet2012/validation_labels.txt"  # of the files, sorted by name


@dataclasses.dataclass(frozen=True)
class _Member:
    """A file inside an archive, or inside an archive nested in it."""

    name: str
    start: int  # offset in bytes in the outer archive
    size: int
    label: str


class Images:
    """Random access to the examples of an archive, in the form that `features()` encodes."""

    def __init__(self, archive: Path, members: list[_Member]):
        self._archive, self._members = archive, members
        self.num_bytes = sum(member.size for member in members)

    def __len__(self) -> int:
        return len(self._members)

    def __getitem__(self, index: int) -> dict[str, Any]:
        member = self._members[index]
        if member.size > SizeLimit.IMAGE:
            raise DataError(f"{self._archive} is damaged: {member.name} has {member.size} bytes.")
        try:
            content = storage.read_range(self._archive, member.start, member.start + member.size)
        except OSError as error:
            raise DataError(f"{self._archive} can't be read: {error.strerror}.") from error
        if len(content) < member.size:
            raise DataError(f"{self._archive} is truncated: {member.name} is not all there.")
        return {"image": content, "label": member.label, "file_name": member.name}


def features() -> tfds.features.FeaturesDict:
    """Return the features of tfds's imagenet2012."""
    return tfds.features.FeaturesDict(
        {
            "image": tfds.features.Image(encoding_format="jpeg"),
            "label": tfds.features.ClassLabel(names_file=tfds.core.tfds_path(_LABELS)),
            "file_name": tfds.features.Text(),
        }
    )


def open_archives(folder: Path) -> dict[str, Images]:
    """Open the splits whose archives are in the folder, indexing them by their files' headers.

    Raises:
        DataError: if there is no archive, or one is damaged or has a different layout.
    """
    splits = {}
    if (folder / _TRAIN).exists():
        splits["train"] = Images(folder / _TRAIN, _index_train(folder / _TRAIN))
    if (folder / _VALIDATION).exists():
        splits["validation"] = Images(folder / _VALIDATION, _index_validation(folder / _VALIDATION))
    if not splits:
        raise DataError(
            f"{folder} has neither {_TRAIN} nor {_VALIDATION}: download them from "
            "https://image-net.org and name their folder with --manual_dir."
        )
    return splits


def _index_train(path: Path) -> list[_Member]:
    members = []
    known = set(_lines(_LABELS))
    for outer in tqdm(_members(path), desc=f"Indexing {path.name}", unit="class"):
        label = outer.name.removesuffix(".tar")
        if label not in known:
            raise DataError(f"{path} is not ImageNet's: it has {outer.name}, which is no class.")
        members += [
            dataclasses.replace(inner, start=outer.start + inner.start, label=label)
            for inner in _members(path, outer)
        ]
    return members


def _index_validation(path: Path) -> list[_Member]:
    labels = _lines(_VALIDATION_LABELS)
    members = []
    for member in _members(path):
        number = member.name.removesuffix(".JPEG").rpartition("_")[2]
        if not number.isdecimal() or not 1 <= int(number) <= len(labels):
            raise DataError(f"{path} is not ImageNet's: it has {member.name}.")
        members.append(dataclasses.replace(member, label=labels[int(number) - 1]))
    return members


def _members(path: Path, inside: _Member | None = None) -> list[_Member]:
    """Return the files of an archive, or of one that is a member of it, sorted by name."""
    try:
        with storage.open_file(path, None) as file:
            whole = file if inside is None else _Window(file, inside.start, inside.size)
            with tarfile.open(fileobj=whole, mode="r:") as archive:  # type: ignore[call-overload]
                found = [
                    _Member(os.path.basename(m.name), m.offset_data, m.size, "")
                    for m in archive
                    if m.isfile()
                ]
    except (tarfile.TarError, OSError, EOFError, ValueError, OverflowError) as error:
        told = path if inside is None else f"{inside.name} in {path}"
        raise DataError(f"{told} is damaged, or no tar archive: {error}.") from error
    return sorted(found, key=lambda member: member.name)


class _Window:
    """A part of a file, presented as a read-only file."""

    def __init__(self, file: Any, start: int, size: int):
        self._file, self._start, self._size, self._at = file, start, size, 0

    def tell(self) -> int:
        return self._at

    def seek(self, position: int) -> int:
        self._at = position
        return position

    def read(self, size: int) -> bytes:
        self._file.seek(self._start + self._at)
        content = self._file.read(max(0, min(size, self._size - self._at)))
        self._at += len(content)
        return content


def _lines(name: str) -> list[str]:
    return tfds.core.tfds_path(name).read_text().split()
