"""Images in folders: a sub-folder for each class."""

import re
from collections.abc import Sequence
from typing import Any, TypeVar

import numpy as np

from vvt_jax import storage
from vvt_jax.data import sources
from vvt_jax.data.sources import DataError
from vvt_jax.storage import AnyPath

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
_NAMES = {"train": ("train",), "validation": ("validation", "val"), "test": ("test",)}
_SPLIT = re.compile(r"(\w+)(?:\[(?:(\d+)(%?))?:(?:(\d+)(%?))?\])?")
_ORDER_SEED = 0  # of the order that parts of a split are cut from
File = TypeVar("File")


class _FolderExamples:
    """Files, decoded when they are asked for and turned upright as cameras say."""

    def __init__(self, files: Sequence[tuple[str, int]]):
        self._paths = np.array([path for path, _ in files])  # quick to hand to worker processes
        self._labels = np.array([label for _, label in files], np.int32)

    def __len__(self) -> int:
        return len(self._labels)

    def describe(self, index: int) -> str:
        """The image's file."""
        return str(self._paths[index])

    def __getitem__(self, index: int) -> dict[str, Any]:
        path = self.describe(index)
        image = sources.decode(path, path, upright=True)
        return {"image": image, "label": int(self._labels[index])}


def open_folder(split: str, data_dir: str | None) -> sources.Source:
    """A split of a folder; see `sources.open_source`.

    Classes are the sub-folders' names, sorted; those of `train` where there are several splits.
    Parts of a split, such as `train[:90%]` and `train[90%:]`, are cut from a fixed random order, so
    that each has all classes.
    """
    if not data_dir:
        raise DataError("The source 'folder' needs config.data.data_dir, the folder of the images.")
    root = storage.locate(data_dir).expanduser()
    name = split_name(split)
    places = split_folders(root)
    if name not in places:
        raise DataError(f"{root} has no split {name!r}: it has {', '.join(places)}.")
    classes = _sub_folders(places["train"])
    files = _list(places[name], classes)
    if not files:
        kinds = ", ".join(suffix[1:] for suffix in SUFFIXES)
        raise DataError(f"{places[name]} has no images in class folders ({kinds}).")
    return sources.Source(_FolderExamples(cut(files, split)), tuple(classes), "folder", split)


def split_name(split: str) -> str:
    """`train`, `validation` or another name, of a split that may be a part of it.

    Raises:
        DataError: it is written in another way.
    """
    if not (found := _SPLIT.fullmatch(split)):
        raise DataError(f"{split!r} is no split: write train, train[:90%] or train[100:].")
    return "validation" if found[1] == "val" else found[1]


def cut(files: list[File], split: str) -> list[File]:
    """The files of a part of a split, such as `train[:90%]`, out of a fixed random order."""
    if "[" not in split or not (found := _SPLIT.fullmatch(split)):
        return files
    _, first, first_percent, last, last_percent = found.groups()
    start = _count(first, first_percent, len(files), 0)
    stop = _count(last, last_percent, len(files), len(files))
    order = np.random.default_rng(_ORDER_SEED).permutation(len(files))
    return [files[i] for i in sorted(order[start:stop])]


def split_folders(root: AnyPath) -> dict[str, AnyPath]:
    """The folder of each split; the root itself is `train` where it has no such sub-folder."""
    subs = _sub_folders(root)
    if "train" not in subs:
        return {"train": root}
    return {
        split: root / folder
        for split, folders in _NAMES.items()
        for folder in folders
        if folder in subs
    }


def _sub_folders(folder: AnyPath) -> list[str]:
    try:
        folders, _ = storage.list_folder(folder)
    except OSError as error:
        raise DataError(f"{folder} can't be read: {error.strerror}.") from error
    return [name for name in folders if not name.startswith(".")]


def _list(folder: AnyPath, classes: Sequence[str]) -> list[tuple[str, int]]:
    """(path, label) of every image, by class and name."""
    labels = {name: label for label, name in enumerate(classes)}
    files = []
    for name in _sub_folders(folder):
        if name not in labels:
            raise DataError(f"{folder / name} is a class that the training images lack.")
        try:
            _, names = storage.list_folder(folder / name)
        except OSError as error:
            raise DataError(f"{folder / name} can't be read: {error.strerror}.") from error
        files += [
            (str(folder / name / file), labels[name])
            for file in names
            if file.lower().endswith(SUFFIXES) and not file.startswith(".")
        ]
    return files


def _count(number: str | None, percent: str | None, total: int, default: int) -> int:
    if number is None:
        return default
    return min(total, round(int(number) / 100 * total) if percent else int(number))
