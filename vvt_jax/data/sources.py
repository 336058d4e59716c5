"""Where examples come from: data sets with random access, opened by name.

A further kind of source is one function that `open_source` calls; the loader needs nothing but
`Source`.
"""

import contextlib
import dataclasses
import functools
import os
from collections.abc import Callable, Sequence
from typing import Any, BinaryIO, Protocol, TypeAlias

import numpy as np
import PIL.Image

from vvt_jax import storage
from vvt_jax.data import preprocess
from vvt_jax.data.image_files import FORMATS
from vvt_jax.errors import UserError
from vvt_jax.storage import SizeLimit

_LONGEST_SIDE = 2**16 - 1  # pixels; JPEG has no longer one
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


def describe(examples: Examples, index: int) -> str:
    """How to name an example: its file, if the source knows it."""
    method = getattr(examples, "describe", None)
    return method(index) if method else f"Image {index}"


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
        left_out: a sentence for each kind of file or folder beside the examples that is not used.
        names: a name for each example that stays the same whenever the source is opened, such as
            the path of its file in the source's folder; None where the source has no such names.
    """

    examples: Examples
    class_names: tuple[str, ...]
    name: str
    split: str
    pixels: bool = False
    left_out: tuple[str, ...] = ()
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
    upright: bool = True,
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
            `"folder"`: image files in a sub-folder for each class, see `image_files.FORMATS`;
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
        upright: turn images as their EXIF orientation says; False: leave them as they are stored.
            Masks belong to the image as it is displayed, unless they have an orientation too.
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
            name,
            split,
            data_dir,
            None if cache_dir is None else storage.locate(cache_dir),
            upright=upright,
        )
    if kind == "huggingface":
        from vvt_jax.data.hugging_face import open_hugging_face

        return open_hugging_face(name, split, data_dir, upright=upright)
    if name == "folder":
        from vvt_jax.data.folder import open_folder

        return open_folder(split, data_dir, cut or splits.ByHash([split]), upright=upright)
    if name == "folder_segmentation":
        from vvt_jax.data.folder_segmentation import open_folder_segmentation

        by = cut or splits.ByHash([split])
        return open_folder_segmentation(split, data_dir, by, upright=upright)
    if name == "digits":
        return _open_digits(name, split)
    raise DataError(
        f"Unknown data source {name!r}: it must be 'digits', 'tfds:NAME', 'folder', "
        "'folder_segmentation' or 'huggingface:NAME'."
    )


def decode(
    file: str | os.PathLike | BinaryIO, told: str, *, upright: bool = True
) -> PIL.Image.Image:
    """The RGB image in a file of one of `image_files.FORMATS`, transparent parts on white.

    Args:
        file: a path or an open file.
        told: how to name it.
        upright: turn it as its EXIF orientation says.

    Raises:
        BrokenImageError: it can't be decoded.
    """
    try:
        with contextlib.ExitStack() as stack:
            if isinstance(file, str | os.PathLike):
                file = stack.enter_context(open_image(file, SizeLimit.IMAGE))
            image = stack.enter_context(PIL.Image.open(file, formats=FORMATS))
            check_sides(image, told)
            image.load()
            return preprocess.to_rgb(image, upright=upright)
    except DataError:
        raise
    except Exception as error:  # Pillow's decoders raise whatever they stumble over
        raise BrokenImageError(f"{told} can't be decoded: {why_broken(error, FORMATS)}.") from error


def why_broken(error: Exception, formats: Sequence[str]) -> str:
    """What Pillow's error says of an image, without the address of an object."""
    if isinstance(error, PIL.UnidentifiedImageError):
        *others, last = formats
        listed = f"{', '.join(others)} or {last}" if others else last
        return f"it is not an image of the format {listed}"
    reason = str(error).partition("\n")[0].rstrip(".")
    return ascii(reason)[1:-1][:200] if reason else type(error).__name__


def open_image(path: str | os.PathLike, limit: SizeLimit) -> BinaryIO:
    """The file of an image or a mask.

    Raises:
        BrokenImageError: it can't be read.
        DataError: nor can an object store's, which may well answer later.
    """
    try:
        return storage.open_file(path, limit)
    except OSError as error:
        kind = DataError if storage.is_remote(path) else BrokenImageError
        raise kind(f"{os.fspath(path)} can't be read: {error.strerror}.") from error


def check_sides(image: PIL.Image.Image, told: str) -> None:
    """Refuses an image before it is decoded, if it is a line of a length that no camera makes: each
    row of it takes memory, whatever its width.

    Raises:
        BrokenImageError: it is one.
    """
    if max(image.size) > _LONGEST_SIDE:
        raise BrokenImageError(
            f"{told} can't be used: An image of {image.width} x {image.height} pixels is too long "
            f"and narrow, since no side may have more than {_LONGEST_SIDE}."
        )


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
