"""Images in folders, with a sub-folder for each class, which may have sub-folders of its own."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from vvt_jax.data.examples import Cut, DataError, Source
from vvt_jax.data.image_files import (
    SUFFIXES,
    LeftOut,
    decode,
    is_junk,
    is_workdir,
    list_files,
    note_junk,
)
from vvt_jax.data.splits import split_name
from vvt_jax.system import storage
from vvt_jax.system.storage import AnyPath

_NAMES = {"train": ("train",), "validation": ("validation", "val"), "test": ("test",)}


class _FolderExamples:
    """Image files that are decoded on access."""

    def __init__(self, files: Sequence[tuple[str, int]], upright: bool):
        self._upright = upright
        self._paths = np.array([path for path, _ in files])  # fast to pass to worker processes
        self._labels = np.array([label for _, label in files], np.int32)

    def __len__(self) -> int:
        return len(self._labels)

    def describe(self, index: int) -> str:
        """Return the path of the image's file."""
        return str(self._paths[index])

    def __getitem__(self, index: int) -> dict[str, Any]:
        path = self.describe(index)
        image = decode(path, path, upright=self._upright)
        return {"image": image, "label": int(self._labels[index])}


def open_folder(split: str, data_dir: str | None, cut: Cut, *, upright: bool = True) -> Source:
    """Open a split of a folder; see `sources.open_source`.

    The classes are the sorted names of the sub-folders that contain images. If there are several
    splits, they are the sub-folders of `train`.
    """
    if not data_dir:
        raise DataError("The source 'folder' needs config.data.data_dir, the folder of the images.")
    root = storage.locate(data_dir).expanduser()
    name = split_name(split)
    left_out = LeftOut()
    places = split_folders(root, left_out)
    if name not in places:
        raise DataError(f"{root} has no split {name!r}: it has {', '.join(places)}.")
    listed = _images_by_class(places[name], left_out)
    classes = [
        known
        for known in _sub_folders(places.get("train", places[name]))
        if listed.get(known) or _is_class(known, places.values())
    ]
    for sub_folder, images in listed.items():
        if sub_folder not in classes:
            if images:
                raise DataError(
                    f"{places[name] / sub_folder} is a class that the training images lack."
                )
            left_out.folders.setdefault(str(places[name] / sub_folder), "it has no images")
    files = [(path, label) for label, known in enumerate(classes) for path in listed.get(known, [])]
    if not files:
        kinds = ", ".join(suffix[1:] for suffix in SUFFIXES)
        raise DataError(f"{places[name]} has no images in class folders ({kinds}).")
    names = names_in(root, [path for path, _ in files])
    chosen = cut(split, names, [label for _, label in files]).tolist()
    return Source(
        _FolderExamples([files[i] for i in chosen], upright),
        tuple(classes),
        "folder",
        split,
        left_out=tuple(left_out.sentences(str(places[name]))),
        names=[names[i] for i in chosen],
    )


def names_in(root: AnyPath, paths: Sequence[str]) -> list[str]:
    """Return paths relative to a source's folder, so they don't depend on where that is."""
    return [path.removeprefix(f"{root}/") for path in paths]


def split_folders(root: AnyPath, left_out: LeftOut | None = None) -> dict[str, AnyPath]:
    """Return the folder of each split; if the sub-folders of the root are classes, it is `train`.

    A sub-folder named `train` is the training split, unless there are also class folders next to it
    and it contains images directly: then it is a class like the others. Without `train`, the
    sub-folders are splits to evaluate if all of them have the names of splits and are divided into
    classes.

    Raises:
        DataError: if it is ambiguous whether `train` is a split or a class.
    """
    left_out = LeftOut() if left_out is None else left_out
    subs = _sub_folders(root, left_out)
    places = named_splits(root)
    if "train" not in subs:
        divided = all(_is_divided(place) for place in places.values())
        return places if divided and len(places) == len(subs) else {"train": root}
    splits = {path.name for path in places.values()}
    others = [name for name in subs if name not in splits and _has_images(root / name)]
    if others:
        if _has_images(root / "train", deep=False):
            return {"train": root}
        if len(places) == 1:
            raise DataError(
                f"{root} has the folders 'train' and {others[0]!r} side by side, which can't be a "
                "split and a class: rename 'train' if it is a class, and else move the other one."
            )
        for name in others:
            left_out.folders[str(root / name)] = "it lies beside train/, where the classes are"
    return places


def named_splits(root: AnyPath) -> dict[str, AnyPath]:
    """Return the sub-folders with names of splits, or, if there are none, the root as `train`."""
    subs = _sub_folders(root)
    return {
        split: root / folder
        for split, folders in _NAMES.items()
        for folder in folders
        if folder in subs
    } or {"train": root}


def _is_divided(folder: AnyPath) -> bool:
    """Return whether a folder has images in its sub-folders, and none directly in it."""
    return _has_images(folder) and not _has_images(folder, deep=False)


def _is_class(name: str, places: Iterable[AnyPath]) -> bool:
    """Return whether a sub-folder of that name contains images in one of the splits."""
    return any(storage.is_folder(place / name) and _has_images(place / name) for place in places)


def _has_images(folder: AnyPath, *, deep: bool = True) -> bool:
    """Return whether there is an image in a folder or, with `deep`, anywhere below it."""
    if deep:
        return next(iter(_listed(folder, LeftOut())), None) is not None
    return any(name.lower().endswith(SUFFIXES) and not is_junk(name) for name in _names(folder)[1])


def _names(folder: AnyPath) -> tuple[list[str], list[str]]:
    try:
        return storage.list_folder(folder)
    except OSError as error:
        raise DataError(f"{folder} can't be read: {error.strerror}.") from error


def _listed(folder: AnyPath, left_out: LeftOut) -> Iterator[str]:
    folders, files = _names(folder)
    if is_workdir(folders, files):
        left_out.folders[str(folder)] = "the workdir of a run"
        return
    try:
        yield from list_files(folder, SUFFIXES, left_out)
    except OSError as error:
        raise DataError(f"{error.filename or folder} can't be read: {error.strerror}.") from error


def _sub_folders(folder: AnyPath, left_out: LeftOut | None = None) -> list[str]:
    names, _ = _names(folder)
    for name in names:
        if left_out is not None and is_junk(name):
            note_junk(left_out, folder / name)
    return [name for name in names if not is_junk(name)]


def _images_by_class(place: AnyPath, left_out: LeftOut) -> dict[str, list[str]]:
    """Return the paths of the images in each sub-folder, in order."""
    _, files = _names(place)
    if stray := [name for name in files if name.lower().endswith(SUFFIXES) and not is_junk(name)]:
        left_out.others.append(f"Left out of {place}: {len(stray)} images in no class folder.")
    return {
        name: [str(place / name / file) for file in _listed(place / name, left_out)]
        for name in _sub_folders(place, left_out)
    }
