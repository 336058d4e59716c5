"""Sound files of every kind that the program reads, and ways to damage them.

Each `prepare` of a case returns a function without arguments: the reader, on files that are damaged
already, so that the damage itself is not measured.
"""

import hashlib
import io
import itertools
import json
import pickletools
import shutil
import struct
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
from flax.traverse_util import unflatten_dict

import vvt_jax
from configs import digits
from vvt_jax import convert
from vvt_jax import prepare as prepare_lib
from vvt_jax.data import pixel_labels, preprocess, sources
from vvt_jax.data.image_files import decode
from vvt_jax.data.sources import folder_segmentation
from vvt_jax.data.sources.tfrecord import masked_crc, read_offsets
from vvt_jax.inference.predictor import Predictor
from vvt_jax.models.shapes import variable_shapes
from vvt_jax.system.errors import UserError
from vvt_jax.training import configuration
from vvt_jax.weights import pretrained, torch_files
from vvt_jax.weights.inference_settings import check_inference
from vvt_jax.weights.published import read_published
from vvt_jax.weights.torch_pickle import Tensor

Reader = Callable[[], Any]
_FIELDS = {"embed_dims": (8, 8, 8, 8), "num_heads": (1, 1, 1, 1), "num_classes": 3}
_RECORD = {
    "size": [32, 32],
    "crop_fraction": 0.875,
    "interpolation": "bicubic",
    "mean": [0.5, 0.5, 0.5],
    "std": [0.5, 0.5, 0.5],
}
_INFERENCE = {"short_side": 64, "window": [64, 64], "stride": 0, "scales": [1.0], "flip": False}
_SEGMENTATION = {"scale": (0.5, 2.0), "class_share": 0.75, "flip": True, "photometric": True}
_CLASSES = ["red", "green", "blue"]
# Values that a field of JSON may have, none of which is meant
_VALUES: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2, 255, 2**31, 2**40, 2**63, -(2**63), 10**30, 1e-320, 0.5, -0.5,
    1e308, float("nan"), float("inf"), float("-inf"), "", "x", "\ud800", "a\nb", "../x", "\x1b[2J",
    [], [0], [1] * 4, [[]], {}, {"a": 1}, ["x"] * 3, "x" * 10_000, [1] * 10_000,
)  # fmt: skip
_NUMBERS = (0, 1, 2, 3, 7, 127, 128, 255, 2**15, 2**16, 2**24, 2**31 - 1, 2**31, 2**32 - 1)
_LONG_NUMBERS = (*_NUMBERS, 2**32, 2**62, 2**63 - 1, 2**63, 2**64 - 1, -1, -(2**63))


