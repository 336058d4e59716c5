"""Where examples come from: data sets with random access, opened by name.

A further kind of source is one function in `_OPENERS`; the loader needs nothing but `Source`.
"""

import dataclasses
import functools
import io
import os
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
import PIL.Image

from vvt_jax.data import preprocess
from vvt_jax.errors import UserError


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
        examples: `len(examples)` and `examples[i]`, a dict with `image`, a uint8 array
            `[height, width, 1 or 3]` of any size, and `label`, an int that indexes `class_names`.
            It can be pickled, for the loader's worker processes.
        class_names: the classes' names in the order of their labels.
        name: the name that opened it.
        split: the split that was asked for.
    """

    examples: Examples
    class_names: tuple[str, ...]
    name: str
    split: str

    @property
    def num_classes(self) -> int:
        return len(self.class_names)


def open_source(name: str, split: str, *, data_dir: str | None = None) -> Source:
    """Opens a data set that is on this machine; never downloads and never uses the network.

    Args:
        name: `"digits"`, scikit-learn's 8x8 digits with the splits `train` (1293 examples),
            `validation` (144) and `test` (360); or `"tfds:NAME[/CONFIG][:VERSION]"`, a TensorFlow
            Datasets data set prepared as array_record, read without TensorFlow and without the
            builder's code.
        split: the split's name; for tfds anything that its split syntax allows (`"train[:90%]"`).
        data_dir: where tfds data lies. None: `$TFDS_DATA_DIR`, or `~/tensorflow_datasets`.

    Raises:
        DataError: the name or split is unknown, or the data is missing, not array_record, or
            without labelled images.
    """
    kind = name.partition(":")[0]
    if kind not in _OPENERS:
        raise DataError(f"Unknown data source {name!r}: it must be 'digits' or 'tfds:NAME'.")
    return _OPENERS[kind](name, split, data_dir)


class _ArrayExamples:
    """Examples held in memory: `images` `[examples, height, width, channels]`, `labels`."""

    def __init__(self, images: np.ndarray, labels: np.ndarray):
        self._images = images
        self._labels = labels

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"image": self._images[index], "label": int(self._labels[index])}


def _open_digits(name: str, split: str, data_dir: str | None) -> Source:
    del data_dir  # scikit-learn carries the digits in its package.
    if name != "digits":
        raise DataError(f"Unknown data source {name!r}: did you mean 'digits'?")
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


class _TfdsExamples:
    """Examples of a tfds data source of serialised records.

    Images are decoded here and not by tfds, which takes OpenCV or Pillow, whichever it finds
    (they decode JPEG differently), and leaves a grey file in an RGB data set without channels.
    """

    def __init__(self, records: Sequence[bytes], features: Any):
        self._records = records
        self._features = features

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> dict[str, Any]:
        import tensorflow_datasets as tfds

        example = self._features.deserialize_example_np(
            self._records[index], decoders={"image": tfds.decode.SkipDecoding()}
        )
        with PIL.Image.open(io.BytesIO(example["image"])) as image:
            pixels = np.asarray(preprocess.to_rgb(image))
        return {"image": pixels, "label": int(example["label"])}


def _open_tfds(name: str, split: str, data_dir: str | None) -> Source:
    import tensorflow_datasets as tfds

    builder = _tfds_builder(name, data_dir)
    info = builder.info
    formats = {file_format.value for file_format in info.available_file_formats()}
    if "array_record" not in formats:
        raise DataError(
            f"{name!r} in {info.data_dir} is prepared as {' and '.join(sorted(formats))}, but only "
            f"array_record can be read: prepare it again in another folder with `python -m "
            f"vvt_jax.prepare {name.removeprefix('tfds:')} --data_dir=...`."
        )
    features = info.features if isinstance(info.features, tfds.features.FeaturesDict) else {}
    for key, wanted in (("image", tfds.features.Image), ("label", tfds.features.ClassLabel)):
        if key not in features or not isinstance(features[key], wanted):
            raise DataError(
                f"{name!r} has no feature {key!r} of type {wanted.__name__}, only "
                f"{', '.join(features) or 'unnamed ones'}."
            )
    try:
        records = builder.as_data_source(
            split,
            deserialize_method=tfds.decode.DeserializeMethod.RAW_BYTES,
            file_format="array_record",
        )
    except (KeyError, ValueError) as error:
        raise DataError(
            f"{name!r} has no split {split!r}: it has {', '.join(info.splits)}, and parts of them "
            "like 'train[:90%]'."
        ) from error
    used = tfds.features.FeaturesDict({key: features[key] for key in ("image", "label")})
    examples = _TfdsExamples(records, used)
    # tfds gives the examples of an unlabelled test split the label -1.
    if len(examples) and examples[0]["label"] < 0:
        raise DataError(f"The examples of {name!r}, split {split!r}, have no labels.")
    return Source(examples, tuple(features["label"].names), name, split)


def _tfds_builder(name: str, data_dir: str | None) -> Any:
    """The read-only builder of a prepared data set, from its files alone.

    `tfds.builder` would run the data set's own code, if registered, and then take data that was
    never prepared for data in TFRecord files.
    """
    from tensorflow_datasets.core import read_only_builder, registered
    from tensorflow_datasets.core.utils import file_utils

    tfds_name = name.removeprefix("tfds:")
    data_dir = None if data_dir is None else os.path.expanduser(data_dir)
    try:
        return read_only_builder.builder_from_files(tfds_name, data_dir=data_dir)
    except registered.DatasetNotFoundError as error:
        places = [str(place) for place in file_utils.list_data_dirs(given_data_dir=data_dir)]
        raise DataError(
            f"The data set {name!r} was not found in {' or '.join(places)}: prepare it with "
            f"`python -m vvt_jax.prepare {tfds_name} --data_dir={places[0]}`."
        ) from error
    except ValueError as error:  # A name that is none, or data in several places.
        reason = str(error).partition("\n")[0].rstrip(".")
        raise DataError(f"The data set {name!r} can't be opened: {reason}.") from error


_OPENERS: dict[str, Callable[[str, str, str | None], Source]] = {
    "digits": _open_digits,
    "tfds": _open_tfds,
}
