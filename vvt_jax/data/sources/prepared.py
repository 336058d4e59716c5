"""Data sets that TensorFlow Datasets prepared as array_record or TFRecord, without TensorFlow."""

import contextlib
import io
import json
import os
import threading
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vvt_jax.data.examples import DataError, Source
from vvt_jax.data.image_files import decode
from vvt_jax.data.imagenet import readable_class_names
from vvt_jax.data.sources.folder_segmentation import decode_mask
from vvt_jax.data.sources.tfrecord import TFRecords
from vvt_jax.system import storage
from vvt_jax.system.storage import AnyPath, SizeLimit

_OWN_FEATURES = "tensorflow_datasets.core.features."
_IMPORT_LOCK = threading.Lock()  # held while tfds's lookup of feature classes is replaced


class _PreparedExamples:
    """Examples from serialised records.

    Images are decoded here rather than by tfds. It would use OpenCV or Pillow, whichever it finds,
    which decode JPEG differently, and would return a grey file in an RGB data set without channels.
    """

    def __init__(
        self,
        records: Sequence[bytes],
        parts: Sequence[tuple[str, int]],
        features: Any,
        label: str,
        told: str,
        upright: bool,
    ):
        """Take `parts` as (path, number of records) of each file, in the order of the records."""
        self._records = records
        self._files = [path for path, _ in parts]
        self._ends = np.cumsum([count for _, count in parts])
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
        """Return the example with its image as encoded in the record."""
        import tensorflow_datasets as tfds

        decoders = {key: tfds.decode.SkipDecoding() for key in self._decoders}
        try:
            record = self._records[index]
            example = self._features.deserialize_example_np(record, decoders=decoders)
            for key, value in example.items():
                if value is None or (key in self._decoders and not isinstance(value, bytes)):
                    raise ValueError(f"the feature {key!r} is missing")
            return example
        except DataError:
            raise
        except Exception as error:  # array_record, protobuf and tfds raise errors of many kinds
            file = self._files[int(np.searchsorted(self._ends, index, side="right"))]
            raise DataError(
                f"{file} is damaged: the record of {self.describe(index)} can't be read "
                f"({_reason(error)}); copy or prepare the file again."
            ) from error

    def describe(self, index: int) -> str:
        """Return the number and the data set; only the record itself contains a file name."""
        return f"Image {index} of {self._told}"

    def __getitem__(self, index: int) -> dict[str, Any]:
        example = self.encoded(index)
        told = self.describe(index)
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
        return {"image": decode(file, told, upright=self._upright), "label": label}

    def mask(self, index: int) -> np.ndarray:
        """Return only the mask of an example whose pixels have labels: uint8 `[height, width]`."""
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
) -> Source:
    """Open a split of a data set that tfds has prepared; see `sources.open_source`.

    `label` is the name of the feature that holds the label. With `several`, the feature holds any
    number of labels, and the `label` of each example is int64 `[labels]`.
    """
    import tensorflow_datasets as tfds

    builder = open_builder(name, data_dir)
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
    if "array_record" in formats and str(info.data_dir).startswith("s3://"):
        raise DataError(
            f"{name!r} in {info.data_dir} is array_record, which is read from folders and gs:// "
            "only: copy it there, or give a copy in TFRecord."
        )
    try:
        parts = info.splits[split].file_instructions
    except Exception as error:  # tfds's own errors, and any that a damaged description causes
        if split in info.splits:
            raise DataError(
                f"The description of {name!r} in {info.data_dir} is damaged ({_reason(error)}): "
                "copy or prepare the data again."
            ) from error
        raise DataError(
            f"{name!r} has no split {split!r}: it has {', '.join(info.splits)}, and parts of them "
            "like 'train[:90%]'."
        ) from error
    if "array_record" in formats:
        records = _open_array_records(builder, split, [str(p.filename) for p in parts])
    else:
        records = TFRecords(
            [(str(p.filename), p.skip, p.take, p.examples_in_shard) for p in parts], cache_dir
        )
    counts = [(str(p.filename), p.take) for p in parts]
    if len(records) != sum(count for _, count in counts):
        raise DataError(
            f"{name!r} in {info.data_dir} has {len(records)} records in split {split!r} where its "
            f"description has {sum(count for _, count in counts)}: copy or prepare it again."
        )
    used = tfds.features.FeaturesDict(
        {key: features[key] for key in ("image", label, "file_name") if key in features}
    )
    told = f"{name!r}, split {split!r}"
    examples = _PreparedExamples(records, counts, used, label, told, upright)
    # In tfds, the examples of an unlabelled test split have the label -1.
    if not pixels and len(examples) and np.any(np.asarray(examples.encoded(0)[label]) < 0):
        raise DataError(f"The examples of {name!r}, split {split!r}, have no labels.")
    names = readable_class_names(found[label].names)
    return Source(examples, names, name, split, pixels=pixels)


