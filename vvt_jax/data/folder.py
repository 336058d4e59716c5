"""Images in folders: a sub-folder for each class."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from vvt_jax import storage
from vvt_jax.data import sources
from vvt_jax.data.sources import DataError
from vvt_jax.data.splits import split_name
from vvt_jax.storage import AnyPath

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
_NAMES = {"train": ("train",), "validation": ("validation", "val"), "test": ("test",)}


class _FolderExamples:
    """Files, decoded when they are asked for and turned upright as cameras say."""

    def __init__(self, files: Sequence[tuple[str, int]]):
        self._paths = np.array([path for path, _ in files])  # quick to hand to worker processes
        self._labels = np.array([label for _, label in files], np.int32)

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, index: int) -> dict[str, Any]:
        path = str(self._paths[index])
        try:
            file = storage.fetched(path)
        except OSError as error:
            raise DataError(f"{path} can't be read: {error.strerror}.") from error
        image = sources.decode(file, path, upright=True)
        return {"image": image, "label": int(self._labels[index])}


def open_folder(split: str, data_dir: str | None, cut: sources.Cut) -> sources.Source:
    """A split of a folder; see `sources.open_source`.

    Classes are the sub-folders' names, sorted; those of `train` where there are several splits.
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
    names = names_in(root, [path for path, _ in files])
    chosen = cut(split, names, [label for _, label in files]).tolist()
    return sources.Source(
        _FolderExamples([files[i] for i in chosen]),
        tuple(classes),
        "folder",
        split,
        names=[names[i] for i in chosen],
    )


def names_in(root: AnyPath, paths: Sequence[str]) -> list[str]:
    """What files are called in a source's folder, wherever that lies."""
    return [path.removeprefix(f"{root}/") for path in paths]


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
