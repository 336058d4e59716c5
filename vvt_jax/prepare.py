"""Prepare a TensorFlow Datasets data set as array_record, which has random access.

    python -m vvt_jax.prepare fashion_mnist
    python -m vvt_jax.prepare imagenet2012 --manual_dir=FOLDER_OF_THE_TARS
    python -m vvt_jax.prepare ade20k --manual_dir=FOLDER_OF_THE_ZIP
    python -m vvt_jax.prepare NAME --from_tfrecord=FOLDER
    python -m vvt_jax.prepare cifar100 --download

ImageNet's archives and TFRecord copies are written shard by shard: if the command is stopped at any
point, running it again continues after the last complete shard. Data sets that tfds's own builders
prepare start from the beginning.
"""

import argparse
import dataclasses
import itertools
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tqdm import tqdm

from vvt_jax.data.examples import DataError
from vvt_jax.system import storage
from vvt_jax.system.command_line import ending_in_a_sentence
from vvt_jax.system.errors import UserError

_SHARD_BYTES = 2**27  # of examples per file, roughly


@dataclasses.dataclass(frozen=True)
class _Split:
    """The serialised examples of a split, by index, and their approximate total size in bytes."""

    name: str
    examples: int
    num_bytes: int
    get: Callable[[int], bytes]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m vvt_jax.prepare",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("name", help="of the data set, as tfds writes it")
    parser.add_argument("--data_dir", help="where it goes; default: tfds's own place")
    parser.add_argument("--manual_dir", help="files that you downloaded yourself")
    parser.add_argument("--from_tfrecord", help="tfds's data_dir that has it as TFRecord")
    parser.add_argument("--download", action="store_true", help="let tfds's builder download")
    options = parser.parse_args(arguments)
    with ending_in_a_sentence():
        folder = prepare(
            options.name,
            data_dir=options.data_dir,
            manual_dir=options.manual_dir,
            from_tfrecord=options.from_tfrecord,
            download=options.download,
        )
    print(f"{options.name} is ready in {folder}.")


def prepare(
    name: str,
    *,
    data_dir: str | None = None,
    manual_dir: str | None = None,
    from_tfrecord: str | None = None,
    download: bool = False,
) -> Path:
    """Write a data set as array_record, unless it exists already, and return its folder.

    Args:
        name: `"fashion_mnist"`, `"ade20k"` or `"imagenet2012"` (from their original files), or the
            name of any tfds data set.
        data_dir: folder in which `NAME/VERSION` is created; None: tfds's default folder.
        manual_dir: folder with ImageNet's archives, the four files of Fashion-MNIST, or ADE20K's
            archive.
        from_tfrecord: `data_dir` of an existing TFRecord copy, of any data set.
        download: whether tfds's builder may use the network.

    Raises:
        UserError: a source is missing or damaged, or there is too little disk space; the message is
            one sentence.
    """
    import tensorflow_datasets as tfds

    for flag, place in (
        ("data_dir", data_dir),
        ("manual_dir", manual_dir),
        ("from_tfrecord", from_tfrecord),
    ):
        if place and storage.is_remote(place):
            raise DataError(
                f"--{flag}={place}: data is prepared on this machine: give a folder, and copy the "
                "result afterwards."
            )
    root = Path(data_dir or tfds.core.constants.DATA_DIR).expanduser()
    if from_tfrecord:
        return _from_tfrecord(name, root, Path(from_tfrecord).expanduser())
    if name == "fashion_mnist":
        return _fashion_mnist(root, manual_dir)
    if name == "ade20k":
        return _ade20k(root, manual_dir)
    if name == "imagenet2012" and manual_dir:
        return _imagenet(root, Path(manual_dir).expanduser())
    if name == "imagenet2012":
        raise DataError("imagenet2012 needs --manual_dir, the folder of its two archives.")
    if not download:
        raise DataError(
            f"There is nothing to make {name} of: give --from_tfrecord, or let tfds download it "
            "with --download."
        )
    return _by_tfds(name, root)


def _fashion_mnist(root: Path, manual_dir: str | None) -> Path:
    from vvt_jax.data.builders import fashion_mnist

    given = Path(manual_dir).expanduser() if manual_dir else fashion_mnist.PACKAGED
    for names in fashion_mnist.FILES.values():
        for file in names:
            fashion_mnist.read_idx(given, file)  # reports errors before anything is written
    return _run_builder(
        lambda: fashion_mnist.FashionMnist(
            manual_dir=given, data_dir=os.fspath(root), file_format="array_record"
        )
    )


def _ade20k(root: Path, manual_dir: str | None) -> Path:
    from vvt_jax.data.builders import ade20k

    if not manual_dir:
        raise DataError(
            f"ade20k needs --manual_dir, the folder of ADEChallengeData2016.zip: download "
            f"{ade20k.URL}."
        )
    return _run_builder(
        lambda: ade20k.Ade20k(
            manual_dir=Path(manual_dir).expanduser(),
            data_dir=os.fspath(root),
            file_format="array_record",
        )
    )


def _by_tfds(name: str, root: Path) -> Path:
    import tensorflow_datasets as tfds

    return _run_builder(
        lambda: tfds.builder(name, data_dir=os.fspath(root), file_format="array_record")
    )


def _run_builder(make: Callable[[], Any]) -> Path:
    import tensorflow_datasets as tfds

    try:
        builder = make()
        builder.download_and_prepare(
            download_config=tfds.download.DownloadConfig(try_download_gcs=False)
        )
    except UserError:
        raise
    except ImportError as error:
        raise DataError(
            f"tfds's builder needs a package that is not installed ({error}): install it, such as "
            "tensorflow-cpu."
        ) from error
    except Exception as error:  # builders raise errors of any type
        reason = str(error).strip().partition("\n")[0][:200].rstrip(".")
        raise DataError(f"tfds could not prepare it ({type(error).__name__}: {reason}).") from error
    return Path(builder.data_dir)