def _open_array_records(builder: Any, split: str, files: Sequence[str]) -> Sequence[bytes]:
    """Open the records of a split.

    Raises:
        DataError: if a file can't be opened. The message names the file, if it can be determined.
    """
    import tensorflow_datasets as tfds
    from array_record.python.array_record_module import ArrayRecordReader

    try:
        return builder.as_data_source(
            split,
            deserialize_method=tfds.decode.DeserializeMethod.RAW_BYTES,
            file_format="array_record",
        )
    except Exception as error:  # of many kinds, which often don't name the file
        for file in files:
            try:
                ArrayRecordReader(file).close()
            except Exception as reason:
                raise DataError(
                    f"{file} is damaged or missing ({_reason(reason)}): copy or prepare it again."
                ) from error
        raise DataError(
            f"The files of {builder.info.data_dir} can't be read ({_reason(error)}): copy or "
            "prepare them again."
        ) from error


def _reason(error: Exception) -> str:
    text = str(error).strip().partition("\n")[0]
    return ascii(text)[1:-1][:200].rstrip(".") or type(error).__name__


def open_builder(name: str, data_dir: str | None) -> Any:
    """Open the read-only builder of a prepared data set from its files alone.

    `tfds.builder` would run the data set's own code, if that is registered, and would then mistake
    data that was never prepared for data in TFRecord files.

    Raises:
        DataError: if the data set does not exist, or the files that describe it are damaged or name
            classes that are not tfds's own.
    """
    from tensorflow_datasets.core import read_only_builder, registered
    from tensorflow_datasets.core.utils import file_utils

    tfds_name = name.removeprefix("tfds:")
    if data_dir is not None:
        data_dir = os.fspath(storage.locate(data_dir).expanduser())
    places = [str(place) for place in file_utils.list_data_dirs(given_data_dir=data_dir)]
    folders = [
        Path(place, tfds_name.partition(":")[0].partition("/")[0])
        for place in places
        if not storage.is_remote(place)
    ]
    try:
        _check_files(folders)
        with _own_feature_classes_only():
            return read_only_builder.builder_from_files(tfds_name, data_dir=data_dir)
    except DataError:
        raise
    except registered.DatasetNotFoundError as error:
        raise DataError(
            f"The data set {name!r} was not found in {' or '.join(places)}: prepare it with "
            f"`python -m vvt_jax.prepare {tfds_name} --data_dir={places[0]}`."
        ) from error
    except Exception as error:  # an invalid name, data in several places, or damaged files
        _check_json(folders)
        raise DataError(f"The data set {name!r} can't be opened: {_reason(error)}.") from error


def _check_files(folders: Iterable[Path]) -> None:
    """Check that all files can be opened, because tfds would wait forever for a pipe, for example.

    Raises:
        DataError: if a file can't be opened.
    """
    for path in _files_below(folders):
        described = path.suffix in (".json", ".txt")
        try:
            storage.open_file(path, SizeLimit.DESCRIPTION if described else None).close()
        except OSError as error:
            raise DataError(f"{path} can't be read: {error.strerror}.") from error


def _check_json(folders: Iterable[Path]) -> None:
    """Check the files that describe a data set.

    Raises:
        DataError: if such a file is missing or damaged. The message names the first one.
    """
    for path in _files_below(folders):
        if path.name == "features.json" and not path.with_name("dataset_info.json").exists():
            raise DataError(
                f"{path.with_name('dataset_info.json')} is missing: copy or prepare the data again."
            )
        if path.suffix == ".json":
            try:
                content = json.loads(storage.read_text(path, SizeLimit.DESCRIPTION))
                if not isinstance(content, dict):
                    raise ValueError("it is not a JSON object")
            except (ValueError, RecursionError) as error:
                raise DataError(
                    f"{path} is damaged ({_reason(error)}): copy or prepare the data again."
                ) from error


def _files_below(folders: Iterable[Path]) -> Iterator[Path]:
    for folder in folders:
        for place, _, names in os.walk(folder):
            yield from (Path(place, name) for name in sorted(names))


@contextlib.contextmanager
def _own_feature_classes_only() -> Iterator[None]:
    """Allow tfds to create features of its own classes only.

    Otherwise it would import any module that the files of a data set name, and could so run a
    Python file in the working folder.
    """
    from tensorflow_datasets.core.features import feature

    connector = feature.FeatureConnector
    with _IMPORT_LOCK:
        original = connector.__dict__["cls_from_name"]

        def cls_from_name(cls: type, python_class_name: str) -> type:
            if not python_class_name:
                raise ValueError("a feature has no class")
            if not python_class_name.startswith(_OWN_FEATURES):
                raise DataError(
                    f"The data set has a feature of the class {ascii(python_class_name)[:100]}: "
                    "only tfds's own classes are allowed, since another one would run code that "
                    "comes with the data."
                )
            return original.__func__(cls, python_class_name)

        connector.cls_from_name = classmethod(cls_from_name)
        try:
            yield
        finally:
            connector.cls_from_name = original