class SoundFiles:
    """Files that can be read, and a folder for copies of them that can't."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.case = folder / "case"
        model = vvt_jax.create_model("vvt_nano", **_FIELDS)
        rng = np.random.default_rng(0)
        flat = {
            name: rng.normal(scale=0.2, size=shape).astype(np.float32)
            for name, shape in variable_shapes(model).items()
        }
        variables = unflatten_dict(flat, sep="/")
        card = {"preprocessing": _RECORD, "class_names": _CLASSES, "inference": _INFERENCE}
        self.model = folder / "model"
        pretrained.save_pretrained(self.model, model, variables, card)
        self.pth = folder / "model.pth"
        torch_files.write_file(self.pth, convert.to_pytorch(variables, model))
        with zipfile.ZipFile(self.pth) as archive:
            self.entries = {name: archive.read(name) for name in archive.namelist()}
        read_published(self.pth, num_heads=_FIELDS["num_heads"])  # what is done only once
        Predictor(self.model, batch_size=1)
        self.images = _images()
        self.masks = _masks()
        self.records = self._write_records(folder / "array_record")
        self.tfrecords = self._as_tfrecord(folder / "tfrecord")

    def _write_records(self, root: Path) -> Path:
        """A data set of eight small images, as array_record."""
        import tensorflow_datasets as tfds
        from tensorflow_datasets.core import example_serializer

        features = tfds.features.FeaturesDict(
            {
                "image": tfds.features.Image(shape=(None, None, 3), encoding_format="png"),
                "label": tfds.features.ClassLabel(names=_CLASSES),
                "file_name": tfds.features.Text(),
            }
        )
        serializer = example_serializer.ExampleSerializer(features.get_serialized_info())
        content = []
        for i in range(8):
            image = np.random.default_rng(i).integers(256, size=(8, 9, 3), dtype=np.uint8)
            example = {"image": _encode(PIL.Image.fromarray(image), "PNG"), "label": i % 3}
            encoded = features.encode_example({**example, "file_name": f"{i}.png"})
            content.append(serializer.get_tf_example(encoded).SerializeToString())
        split = prepare_lib._Split("train", 8, sum(map(len, content)), content.__getitem__)
        prepare_lib._write(root / "squares" / "1.0.0", "squares", [split], features, "Squares.")
        self.content = content
        return root

    def _as_tfrecord(self, root: Path) -> Path:
        shutil.copytree(self.records, root)
        folder = root / "squares" / "1.0.0"
        (path,) = folder.glob("*.array_record*")
        path.unlink()
        _write_tfrecord(folder / path.name.replace("array_record", "tfrecord"), self.content)
        info = json.loads((folder / "dataset_info.json").read_text())
        (folder / "dataset_info.json").write_text(json.dumps({**info, "fileFormat": "tfrecord"}))
        return root

    def copy(self, source: Path) -> Path:
        """A copy of a file or folder, in place of that of the case before."""
        if self.case.exists():
            shutil.rmtree(self.case)
        self.case.mkdir()
        target = self.case / source.name
        if source.is_dir():
            shutil.copytree(source, target)
        else:
            shutil.copy(source, target)
        return target

    def write(self, name: str, content: bytes) -> Path:
        """A file in place of what the case before had."""
        if self.case.exists():
            shutil.rmtree(self.case)
        self.case.mkdir()
        (self.case / name).write_bytes(content)
        return self.case / name


def prepare(files: SoundFiles, kind: str, seed: int, number: int) -> Reader:
    """The reader of a case, on what the case has damaged."""
    return _PREPARE[kind](files, np.random.default_rng([seed, number]))


def damage_bytes(content: bytes, rng: np.random.Generator) -> bytes:
    """A few bytes changed, cut off, put in, repeated or set to numbers that often matter."""
    damaged = bytearray(content)
    for _ in range(int(rng.integers(1, 4))):
        if not damaged:
            break
        place = int(rng.integers(len(damaged)))
        length = int(min(rng.geometric(0.05), len(damaged) - place))
        match int(rng.integers(8)):
            case 0:
                damaged[place] ^= 1 << int(rng.integers(8))
            case 1:
                damaged[place : place + length] = rng.bytes(length)
            case 2:
                del damaged[place:]
            case 3:
                del damaged[place : place + length]
            case 4:
                damaged[place:place] = rng.bytes(length)
            case 5:
                damaged[place:place] = damaged[place : place + length] * int(rng.integers(1, 50))
            case 6:
                value = int(rng.choice(_NUMBERS))
                damaged[place : place + 4] = struct.pack(str(rng.choice(["<I", ">I"])), value)
            case _:
                value = _LONG_NUMBERS[int(rng.integers(len(_LONG_NUMBERS)))] % 2**64
                damaged[place : place + 8] = struct.pack(str(rng.choice(["<Q", ">Q"])), value)
    return bytes(damaged)


def damage_value(value: Any, rng: np.random.Generator) -> Any:
    """JSON with one value in it replaced, removed, renamed or nested."""
    if isinstance(value, dict) and value and rng.random() < 0.93:
        key = list(value)[int(rng.integers(len(value)))]
        changed = dict(value)
        match int(rng.integers(12)):
            case 0:
                del changed[key]
            case 1:
                changed[f"{key}x"] = changed.pop(key)
            case 2:
                changed["new"] = _VALUES[int(rng.integers(len(_VALUES)))]
            case _:
                changed[key] = damage_value(changed[key], rng)
        return changed
    if isinstance(value, list | tuple) and value and rng.random() < 0.7:
        place = int(rng.integers(len(value)))
        items = list(value)
        match int(rng.integers(5)):
            case 0:
                del items[place]
            case 1:
                items.append(items[place])
            case _:
                items[place] = damage_value(items[place], rng)
        return items
    if isinstance(value, int | float) and not isinstance(value, bool) and rng.random() < 0.3:
        return [value + 1, -value, value * 1000, value / 1000, str(value), [value]][rng.integers(6)]
    if rng.random() < 0.02:
        for _ in range(int(rng.choice([10, 400]))):
            value = [value]
        return value
    return _VALUES[int(rng.integers(len(_VALUES)))]


def _pth_bytes(files: SoundFiles, rng: np.random.Generator) -> Reader:
    content = files.pth.read_bytes()
    if rng.random() < 0.5:  # the directory and the pickle, in which most bytes matter
        start = content.index(b"PK\x01\x02")
        end = content.index(b"archive/byteorder")
        if rng.random() < 0.5:
            content = content[:start] + damage_bytes(content[start:], rng)
        else:
            content = damage_bytes(content[:end], rng) + content[end:]
    else:
        content = damage_bytes(content, rng)
    return _read_pth(files, content, rng)


def _pth_opcodes(files: SoundFiles, rng: np.random.Generator) -> Reader:
    program = files.entries["archive/data.pkl"]
    starts = [place for _, _, place in pickletools.genops(program)] + [len(program)]
    steps = [program[a:b] for a, b in itertools.pairwise(starts)]
    if rng.random() < 0.5:  # a short one, in which each step matters
        end = next(i for i, step in enumerate(steps) if step.startswith(b"R") and i > 20)
        steps = [*steps[: end + 1], b"s", steps[-1]]
        steps.pop(3)  # the mark
    pieces = [
        b"q\x05", b"h\x05", b")", b"]", b"}", b"(", b"t", b"\x85", b"\x86", b"\x87", b"a", b"e",
        b"s", b"u", b"R", b"b", b"\x81", b"N", b"\x88", b"\x89", b"Q", b"G" + bytes(8), b"0", b"2",
        b"ccollections\nOrderedDict\n", b"cargparse\nNamespace\n", b"cos\nsystem\n",
        b"ctorch._utils\n_rebuild_parameter\n", b"ctorch\nBoolStorage\n", b"X\x01\x00\x00\x00a",
        b"ctorch\nDoubleStorage\n", b"\x8c\x01a", b"h\x00\x86" * 40, b"\x93", b"\x94", b"K\x00",
    ]  # fmt: skip
    for _ in range(int(rng.integers(1, 5))):
        place = int(rng.integers(len(steps)))
        match int(rng.integers(7)):
            case 0:
                steps[place] = b""
            case 1:
                steps[place:place] = [steps[int(rng.integers(len(steps)))]]
            case 2:
                steps[place] = pieces[int(rng.integers(len(pieces)))]
            case 3:
                steps[place:place] = [pieces[int(rng.integers(len(pieces)))]]
            case 4:
                length = int(rng.integers(1, 30))
                steps[place:place] = steps[place : place + length] * int(rng.integers(1, 100))
            case _:
                numbers = [i for i, step in enumerate(steps) if step[:1] in (b"J", b"K", b"M")]
                if numbers:
                    value = _LONG_NUMBERS[int(rng.integers(len(_LONG_NUMBERS)))]
                    content = value.to_bytes(9, "little", signed=True)
                    steps[int(rng.choice(numbers))] = b"\x8a\x09" + content
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        for name, entry in files.entries.items():
            archive.writestr(name, b"".join(steps) if name.endswith("data.pkl") else entry)
    return _read_pth(files, content.getvalue(), rng)


def _read_pth(files: SoundFiles, content: bytes, rng: np.random.Generator) -> Reader:
    path = files.write("model.pth", content)
    if rng.random() < 0.1:
        return lambda: read_published(path, num_heads=(1, 1, 1, 1))

    def read() -> int:
        waiting, total = [torch_files.read_file(path)], 0
        for _ in range(10_000):
            if not waiting:
                break
            value = waiting.pop()
            if isinstance(value, Tensor):
                array = value.read()
                assert array.shape == value.shape
                total += int(np.nansum(array.astype(np.float32) != 0))  # touches all of it
            elif isinstance(value, dict):
                waiting += value.values()
            elif isinstance(value, list | tuple):
                waiting += value
        return total

    return read


def _model_folder(files: SoundFiles, rng: np.random.Generator) -> Reader:
    folder = files.copy(files.model)
    config, weights = folder / "config.json", folder / "model.safetensors"
    match int(rng.integers(6)):
        case 0:
            config.write_bytes(damage_bytes(config.read_bytes(), rng))
        case 1:
            weights.write_bytes(damage_bytes(weights.read_bytes(), rng))
        case 2:  # with the sum of what is there
            content = weights.read_bytes()
            length = 8 + int.from_bytes(content[:8], "little")
            if rng.random() < 0.7:
                content = damage_bytes(content[:length], rng) + content[length:]
            else:
                content = damage_bytes(content, rng)
            weights.write_bytes(content)
            described = json.loads(config.read_text())
            described["sha256"] = hashlib.sha256(content).hexdigest()
            config.write_text(json.dumps(described))
        case _:
            described = damage_value(json.loads(config.read_text()), rng)
            config.write_text(json.dumps(described))

    def read() -> tuple[int, int]:
        try:
            return Predictor(folder, batch_size=1).size
        except UserError:
            raise
        except ValueError as error:  # `predict` makes a sentence of it as well
            raise UserError(str(error)) from error

    return read


def _encode(image: PIL.Image.Image, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def _images() -> list[bytes]:
    rng = np.random.default_rng(0)
    colours = PIL.Image.fromarray(rng.integers(256, size=(24, 33, 4), dtype=np.uint8), "RGBA")
    exif = PIL.Image.Exif()
    exif[0x0112] = 6
    found = [
        _encode(colours.convert("RGB"), "PNG"),
        _encode(colours, "PNG"),
        _encode(colours.convert("L"), "PNG"),
        _encode(colours.convert("P"), "PNG", transparency=3),
        _encode(PIL.Image.fromarray(np.full((20, 20), 700, np.uint16)), "PNG"),
        _encode(colours.convert("RGB"), "JPEG", exif=exif),
        _encode(colours.convert("CMYK"), "JPEG", progressive=True),
        _encode(colours, "WEBP", lossless=True),
        _encode(colours.convert("RGB"), "WEBP"),
    ]
    found += [
        _encode(colours.convert("RGB"), kind) for kind in ("GIF", "TIFF", "BMP", "PPM", "EPS")
    ]
    for size in ((1, 30_000), (30_000, 1), (1, 110_000), (3, 65_000), (4_000, 2_000)):
        found.append(_encode(PIL.Image.new("1", size), "PNG"))
    return found


def _masks() -> list[bytes]:
    mask = PIL.Image.fromarray(np.arange(24 * 20, dtype=np.uint8).reshape(24, 20) % 3)
    palette = mask.copy()
    palette.putpalette(list(range(256)) * 3)
    long = [PIL.Image.new("L", size) for size in ((1, 30_000), (1, 110_000), (3_000, 4_000))]
    other = [_encode(mask, kind) for kind in ("GIF", "TIFF", "BMP", "EPS")]
    return [*(_encode(image, "PNG") for image in (mask, palette, *long)), *other]


def _mend_png(content: bytes) -> bytes:
    """A PNG file whose chunks have the checksums of what they hold."""
    mended, place = bytearray(content), 8
    while place + 12 <= len(mended):
        length = int.from_bytes(mended[place : place + 4], "big")
        end = place + 8 + length
        if end + 4 > len(mended):
            break
        mended[end : end + 4] = struct.pack(">I", zlib.crc32(mended[place + 4 : end]))
        place = end + 4
    return bytes(mended)


def _damage_image(content: bytes, rng: np.random.Generator) -> bytes:
    if rng.random() < 0.1:
        return content
    if rng.random() < 0.5:  # its header
        damaged = damage_bytes(content[:100], rng) + content[100:]
    else:
        damaged = damage_bytes(content, rng)
    return _mend_png(damaged) if content.startswith(b"\x89PNG") and rng.random() < 0.7 else damaged


def _image(files: SoundFiles, rng: np.random.Generator) -> Reader:
    content = _damage_image(files.images[int(rng.integers(len(files.images)))], rng)
    path = files.write(f"image.{rng.choice(['png', 'jpg', 'webp'])}", content)
    use = int(rng.integers(3))

    def read() -> None:
        image = decode(str(path), str(path), upright=True)
        if use == 0:
            preprocess.eval_image(image, _RECORD)
        elif use == 1:
            pixel_labels.whole_views(image, _RECORD, _INFERENCE)
        else:
            mask = np.zeros((image.height, image.width), np.uint8)
            example = {"image": image, "label": mask}
            settings = {**_SEGMENTATION, "scale": (2.0, 2.0)}
            pixel_labels.train_example(example, np.random.default_rng(0), _RECORD, settings)

    return read


def _mask(files: SoundFiles, rng: np.random.Generator) -> Reader:
    content = _damage_image(files.masks[int(rng.integers(len(files.masks)))], rng)
    path = files.write("mask.png", content)
    return lambda: folder_segmentation.decode_mask(str(path), str(path), 3)


def _write_tfrecord(path: Path, records: list[bytes]) -> None:
    with path.open("wb") as file:
        for data in records:
            length = struct.pack("<Q", len(data))
            file.write(length + struct.pack("<I", masked_crc(length)))
            file.write(data + struct.pack("<I", masked_crc(data)))


def _records(files: SoundFiles, rng: np.random.Generator) -> Reader:
    tfrecord = rng.random() < 0.5
    root = files.copy(files.tfrecords if tfrecord else files.records)
    (path,) = root.rglob("*record-0*")
    if tfrecord and rng.random() < 0.6:  # with checksums that are right
        records = list(files.content)
        place = int(rng.integers(len(records)))
        records[place] = damage_bytes(records[place], rng)
        _write_tfrecord(path, records)
    elif tfrecord and rng.random() < 0.3:  # a length that is wrong, with a checksum that is right
        content = bytearray(path.read_bytes())
        start = int(rng.choice(read_offsets(path)[:-1]))
        length = struct.pack("<Q", _LONG_NUMBERS[int(rng.integers(len(_LONG_NUMBERS)))] % 2**64)
        content[start : start + 12] = length + struct.pack("<I", masked_crc(length))
        path.write_bytes(content)
    else:
        path.write_bytes(damage_bytes(path.read_bytes(), rng))
    return _read_records(root)


def _read_records(root: Path) -> Reader:
    def read() -> None:
        examples = sources.open_source("tfds:squares", "train", data_dir=str(root)).examples
        for index in range(min(len(examples), 16)):
            example = examples[index]
            preprocess.eval_image(example["image"], _RECORD)

    return read


def _descriptions(files: SoundFiles, rng: np.random.Generator) -> Reader:
    root = files.copy(files.tfrecords if rng.random() < 0.5 else files.records)
    name = str(rng.choice(["features.json", "dataset_info.json", "label.labels.txt"]))
    path = root / "squares" / "1.0.0" / name
    if path.suffix == ".txt" or rng.random() < 0.2:
        path.write_bytes(damage_bytes(path.read_bytes(), rng))
    else:
        path.write_text(json.dumps(damage_value(json.loads(path.read_text()), rng)))
    return _read_records(root)


def _config(files: SoundFiles, rng: np.random.Generator) -> Reader:
    match int(rng.integers(4)):
        case 0:  # a run's record of its config
            config = digits.get_config()
            content = json.loads(json.dumps(config.to_dict()))
            if rng.random() < 0.5:
                damaged = json.dumps(damage_value(content, rng)).encode()
            else:
                damaged = damage_bytes(json.dumps(content).encode(), rng)
            folder = files.write("config.json", damaged).parent
            return lambda: configuration.settle(config, folder, write=False)
        case 1:
            return _checked(preprocess.check_record, damage_value(_RECORD, rng))
        case 2:
            return _checked(check_inference, damage_value(_INFERENCE, rng))
        case _:
            fields = damage_value({**_FIELDS, "depths": [1, 1, 1, 1], "ffn_bands": 2}, rng)
            if not isinstance(fields, dict):
                fields = {"depths": fields}
            return _checked(lambda given: vvt_jax.create_model("vvt_nano", **given), fields)


def _checked(check: Callable[[Any], Any], value: Any) -> Reader:
    """Of a value whose check raises ValueError with a sentence, which commands pass on."""

    def read() -> None:
        try:
            check(value)
        except UserError:
            raise
        except ValueError as error:
            raise UserError(str(error)) from error

    return read


_PREPARE: dict[str, Callable[[SoundFiles, np.random.Generator], Reader]] = {
    "pth bytes": _pth_bytes,
    "pth opcodes": _pth_opcodes,
    "model folder": _model_folder,
    "image": _image,
    "mask": _mask,
    "records": _records,
    "descriptions": _descriptions,
    "config": _config,
}
