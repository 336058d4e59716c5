"""Data sets that TensorFlow Datasets prepared, as array_record or TFRecord, without TensorFlow."""

import io
import os
from collections.abc import Sequence
from typing import Any

import numpy as np

from vvt_jax import storage
from vvt_jax.data import sources
from vvt_jax.data.folder_segmentation import decode_mask
from vvt_jax.data.imagenet import readable_class_names
from vvt_jax.data.sources import DataError
from vvt_jax.data.tfrecord import TFRecords
from vvt_jax.storage import AnyPath


class _PreparedExamples:
    """Examples of serialised records.

    Images are decoded here and not by tfds, which takes OpenCV or Pillow, whichever it finds
    (they decode JPEG differently), and leaves a grey file in an RGB data set without channels.
    """

    def __init__(
        self, records: Sequence[bytes], features: Any, label: str, told: str, upright: bool
    ):
        self._records = records
        self._features = features
        self._label = label
        self._told = told
        self._upright = upright
        label_feature = features["segmentation" if "segmentation" in features else label]
        self._num_classes = getattr(label_feature, "feature", label_feature).num_classes
        self._decoders = [key for key in ("image", "segmentation") if key in features]

    def __len__(self) -> int:
        return len(self._records)

    def encoded(self, index: int) -> dict[str, Any]:
        """The example with its image as it lies in the record."""
        import tensorflow_datasets as tfds

        return self._features.deserialize_example_np(
            self._records[index],
            decoders={key: tfds.decode.SkipDecoding() for key in self._decoders},
        )

    def __getitem__(self, index: int) -> dict[str, Any]:
        example = self.encoded(index)
        told = f"Image {index} of {self._told}"
        if "file_name" in example:
            told += f" ({bytes(example['file_name']).decode(errors='replace')})"
        if "segmentation" in self._features:
            label: Any = self._mask(example, told)
        else:
            labels = np.asarray(example[self._label], np.int64)
            wrong = labels[(labels < 0) | (labels >= self._num_classes)]
            if wrong.size:
                raise DataError(
                    f"{told} has the label {wrong.flat[0]}, but there are {self._num_classes} "
                    "classes, from 0 on: prepare the data again without such examples."
                )
            label = labels if labels.ndim else int(labels)
        file = io.BytesIO(example["image"])
        return {"image": sources.decode(file, told, upright=self._upright), "label": label}

    def mask(self, index: int) -> np.ndarray:
        """The mask alone, of examples whose pixels have labels: uint8 `[height, width]`."""
        return self._mask(self.encoded(index), f"Image {index} of {self._told}")

    def _mask(self, example: dict[str, Any], told: str) -> np.ndarray:
        classes = self._features["segmentation"].num_classes
        file = io.BytesIO(example["segmentation"])
        return decode_mask(file, f"The mask of {told}", classes, upright=self._upright)


def open_prepared(
    name: str,
    split: str,
    data_dir: str | None,
    cache_dir: AnyPath | None,
    *,
    label: str = "label",
    several: bool = False,
    upright: bool = True,
) -> sources.Source:
    """A split of a data set that tfds prepared; see `sources.open_source`.

    `label` is the feature that holds the label. With `several` it holds any number of them, and so
    do the examples: `label` is int64 `[labels]`.
    """
    import tensorflow_datasets as tfds

    builder = _builder(name, data_dir)
    info = builder.info
    formats = {file_format.value for file_format in info.available_file_formats()}
    if not formats & {"array_record", "tfrecord"}:
        why = " (its reader loses rows)" if "parquet" in formats else ""
        raise DataError(
            f"{name!r} in {info.data_dir} is prepared as {' and '.join(sorted(formats))}{why}, but "
            f"only array_record and tfrecord can be read: prepare it again in another folder with "
            f"`python -m vvt_jax.prepare {name.removeprefix('tfds:')} --data_dir=...`."
        )
    features = info.features if isinstance(info.features, tfds.features.FeaturesDict) else {}
    pixels = "segmentation" in features
    if pixels:
        label = "segmentation"
    kind = tfds.features.LabeledImage if pixels else tfds.features.ClassLabel
    found = {key: features[key] for key in ("image", label) if key in features}
    if several and isinstance(found.get(label), tfds.features.Sequence):
        found[label] = found[label].feature
    for key, wanted in (("image", tfds.features.Image), (label, kind)):
        if not isinstance(found.get(key), wanted):
            raise DataError(
                f"{name!r} has no feature {key!r} of type {wanted.__name__}, only "
                f"{', '.join(features) or 'unnamed ones'}."
            )
    try:
        if "array_record" in formats:
            if str(info.data_dir).startswith("s3://"):
                raise DataError(
                    f"{name!r} in {info.data_dir} is array_record, which is read from folders and "
                    "gs:// only: copy it there, or give a copy in TFRecord."
                )
            records = builder.as_data_source(
                split,
                deserialize_method=tfds.decode.DeserializeMethod.RAW_BYTES,
                file_format="array_record",
            )
        else:
            parts = info.splits[split].file_instructions
    except (KeyError, ValueError) as error:
        raise DataError(
            f"{name!r} has no split {split!r}: it has {', '.join(info.splits)}, and parts of them "
            "like 'train[:90%]'."
        ) from error
    if "array_record" not in formats:
        records = TFRecords(
            [(str(p.filename), p.skip, p.take, p.examples_in_shard) for p in parts], cache_dir
        )
    used = tfds.features.FeaturesDict(
        {key: features[key] for key in ("image", label, "file_name") if key in features}
    )
    examples = _PreparedExamples(records, used, label, f"{name!r}, split {split!r}", upright)
    # tfds gives the examples of an unlabelled test split the label -1.
    if not pixels and len(examples) and np.any(np.asarray(examples.encoded(0)[label]) < 0):
        raise DataError(f"The examples of {name!r}, split {split!r}, have no labels.")
    names = readable_class_names(found[label].names)
    return sources.Source(examples, names, name, split, pixels=pixels)


def _builder(name: str, data_dir: str | None) -> Any:
    """The read-only builder of a prepared data set, from its files alone.

    `tfds.builder` would run the data set's own code, if registered, and then take data that was
    never prepared for data in TFRecord files.
    """
    from tensorflow_datasets.core import read_only_builder, registered
    from tensorflow_datasets.core.utils import file_utils

    tfds_name = name.removeprefix("tfds:")
    if data_dir is not None:
        data_dir = os.fspath(storage.locate(data_dir).expanduser())
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
