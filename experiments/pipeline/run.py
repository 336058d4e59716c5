"""How fast the host feeds a model: written beside this file as JSON.

    python -m experiments.pipeline.run [rate] [contention] [startup]

The machine should do nothing else. `rate`: the published recipe at 224 pixels from 500x375 JPEG
files, beside the bare Pillow calls that it is made of, and two worker processes beside one.
`contention`: the same beside a training step, each alone and together. `startup`: how soon an epoch
of 1.28 million tiny records starts and resumes, in fresh processes (writes 0.4 GB into a temporary
folder).
"""

import contextlib
import io
import itertools
import json
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import PIL.Image
from PIL import ImageEnhance, ImageOps

from configs import imagenet
from vvt_jax.data import augment, randaugment
from vvt_jax.data.loader import train_batches
from vvt_jax.data.sources import open_source

HERE = Path(__file__).parent
_RECORD = {
    "size": [224, 224],
    "crop_fraction": 0.875,
    "interpolation": "bicubic",
    "mean": [0.485, 0.456, 0.406],
    "std": [0.229, 0.224, 0.225],
}
_FILL = (124, 116, 104)
_BICUBIC = PIL.Image.Resampling.BICUBIC
_IMAGES, _BATCH, _ROUNDS = 256, 32, 7
_RECORDS, _SHARDS = 1_281_167, 64