def _imagenet(root: Path, archives: Path) -> Path:
    from tensorflow_datasets.core import example_serializer

    from vvt_jax.data.builders import ilsvrc2012

    folder = root / ilsvrc2012.NAME / ilsvrc2012.VERSION
    if folder.exists():
        return folder
    features = ilsvrc2012.features()
    serializer = example_serializer.ExampleSerializer(features.get_serialized_info())

    def split(name: str, images: ilsvrc2012.Images) -> _Split:
        def get(index: int) -> bytes:
            example = serializer.get_tf_example(features.encode_example(images[index]))
            # By default, the order of the fields differs between processes
            return example.SerializeToString(deterministic=True)

        return _Split(name, len(images), images.num_bytes, get)

    opened = ilsvrc2012.open_archives(archives)
    splits = [split(name, images) for name, images in opened.items()]
    return _write(
        folder, ilsvrc2012.NAME, splits, features, "ImageNet ILSVRC2012, of its original archives."
    )


def _from_tfrecord(name: str, root: Path, given: Path) -> Path:
    from vvt_jax.data.sources.prepared import open_builder
    from vvt_jax.data.sources.tfrecord import TFRecords

    info = open_builder(name, os.fspath(given)).info
    if info.file_format is None or info.file_format.value != "tfrecord":
        raise DataError(f"{name!r} in {info.data_dir} is not in TFRecord.")
    base, *config = name.partition(":")[0].split("/")
    folder = root.joinpath(base, *config, str(info.version))
    if folder.exists() and folder != Path(info.data_dir):
        return folder
    if folder.exists():
        raise DataError(f"{folder} is the copy itself: give another --data_dir.")
    splits = []
    for split in info.splits.values():
        parts = [
            (str(p.filename), p.skip, p.take, p.examples_in_shard) for p in split.file_instructions
        ]
        records = TFRecords(parts)
        splits.append(_Split(split.name, len(records), split.num_bytes, records.__getitem__))
    return _write(folder, base, splits, info.features, info.description)


def _write(folder: Path, name: str, splits: list[_Split], features: Any, description: str) -> Path:
    """Write the shards that are still missing, then the metadata, then rename the folder.

    A shard gets its name once it is complete, and so does the folder: whatever a killed process
    leaves behind is never mistaken for data.
    """
    import tensorflow_datasets as tfds

    growing = folder.with_name(f"{folder.name}.incomplete")
    template = tfds.core.ShardedFileTemplate(
        data_dir=growing, dataset_name=name, filetype_suffix="array_record"
    )
    infos, missing, needed = [], [], 0
    try:
        growing.mkdir(parents=True, exist_ok=True)
        for split in splits:
            count = max(1, -(-split.num_bytes // _SHARD_BYTES))
            edges = [i * split.examples // count for i in range(count + 1)]
            lengths = [end - start for start, end in itertools.pairwise(edges)]
            filled = dataclasses.replace(template, split=split.name)
            for shard, (start, length) in enumerate(zip(edges, lengths, strict=False)):
                path = Path(filled.sharded_filepath(shard_index=shard, num_shards=count))
                if not path.exists():
                    missing.append((path, split, start, length))
                    needed += split.num_bytes * length // max(1, split.examples)
            infos.append(
                tfds.core.SplitInfo(
                    name=split.name,
                    shard_lengths=lengths,
                    num_bytes=split.num_bytes,
                    filename_template=filled,
                )
            )
        _check_space(growing, needed)
        total = sum(split.examples for split in splits)
        done = total - sum(length for *_, length in missing)
        with tqdm(total=total, initial=done, unit="example", desc=name) as bar:
            for path, split, start, length in missing:
                _write_shard(path, (split.get(i) for i in range(start, start + length)), bar)
        tfds.folder_dataset.write_metadata(
            data_dir=growing,
            features=features,
            split_infos=infos,
            version=folder.name,
            filename_template=template,
            check_data=False,
            description=description,
        )
        growing.rename(folder)
    except OSError as error:
        raise DataError(
            f"{error.filename or growing} can't be written: {error.strerror}."
        ) from error
    return folder


def _write_shard(path: Path, records: Any, bar: tqdm) -> None:
    from array_record.python.array_record_module import ArrayRecordWriter

    temporary = path.with_name(path.name + ".tmp")
    written = 0
    writer = ArrayRecordWriter(os.fspath(temporary), "group_size:1")
    try:
        for record in records:
            writer.write(record)
            written += len(record)
            bar.update()
        writer.close()
    except UserError:
        raise
    except Exception as error:  # the writer raises many types, which seldom say what is wrong
        raise _failed(path, written, error) from error
    if temporary.stat().st_size < written // 2:  # the writer does not report every failed write
        raise _failed(path, written, None)
    temporary.replace(path)


def _failed(path: Path, written: int, error: Exception | None) -> DataError:
    free = shutil.disk_usage(path.parent).free
    reason = f"{type(error).__name__}" if error else "the file is too short"
    return DataError(
        f"{path} can't be written ({reason}; {free / 1e9:.2f} GB are free, it needs more than "
        f"{written / 1e9:.2f} GB): make room, and the same command goes on from there."
    )


def _check_space(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise DataError(
            f"{folder} needs {needed / 1e9:.2f} GB, but {free / 1e9:.2f} GB are free: make room, "
            "or give another --data_dir."
        )


if __name__ == "__main__":
    main()
