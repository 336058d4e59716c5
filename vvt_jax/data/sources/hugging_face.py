"""Hugging Face data sets on this machine, read with the package `datasets`."""

import contextlib
import io
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from vvt_jax.data.examples import BrokenImageError, DataError, Source
from vvt_jax.data.image_files import decode


class _HuggingFaceExamples:
    """Rows of memory-mapped Arrow files, whose images are decoded here, as in other sources."""

    def __init__(self, rows: Any, image: str, label: str, told: str, upright: bool):
        self._rows = rows
        self._image = image
        self._label = label
        self._told = told
        self._upright = upright

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = self._rows[int(index)]
        told = f"Image {index} of {self._told}"
        if (file := row[self._image]) is None:
            raise BrokenImageError(f"{told} is missing.")
        if path := file["path"]:
            told += f" ({path})"
        if file["bytes"] is None and "://" in str(path):
            raise BrokenImageError(
                f"Image {index} is at {path}, and data sets may not choose what is fetched."
            )
        opened = path if file["bytes"] is None else io.BytesIO(file["bytes"])
        image = decode(opened, told, upright=self._upright)
        return {"image": image, "label": row[self._label]}


def open_hugging_face(
    name: str, split: str, data_dir: str | None, *, upright: bool = True
) -> Source:
    """Open a split of a data set of the package `datasets`; see `sources.open_source`."""
    try:
        import datasets
    except ImportError as error:
        raise DataError(
            f"{name!r} needs the package datasets: pip install 'vvt_jax[huggingface]'."
        ) from error

    found = _open(name, data_dir)
    first = next(iter(found.values()))
    image = _only(name, first.features, datasets.Image)
    label = _only(name, first.features, datasets.ClassLabel)
    try:
        parts = datasets.ReadInstruction.from_spec(split).to_absolute(
            {key: len(rows) for key, rows in found.items()}
        )
    except (ValueError, AssertionError) as error:
        raise DataError(
            f"{name!r} has no split {split!r}: it has {', '.join(found)}, and parts of them like "
            "'train[:90%]'."
        ) from error
    # Leave images encoded: if the package decoded them, a broken one would end the run
    rows = datasets.concatenate_datasets(
        [
            found[part.splitname]
            .select_columns([image, label])
            .cast_column(image, datasets.Image(decode=False))
            .select(range(part.from_, max(part.from_, part.to)))
            for part in parts
        ]
    )
    told = f"{name!r}, split {split!r}"
    names = tuple(first.features[label].names)
    for part in parts:
        other = tuple(found[part.splitname].features[label].names)
        if other != names:
            raise DataError(
                f"The splits of {name!r} have different classes ({', '.join(names[:3])}, ... and "
                f"{', '.join(other[:3])}, ...): cast all of them to the same ClassLabel first."
            )
    _check_labels(rows.select_columns([label]), len(names), told)
    examples = _HuggingFaceExamples(rows, image, label, told, upright)
    return Source(examples, names, name, split)


def _check_labels(rows: Any, num_classes: int, told: str) -> None:
    """Check that every example has a label, and that it is a class.

    Missing labels are None or -1, as in unlabelled test splits.

    Raises:
        DataError: if a label is missing or out of range.
    """
    if not len(rows):
        return
    column = rows.with_format("arrow")[:].column(0)
    labels = column.fill_null(-1).to_numpy()
    wrong = np.flatnonzero((labels < 0) | (labels >= num_classes))
    if not len(wrong):
        return
    if len(wrong) == len(labels) and labels.max() < 0:
        raise DataError(f"The examples of {told}, have no labels.")
    index = int(wrong[0])
    raise DataError(
        f"Image {index} of {told}, has the label {column[index].as_py()}, but there are "
        f"{num_classes} classes, from 0 on: {len(wrong)} of {len(labels)} examples have such a "
        "label and have to be taken out, for example by the data set's filter."
    )


def _only(name: str, features: Any, kind: type) -> str:
    """Return the name of the only feature of that type.

    Raises:
        DataError: if there is no such feature, or more than one.
    """
    found = [key for key, feature in features.items() if isinstance(feature, kind)]
    if len(found) == 1:
        return found[0]
    listed = ", ".join(f"{key} ({type(feature).__name__})" for key, feature in features.items())
    if found:
        raise DataError(
            f"{name!r} has several features of type {kind.__name__}, {', '.join(found)}: remove "
            "all but one with its remove_columns and save it with save_to_disk."
        )
    raise DataError(
        f"{name!r} has no feature of type {kind.__name__}, only {listed}: make one with its "
        "cast_column and save it with save_to_disk."
    )


def _open(name: str, data_dir: str | None) -> dict[str, Any]:
    """Open the splits of a data set, by name."""
    import datasets

    short = name.partition(":")[2]
    if data_dir is not None:
        folder = Path(data_dir).expanduser() / short
        if not short or not folder.is_dir():
            raise DataError(
                f"{name!r} was not found, since there is no folder {folder}: write it there with "
                f"datasets.load_dataset(...).save_to_disk({os.fspath(folder)!r})."
            )
        try:
            with _quiet_and_offline():
                found = datasets.load_from_disk(folder)
        except Exception as error:  # pyarrow and json raise errors of many kinds
            raise DataError(
                f"{folder} can't be opened as a data set that save_to_disk wrote: {_reason(error)}."
            ) from error
        if isinstance(found, datasets.Dataset):
            return {str(found.split or "train"): found}
        return dict(found)
    # NAME is "name" or "owner/name", and a further part is the config.
    words = short.split("/")
    tries: list[tuple[str, str | None]] = [(short, None)] if len(words) <= 2 else []
    if len(words) > 1:
        tries.append(("/".join(words[:-1]), words[-1]))
    configs = ""
    for path, config in tries:
        if not path or Path(path).exists():
            continue  # `datasets` would open a folder of that name in the working folder
        try:
            with _quiet_and_offline():
                return dict(datasets.load_dataset(path, config))
        except Exception as error:  # of any kind, depending on what is in the cache
            if "config" in (said := " ".join(str(error).split())):  # it lists the known ones
                configs = f" ({said.rstrip('.')})"
    raise DataError(
        f"{name!r} was not found in {datasets.config.HF_DATASETS_CACHE}{configs}: fetch it with "
        "datasets.load_dataset where there is a network, or set config.data.data_dir to a folder "
        "that has it from save_to_disk."
    )


@contextlib.contextmanager
def _quiet_and_offline() -> Iterator[None]:
    """Keep `datasets` from contacting a server, and from warning that it couldn't."""
    import datasets

    before = datasets.config.HF_HUB_OFFLINE, datasets.logging.get_verbosity()
    datasets.config.HF_HUB_OFFLINE = True
    datasets.logging.set_verbosity_error()
    try:
        yield
    finally:
        datasets.config.HF_HUB_OFFLINE = before[0]
        datasets.logging.set_verbosity(before[1])


def _reason(error: Exception) -> str:
    return str(error).strip().partition("\n")[0].rstrip(".") or type(error).__name__
