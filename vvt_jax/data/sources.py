"""Where examples come from: data sets with random access, opened by name.

A further kind of source is one function that `open_source` calls; the loader needs nothing but
`Source`.
"""

import dataclasses
import functools
import os
from collections.abc import Callable, Sequence
from typing import Any, BinaryIO, Protocol, TypeAlias

import numpy as np
import PIL.ExifTags
import PIL.Image
import PIL.ImageOps

from vvt_jax import storage
from vvt_jax.data import preprocess
from vvt_jax.errors import UserError

_FORMATS = ("JPEG", "PNG", "WEBP")  # Pillow knows others, and runs a program for one of them
# From a split as a config writes it, the name of every example of the whole split and the class of
# each: the indices of the examples that belong to the part; see `splits`.
Cut: TypeAlias = Callable[[str, Sequence[str], Sequence[int]], np.ndarray]


class DataError(UserError):
    """The data is missing or unsuitable; the message says in one sentence what can be done."""


class BrokenImageError(DataError):
    """An image that can't be decoded; the message names it."""


class Examples(Protocol):
    """Random access: `examples[i]` is a dict with `image` and `label`."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> dict[str, Any]: ...


@dataclasses.dataclass(frozen=True)
class Source:
    """One split of a data set, in a fixed order.

    Attributes:
        examples: `len(examples)` and `examples[i]`, a dict with `image`, an RGB PIL image or a
            uint8 array `[height, width, 1 or 3]` of any size, and `label`, an int that indexes
            `class_names`, or with `pixels` a uint8 array `[height, width]` of such, where 255 is
            ignored; BrokenImageError for an image that can't be decoded. It can be pickled,
            for the loader's worker processes.
        class_names: the classes' names in the order of their labels.
        name: the name that opened it.
        split: the split that was asked for.
        pixels: each pixel has a label, not each image.
        names: a name for each example that stays the same whenever the source is opened, such as
            the path of its file in the source's folder; None where the source has no such names.
    """

    examples: Examples
    class_names: tuple[str, ...]
    name: str
    split: str
    pixels: bool = False
    names: Sequence[str] | None = None

    @property
    def num_classes(self) -> int:
        return len(self.class_names)


def with_classes(source: Source, class_names: Sequence[str]) -> Source:
    """A source whose labels count the classes in another order, of which it may lack some.

    Args:
        source: its own class names occur in `class_names`, once each.
        class_names: in the order of the new labels.
    """
    if tuple(class_names) == source.class_names:
        return source
    labels = {name: label for label, name in enumerate(class_names)}
    examples = _Relabelled(source.examples, [labels[name] for name in source.class_names])
    return dataclasses.replace(source, examples=examples, class_names=tuple(class_names))


class _Relabelled:
    """Examples whose labels stand for other class numbers."""

    def __init__(self, examples: Examples, labels: Sequence[int]):
        self._examples = examples
        self._labels = np.array(labels, np.int32)

    def __len__(self) -> int:
        return len(self._examples)

    def __getitem__(self, index: int) -> dict[str, Any]:
        example = self._examples[index]
        label = example["label"]
        if np.ndim(label):
            table = np.arange(256).astype(np.uint8)  # what is ignored stays so
            table[: len(self._labels)] = self._labels
            return {**example, "label": table[label]}
        return {**example, "label": int(self._labels[label])}


def open_source(
    name: str,
    split: str,
    *,
    data_dir: str | None = None,
    cache_dir: str | os.PathLike | None = None,
    cut: Cut | None = None,
) -> Source:
    """Opens a data set that was prepared; never downloads, and uses the network for `gs://` and
    `s3://` addresses only.

    Args:
        name: one of
            `"digits"`: scikit-learn's 8x8 digits with the splits `train` (1293 examples),
            `validation` (144) and `test` (360);
            `"tfds:NAME[/CONFIG][:VERSION]"`: a TensorFlow Datasets data set prepared as
            array_record or TFRecord, read without TensorFlow and without the builder's code;
            `"folder"`: JPEG, PNG and WebP files in a sub-folder for each class;
            `"folder_segmentation"`: images and masks of the same name, see the module's text;
            `"huggingface:NAME[/CONFIG]"`: a data set of the package `datasets`, with one feature of
            type Image and one of type ClassLabel, whatever their names.
        split: the split's name. For all but the digits also parts of it as tfds writes them
            (`"train[:90%]"`). A folder has `train`, of its sub-folders; or, where it has the
            sub-folder `train`, that one and `val` or `validation`, and `test`.
        data_dir: of tfds, where prepared data lies; None: `$TFDS_DATA_DIR`, or
            `~/tensorflow_datasets`. Of `"folder"`, the folder. Either may be in an object store.
            Of Hugging Face, where `save_to_disk` wrote `NAME[/CONFIG]`; None: the package's cache.
        cache_dir: keeps where the records of TFRecord files begin; None: found anew each time.
        cut: how a part of a folder's split is chosen; None: `splits.ByHash`. The other sources cut
            parts themselves, in the order of their examples.

    Raises:
        DataError: the name or split is unknown, or the data is missing, damaged, of another
            format, or without labelled images.
    """
    from vvt_jax.data import splits  # which needs this module

    kind = name.partition(":")[0]
    if kind == "tfds":
        from vvt_jax.data.prepared import open_prepared

        return open_prepared(
            name, split, data_dir, None if cache_dir is None else storage.locate(cache_dir)
        )
    if kind == "huggingface":
        from vvt_jax.data.hugging_face import open_hugging_face

        return open_hugging_face(name, split, data_dir)
    if name == "folder":
        from vvt_jax.data.folder import open_folder

        return open_folder(split, data_dir, cut or splits.ByHash([split]))
    if name == "folder_segmentation":
        from vvt_jax.data.folder_segmentation import open_folder_segmentation

        return open_folder_segmentation(split, data_dir, cut or splits.ByHash([split]))
    if name == "digits":
        return _open_digits(name, split)
    raise DataError(
        f"Unknown data source {name!r}: it must be 'digits', 'tfds:NAME', 'folder', "
        "'folder_segmentation' or 'huggingface:NAME'."
    )


def decode(
    file: str | os.PathLike | BinaryIO, told: str, *, upright: bool = False
) -> PIL.Image.Image:
    """The RGB image in a JPEG, PNG or WebP file.

    Args:
        file: a path or an open file.
        told: how to name it.
        upright: turned as its EXIF orientation says.

    Raises:
        BrokenImageError: it can't be decoded.
    """
    try:
        with PIL.Image.open(file, formats=_FORMATS) as image:
            image.load()
            turned = upright and image.getexif().get(PIL.ExifTags.Base.Orientation, 1) != 1
            return preprocess.to_rgb(PIL.ImageOps.exif_transpose(image) if turned else image)
    except Exception as error:  # Pillow's decoders raise whatever they stumble over
        reason = str(error).partition("\n")[0].rstrip(".") or type(error).__name__
        raise BrokenImageError(f"{told} can't be decoded: {reason}.") from error


class _ArrayExamples:
    """Examples held in memory: `images` `[examples, height, width, channels]`, `labels`."""

    def __init__(self, images: np.ndarray, labels: np.ndarray):
        self._images = images
        self._labels = labels

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"image": self._images[index], "label": int(self._labels[index])}


def _open_digits(name: str, split: str) -> Source:
    splits = _digits_splits()
    if split not in splits:
        raise DataError(f"'digits' has no split {split!r}: it has {', '.join(splits)}.")
    return Source(splits[split], tuple("0123456789"), name, split)


@functools.cache
def _digits_splits() -> dict[str, _ArrayExamples]:
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    images = np.round(digits.images * (255 / 16)).astype(np.uint8)[..., np.newaxis]

    def separate(indices: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
        labels = digits.target[indices]
        return train_test_split(indices, test_size=size, stratify=labels, random_state=0)

    rest, test = separate(np.arange(len(images)), 360)
    train, validation = separate(rest, 144)
    parts = {"train": train, "validation": validation, "test": test}
    return {key: _ArrayExamples(images[part], digits.target[part]) for key, part in parts.items()}