def rate() -> None:
    """Images a second of one thread, and of one and two worker processes."""
    fields = imagenet.get_config().augment.to_dict()
    with tempfile.TemporaryDirectory() as folder:
        _write_photos(Path(folder))
        source = open_source("folder", "train", data_dir=folder)
        paths = sorted(Path(folder).rglob("*.jpg"))
        plan = _plan(fields)
        options = {"record": _RECORD, "augment": fields, "batch_size": _BATCH, "seed": 0}

        def bare() -> float:
            start = time.perf_counter()
            for path, steps in zip(paths, plan, strict=True):
                np.asarray(_bare(path, *steps))
            return _IMAGES / (time.perf_counter() - start)

        def loader(workers: int, batches: int) -> float:
            threads = 1 if workers else 0
            stream = train_batches(source, workers=workers, threads=threads, **options)
            with contextlib.closing(stream):
                for _ in range(4 * max(1, workers)):
                    next(stream)  # workers start, and fill their buffers
                start = time.perf_counter()
                for _ in range(batches):
                    next(stream)
                return batches * _BATCH / (time.perf_counter() - start)

        rounds = [(bare(), loader(0, _IMAGES // _BATCH)) for _ in range(_ROUNDS)]
        workers = [(loader(1, 32), loader(2, 64)) for _ in range(3)]
    result = {
        "bare_images_per_second": _middle([a for a, _ in rounds]),
        "loader_images_per_second": _middle([b for _, b in rounds]),
        "loader_of_bare": _middle([b / a for a, b in rounds]),
        "one_worker_images_per_second": _middle([a for a, _ in workers]),
        "two_workers_images_per_second": _middle([b for _, b in workers]),
        "two_of_one_worker": _middle([b / a for a, b in workers]),
    }
    _write("rate", result)


def contention() -> None:
    """A worker process beside a training step that takes all cores."""
    from vvt_jax.costs.program import Program, Setting

    fields = imagenet.get_config().augment.to_dict()
    run = Program(Setting("vvt_nano", batch=16, train=True)).make_run()
    run()

    def train_until(done: threading.Event) -> float:
        start, steps = time.perf_counter(), 0
        while not done.is_set():
            run()
            steps += 1
        return 16 * steps / (time.perf_counter() - start)

    with tempfile.TemporaryDirectory() as folder:
        _write_photos(Path(folder))
        stream = train_batches(
            open_source("folder", "train", data_dir=folder),
            record=_RECORD,
            augment=fields,
            batch_size=_BATCH,
            seed=0,
            workers=1,
            threads=1,
        )
        with contextlib.closing(stream):

            def feed(seconds: float) -> float:
                for _ in range(4):
                    next(stream)
                start, batches = time.perf_counter(), 0
                while time.perf_counter() - start < seconds:
                    next(stream)
                    batches += 1
                return _BATCH * batches / (time.perf_counter() - start)

            feeding = feed(15)
            done = threading.Event()
            threading.Timer(15, done.set).start()
            training = train_until(done)  # the worker's buffers are full: it sleeps
            done = threading.Event()
            fed: list[float] = []
            feeder = threading.Thread(target=lambda: (fed.append(feed(15)), done.set()))
            feeder.start()
            training_beside = train_until(done)
            feeder.join()
    result = {
        "feeding_alone_images_per_second": feeding,
        "training_alone_images_per_second": training,
        "feeding_beside_training_images_per_second": fed[0],
        "training_beside_feeding_images_per_second": training_beside,
    }
    _write("contention", result)


_START = """
import time
began = time.perf_counter()
import sys
from vvt_jax.data.loader import train_batches
from vvt_jax.data.sources import open_source
import tensorflow_datasets, grain
imported = time.perf_counter()
source = open_source("tfds:synthetic", "train", data_dir=sys.argv[1], cache_dir=sys.argv[3])
record = {"size": [32, 32], "crop_fraction": 1.0, "interpolation": "nearest",
          "mean": [0.5] * 3, "std": [0.5] * 3}
augment = {"crop": "resize", "min_scale": 1.0, "flip": False, "shift": 0, "randaugment": "",
           "color_jitter": 0.0}
batches = train_batches(source, record=record, augment=augment, batch_size=1024, seed=0,
                        start_step=int(sys.argv[2]), threads=8)
next(batches)
first = time.perf_counter()
batches.close()
print(imported - began, first - imported)
"""


def startup() -> None:
    """Seconds to the first batch of 1024, at the start and in the middle of an epoch."""
    result = {}
    with tempfile.TemporaryDirectory() as folder:
        for file_format in ("array_record", "tfrecord"):
            root = Path(folder) / file_format
            _write_synthetic(root / "synthetic" / "1.0.0", file_format)
            for name, step in (("start", 0), ("start_again", 0), ("middle", _RECORDS // 2048)):
                runs = []
                for _ in range(1 if name == "start" else 3):
                    arguments = [str(root), str(step), str(root / "offsets")]
                    done = subprocess.run(
                        [sys.executable, "-c", _START, *arguments],
                        capture_output=True,
                        text=True,
                        check=True,
                    )
                    runs.append([float(x) for x in done.stdout.split()])
                result[f"{file_format}_{name}"] = {
                    "import_seconds": statistics.median(a for a, _ in runs),
                    "first_batch_seconds": statistics.median(b for _, b in runs),
                }
    _write("startup", result)


def _write_photos(folder: Path) -> None:
    """Parts of scikit-learn's two photographs, as JPEG files of 500x375 pixels."""
    from sklearn.datasets import load_sample_images

    photos = [PIL.Image.fromarray(photo) for photo in load_sample_images().images]
    rng = np.random.default_rng(0)
    (folder / "photos").mkdir()
    for index in range(_IMAGES):
        photo = photos[index % len(photos)]
        left, top = rng.integers(100), rng.integers(40)
        part = photo.crop((left, top, left + 520, top + 380)).resize((500, 375), _BICUBIC)
        part.save(folder / "photos" / f"{index:04}.jpg", quality=90)


def _plan(fields: dict) -> list:
    """For each image its crop, whether it is mirrored, and its two operations as Pillow calls."""
    policy = randaugment.parse(fields["randaugment"])
    plan = []
    for seed in range(_IMAGES):
        rng = np.random.default_rng(seed)
        left, top, width, height = augment._random_box(500, 375, rng, (0.08, 1.0), (3 / 4, 4 / 3))
        mirrored = rng.random() < 0.5
        operations = [
            _operation(name, randaugment.OPERATIONS[name].argument, magnitude)
            for name, magnitude in randaugment.draw(policy, rng)
        ]
        plan.append(((left, top, left + width, top + height), mirrored, operations))
    return plan


def _bare(path: Path, box: tuple, mirrored: bool, operations: list) -> PIL.Image.Image:
    image = PIL.Image.open(path).crop(box).resize((224, 224), _BICUBIC)
    if mirrored:
        image = image.transpose(PIL.Image.Transpose.FLIP_LEFT_RIGHT)
    for operation in operations:
        image = operation(image)
    return image


def _operation(name: str, argument, magnitude: float):
    """The bare Pillow call of an operation of RandAugment."""
    value = argument(magnitude) if argument else None
    simple = {
        "AutoContrast": ImageOps.autocontrast,
        "Equalize": ImageOps.equalize,
        "Invert": ImageOps.invert,
    }
    enhancers = {
        "Color": ImageEnhance.Color,
        "Contrast": ImageEnhance.Contrast,
        "Brightness": ImageEnhance.Brightness,
        "Sharpness": ImageEnhance.Sharpness,
    }
    if name in simple:
        return simple[name]
    if name == "Rotate":
        return lambda image: image.rotate(value, _BICUBIC, fillcolor=_FILL)
    if name.startswith("Posterize"):
        return lambda image: ImageOps.posterize(image, max(1, value))
    if name == "SolarizeAdd":
        table = [min(255, x + value) if x < 128 else x for x in range(256)] * 3
        return lambda image: image.point(table)
    if name.startswith("Solarize"):
        return lambda image: ImageOps.solarize(image, value)
    for prefix, enhancer in enhancers.items():
        if name.startswith(prefix):
            return lambda image: enhancer(image).enhance(value)
    matrix = {
        "ShearX": (1, value, 0, 0, 1, 0),
        "ShearY": (1, 0, 0, value, 1, 0),
        "TranslateXRel": (1, 0, value * 224, 0, 1, 0),
        "TranslateYRel": (1, 0, 0, 0, 1, value * 224),
    }[name]
    return lambda image: image.transform(
        image.size, PIL.Image.Transform.AFFINE, matrix, _BICUBIC, fillcolor=_FILL
    )


def _write_synthetic(folder: Path, file_format: str) -> None:
    """As many records as ImageNet has, of 1000 tiny images in turn."""
    import struct

    import tensorflow_datasets as tfds
    from array_record.python.array_record_module import ArrayRecordWriter
    from tensorflow_datasets.core import example_serializer

    from vvt_jax.data.sources.tfrecord import masked_crc

    features = tfds.features.FeaturesDict(
        {
            "image": tfds.features.Image(shape=(None, None, 3)),
            "label": tfds.features.ClassLabel(num_classes=1000),
        }
    )
    serializer = example_serializer.ExampleSerializer(features.get_serialized_info())
    records = []
    for label in range(1000):
        file = io.BytesIO()
        PIL.Image.new("RGB", (8, 8), (label % 256, label // 4, 0)).save(file, "PNG")
        file.seek(0)
        example = features.encode_example({"image": file, "label": label})
        records.append(serializer.serialize_example(example))
    folder.mkdir(parents=True)
    template = tfds.core.ShardedFileTemplate(
        data_dir=folder, dataset_name="synthetic", split="train", filetype_suffix=file_format
    )
    edges = [i * _RECORDS // _SHARDS for i in range(_SHARDS + 1)]
    lengths = [end - start for start, end in itertools.pairwise(edges)]
    for shard, length in enumerate(lengths):
        path = str(template.sharded_filepath(shard_index=shard, num_shards=_SHARDS))
        chosen = [records[(edges[shard] + i) % 1000] for i in range(length)]
        if file_format == "array_record":
            writer = ArrayRecordWriter(path, "group_size:1")
            for record in chosen:
                writer.write(record)
            writer.close()
        else:
            with open(path, "wb") as file:
                for record in chosen:
                    size = struct.pack("<Q", len(record))
                    file.write(size + struct.pack("<I", masked_crc(size)))
                    file.write(record + struct.pack("<I", masked_crc(record)))
    split = tfds.core.SplitInfo(
        name="train",
        shard_lengths=lengths,
        num_bytes=_RECORDS * len(records[0]),
        filename_template=template,
    )
    tfds.folder_dataset.write_metadata(
        data_dir=folder,
        features=features,
        split_infos=[split],
        version="1.0.0",
        filename_template=template,
        check_data=False,
    )


def _middle(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "least": min(values), "most": max(values)}


def _write(name: str, result: dict) -> None:
    print(json.dumps(result, indent=2))
    (HERE / f"{name}.json").write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    parts = {part.__name__: part for part in (rate, contention, startup)}
    chosen_parts = sys.argv[1:] or list(parts)
    if unknown := [name for name in chosen_parts if name not in parts]:
        sys.exit(f"error: There is no part {unknown[0]!r}: there are {', '.join(parts)}.")
    for chosen_part in chosen_parts:
        parts[chosen_part]()
