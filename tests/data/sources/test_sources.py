"""Sources: what is opened, and what is refused with which sentence."""

import hashlib
import io
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
from etils import epath

from tests.conftest import no_network
from vvt_jax.data import sources
from vvt_jax.data.examples import BrokenImageError, DataError
from vvt_jax.data.image_files import decode
from vvt_jax.data.sources import prepared
from vvt_jax.system import storage

ArrayRecordReader = pytest.importorskip("array_record.python.array_record_module").ArrayRecordReader
tfds = pytest.importorskip("tensorflow_datasets")


def _colour(index: int) -> tuple[int, int, int]:
    return (index, 2 * index, 255 - index)


class SmallSquares(tfds.core.GeneratorBasedBuilder):
    """40 and 10 squares of one colour each, as PNG, of growing width; `index` is not needed."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        features = {
            "image": tfds.features.Image(shape=(None, None, 3)),
            "label": tfds.features.ClassLabel(names=["red", "green", "blue"]),
            "index": np.int64,
        }
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):
        del dl_manager
        return {"train": self._generate_examples(40), "test": self._generate_examples(10, -1)}

    def _generate_examples(self, count, label=None):
        for index in range(count):
            # Every fourth file is grey, as in ImageNet: the RGB feature must not matter.
            mode, colour = ("L", index) if index % 4 == 0 else ("RGB", _colour(index))
            file = io.BytesIO()
            PIL.Image.new(mode, (16 + index, 12), colour).save(file, "PNG")
            file.seek(0)
            yield index, {"image": file, "label": label or index % 3, "index": index}


class WordsOnly(SmallSquares):
    """A data set without images."""

    def _info(self):
        features = tfds.features.FeaturesDict({"text": tfds.features.Text()})
        return tfds.core.DatasetInfo(builder=self, features=features)

    def _split_generators(self, dl_manager):
        del dl_manager
        return {"train": iter([(0, {"text": "a"})])}


def _prepare(builder_class, folder, file_format):
    builder = builder_class(data_dir=folder, file_format=file_format)
    builder.download_and_prepare(
        download_config=tfds.download.DownloadConfig(try_download_gcs=False)
    )


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tfds")
    _prepare(SmallSquares, folder, "array_record")
    _prepare(WordsOnly, folder, "array_record")
    return str(folder)


@pytest.mark.parametrize(
    ("split", "size", "digest"),
    [
        ("train", 1293, "647e837e6283b86b"),
        ("validation", 144, "8c680fd2c94a4f9e"),
        ("test", 360, "772b39701d935e66"),
    ],
)
def test_digits_splits_are_frozen(split, size, digest):
    source = sources.open_source("digits", split)
    assert len(source.examples) == size
    assert source.num_classes == 10
    assert source.class_names == tuple("0123456789")
    content = hashlib.sha256()
    for index in range(size):
        example = source.examples[index]
        assert example["image"].shape == (8, 8, 1)
        assert example["image"].dtype == np.uint8
        assert isinstance(example["label"], int)
        content.update(example["image"].tobytes() + bytes([example["label"]]))
    assert content.hexdigest()[:16] == digest


def test_digits_splits_are_stratified_disjoint_and_complete():
    from sklearn.datasets import load_digits

    digits = load_digits()
    seen = []
    for split in ("train", "validation", "test"):
        examples = sources.open_source("digits", split).examples
        images = [examples[i]["image"] for i in range(len(examples))]
        labels = [examples[i]["label"] for i in range(len(examples))]
        share = np.bincount(labels, minlength=10) / len(examples)
        assert np.abs(share - np.bincount(digits.target) / 1797).max() < 0.01
        assert np.max(images) == 255
        seen += [(image.tobytes(), label) for image, label in zip(images, labels, strict=True)]
    expected = np.round(digits.images * 255 / 16).astype(np.uint8)
    assert sorted(seen) == sorted(
        (image.tobytes(), int(label)) for image, label in zip(expected, digits.target, strict=True)
    )


def test_tfds_examples(data_dir):
    source = sources.open_source("tfds:small_squares", "train", data_dir=data_dir)
    assert (source.name, source.split) == ("tfds:small_squares", "train")
    assert source.class_names == ("red", "green", "blue")
    assert len(source.examples) == 40
    seen = set()
    for i in range(40):
        example = pickle.loads(pickle.dumps(source)).examples[i] if i < 3 else source.examples[i]
        assert set(example) == {"image", "label"}
        width, height = example["image"].size
        index = width - 16
        assert (height, example["image"].mode) == (12, "RGB")
        assert example["label"] == index % 3
        assert isinstance(example["label"], int)
        colour = (index,) * 3 if index % 4 == 0 else _colour(index)
        assert example["image"].getcolors() == [(width * height, colour)]
        seen.add(index)
    assert seen == set(range(40))


class _Records:
    """What `_PreparedExamples` needs of tfds: one record, as its features would parse it."""

    def __init__(self, label, num_classes, several=False, **image):
        kind = tfds.features.ClassLabel(num_classes=num_classes)
        self._features = {"label": tfds.features.Sequence(kind) if several else kind}
        file = io.BytesIO()
        PIL.Image.new("RGB", (6, 4)).save(file, "JPEG", **image)
        self._example = {"image": file.getvalue(), "label": label}

    def __contains__(self, key):
        return key in self._features

    def __getitem__(self, key):
        return self._features[key]

    def deserialize_example_np(self, record, decoders):
        del record, decoders
        return self._example


@pytest.mark.parametrize("several", [False, True])
@pytest.mark.parametrize("label", [-1, 10, 99])
def test_tfds_labels_out_of_range_are_named(label, several):
    features = _Records([0, label] if several else label, 10, several)
    examples = prepared._PreparedExamples(
        [b""], [("x.tfrecord", 1)], features, "label", "'x', split 'y'", True
    )
    with pytest.raises(DataError, match=rf"Image 0 of 'x', split 'y' has the label {label}"):
        _ = examples[0]


@pytest.mark.parametrize(("upright", "size"), [(True, (4, 6)), (False, (6, 4))])
def test_tfds_images_follow_their_orientation_unless_the_recipe_does_not(upright, size):
    exif = PIL.Image.Exif()
    exif[0x0112] = 6
    features = _Records(3, 10, exif=exif)
    examples = prepared._PreparedExamples(
        [b""], [("x.tfrecord", 1)], features, "label", "'x', split 'y'", upright
    )
    example = examples[0]
    assert (example["image"].size, example["label"]) == (size, 3)


def test_tfds_split_slices_are_disjoint_and_complete(data_dir):
    def widths(split):
        examples = sources.open_source("tfds:small_squares", split, data_dir=data_dir).examples
        return [examples[i]["image"].width for i in range(len(examples))]

    assert len(widths("train[:90%]")) == 36
    assert widths("train[:90%]") + widths("train[90%:]") == widths("train")
    assert widths("train[3:5]") == widths("train")[3:5]


def test_tfds_opens_a_version_by_name(data_dir):
    source = sources.open_source("tfds:small_squares:1.0.0", "train", data_dir=data_dir)
    assert len(source.examples) == 40


def test_tfds_opens_a_folder_whose_builder_is_unknown_without_tensorflow(data_dir):
    code = f"""
import sys
from vvt_jax.data import sources
import tensorflow_datasets as tfds

assert "small_squares" not in tfds.list_builders(with_community_datasets=False)
source = sources.open_source("tfds:small_squares", "train[:50%]", data_dir={data_dir!r})
print(len(source.examples), source.examples[7]["image"].height, "tensorflow" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["20", "12", "False"]


def test_importing_the_package_loads_nothing_heavy():
    code = (
        "import sys, vvt_jax.data; "
        "print(*{'grain', 'tensorflow_datasets', 'PIL', 'sklearn', 'numpy'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip()) == (0, ""), done.stderr


def _refusal(name, split="train", data_dir=None):
    with no_network(), pytest.raises(DataError) as refused:
        sources.open_source(name, split, data_dir=data_dir)
    sentence = str(refused.value)
    assert "\n" not in sentence
    assert re.fullmatch(r"\S.*[.?]", sentence)
    return sentence


@pytest.mark.parametrize(
    "name", ["mnist", "imagenet2012", "nowhere_to_be_found", "fog/thick:1.2.3"]
)
def test_missing_data_says_where_it_was_sought_and_how_to_get_it(tmp_path, name):
    sentence = _refusal(f"tfds:{name}", data_dir=str(tmp_path))
    assert str(tmp_path) in sentence
    assert f"python -m vvt_jax.prepare {name} --data_dir={tmp_path}" in sentence


def test_data_dir_of_the_environment(data_dir):
    code = """
from vvt_jax.data import sources
print(len(sources.open_source("tfds:small_squares", "train").examples))
"""
    environment = os.environ | {"TFDS_DATA_DIR": data_dir}  # tfds reads it when it is imported.
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True
    )
    assert done.stdout.strip() == "40", done.stderr


def test_parquet_is_refused(tmp_path):
    _prepare(SmallSquares, tmp_path, "parquet")
    sentence = _refusal("tfds:small_squares", data_dir=str(tmp_path))
    assert "prepared as parquet (its reader loses rows), but" in sentence
    assert "vvt_jax.prepare small_squares" in sentence


@pytest.fixture(scope="module")
def tfrecord_dir(tmp_path_factory, data_dir, write_tfrecord):
    """The same examples in TFRecord, in three files: tfds itself would want TensorFlow for it."""
    root = tmp_path_factory.mktemp("tfrecord")
    shutil.copytree(f"{data_dir}/small_squares", root / "small_squares")
    folder = root / "small_squares" / "1.0.0"
    info = json.loads((folder / "dataset_info.json").read_text())
    info["fileFormat"] = "tfrecord"
    (split,) = [split for split in info["splits"] if split["name"] == "train"]
    split["shardLengths"] = ["15", "5", "20"]
    (folder / "dataset_info.json").write_text(json.dumps(info))
    (file,) = folder.glob("*-train.array_record*")
    reader = ArrayRecordReader(str(file))
    records = reader.read_all()
    reader.close()
    for number, (start, end) in enumerate([(0, 15), (15, 20), (20, 40)]):
        name = f"small_squares-train.tfrecord-{number:05}-of-00003"
        write_tfrecord(folder / name, records[start:end])
    for file in list(folder.glob("*.array_record*")):
        file.unlink()
    return str(root)


@pytest.mark.parametrize("split", ["train", "train[:40%]", "train[13:22]", "train[90%:]+train[:1]"])
def test_tfrecord_gives_the_same_examples(tfrecord_dir, data_dir, tmp_path, split):
    opened = [
        sources.open_source("tfds:small_squares", split, data_dir=root, cache_dir=tmp_path / "c")
        for root in (data_dir, tfrecord_dir)
    ]
    expected, found = (
        [source.examples[i] for i in range(len(source.examples))] for source in opened
    )
    assert opened[1].class_names == ("red", "green", "blue")
    assert len(found) == len(expected) > 0
    for a, b in zip(found, expected, strict=True):
        assert a["label"] == b["label"]
        np.testing.assert_array_equal(np.asarray(a["image"]), np.asarray(b["image"]))
    assert len(list((tmp_path / "c").iterdir())) == 1
    copy = pickle.loads(pickle.dumps(opened[1]))
    assert copy.examples[0]["label"] == found[0]["label"]


@pytest.mark.parametrize("kind", ["array_record", "tfrecord"])
def test_prepared_data_in_an_object_store(object_store, data_dir, tfrecord_dir, kind):
    here = Path(data_dir if kind == "array_record" else tfrecord_dir)
    there = epath.Path(object_store) / f"prepared_{kind}"
    for file in (here / "small_squares").rglob("*.*"):
        if file.is_file():
            storage.replace(there / file.relative_to(here).as_posix(), file.read_bytes())
    source = sources.open_source(
        "tfds:small_squares", "train[10:20]", data_dir=str(there), cache_dir=there / "offsets"
    )
    expected = sources.open_source("tfds:small_squares", "train[10:20]", data_dir=data_dir).examples
    assert len(source.examples) == len(expected) == 10
    for index in range(10):
        a, b = source.examples[index], expected[index]
        assert a["label"] == b["label"]
        np.testing.assert_array_equal(np.asarray(a["image"]), np.asarray(b["image"]))
    assert there.joinpath("offsets").is_dir() == (kind == "tfrecord")
    sentence = _refusal("tfds:nothing", data_dir=str(there))
    assert f"was not found in {there}" in sentence


def test_tfrecord_that_misses_a_file_is_refused(tfrecord_dir, tmp_path):
    shutil.copytree(tfrecord_dir, tmp_path / "copy")
    (file,) = (tmp_path / "copy").rglob("*train*-00001-of-*")
    file.unlink()
    sentence = _refusal("tfds:small_squares", data_dir=str(tmp_path / "copy"))
    assert f"{file} can't be read: No such file or directory." in sentence


def test_tfrecord_without_its_split(tfrecord_dir):
    assert "has no split 'valid'" in _refusal("tfds:small_squares", "valid", tfrecord_dir)


class Broken(SmallSquares):
    """The third image is cut in half; a file name is known."""

    def _info(self):
        features = {
            "image": tfds.features.Image(shape=(None, None, 3)),
            "label": tfds.features.ClassLabel(names=["red", "green", "blue"]),
            "file_name": tfds.features.Text(),
        }
        return tfds.core.DatasetInfo(
            builder=self, features=tfds.features.FeaturesDict(features), disable_shuffling=True
        )

    def _generate_examples(self, count, label=None):
        for index in range(4):
            file = io.BytesIO()
            noise = np.random.default_rng(index).integers(256, size=(30, 30, 3), dtype=np.uint8)
            PIL.Image.fromarray(noise).save(file, "PNG")
            if index == 2:
                file.truncate(600)
            file.seek(0)
            yield index, {"image": file, "label": 0, "file_name": f"n01_{index}.JPEG"}


def test_a_broken_image_is_named(tmp_path):
    _prepare(Broken, tmp_path, "array_record")
    examples = sources.open_source("tfds:broken", "train", data_dir=str(tmp_path)).examples
    assert examples[1]["image"].size == (30, 30)
    with pytest.raises(BrokenImageError) as refused:
        examples[2]
    assert str(refused.value).startswith(
        "Image 2 of 'tfds:broken', split 'train' (n01_2.JPEG) can't be decoded: "
    )


@pytest.mark.parametrize(
    ("name", "split", "words"),
    [
        ("nothing", "train", ["'nothing'", "digits", "tfds:NAME"]),
        ("digits:2", "train", ["'digits:2'"]),
        ("digits", "valid", ["'valid'", "train, validation, test"]),
        ("tfds:small_squares", "valid", ["'valid'", "train, test"]),
        ("tfds:small_squares", "train[:200%]", ["train[:200%]"]),
        ("tfds:small_squares", "test", ["have no labels"]),
        ("tfds:small_squares:3.0.0", "train", ["small_squares:3.0.0", "not found"]),
        ("tfds:not a name", "train", ["not a name"]),
        ("tfds:", "train", ["'tfds:'"]),
        ("tfds:words_only", "train", ["'image'", "text"]),
    ],
)
def test_refusals(name, split, words, data_dir):
    sentence = _refusal(name, split, data_dir)
    for word in words:
        assert word in sentence


def _copied(data_dir, tmp_path):
    shutil.copytree(Path(data_dir) / "small_squares", tmp_path / "small_squares")
    return tmp_path / "small_squares" / "1.0.0"


@pytest.mark.parametrize("file", ["features.json", "dataset_info.json"])
def test_a_data_set_runs_no_python(data_dir, tmp_path, monkeypatch, file):
    folder = _copied(data_dir, tmp_path)
    (tmp_path / "planted.py").write_text("open('trace', 'w').close()\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    features = json.loads((folder / "features.json").read_text())
    nested = features["featuresDict"]["features"]["label"]
    nested["pythonClassName"] = "planted.Feature"
    if file == "features.json":
        (folder / file).write_text(json.dumps(features))
    else:
        info = json.loads((folder / file).read_text())
        (folder / file).write_text(json.dumps({**info, "features": features}))
    sentence = _refusal("tfds:small_squares", data_dir=str(tmp_path))
    assert "a feature of the class 'planted.Feature': only tfds's own classes" in sentence
    assert not (tmp_path / "trace").exists()
    assert "planted" not in sys.modules


@pytest.mark.parametrize("file", ["features.json", "dataset_info.json"])
@pytest.mark.parametrize("damage", ["missing", "empty", "cut", "list", "pipe", "other fields"])
def test_a_damaged_description_is_named(data_dir, tmp_path, file, damage):
    folder = _copied(data_dir, tmp_path)
    content = (folder / file).read_bytes()
    (folder / file).unlink()
    if damage == "pipe":
        os.mkfifo(folder / file)
    elif damage != "missing":
        damaged = {"empty": b"", "cut": content[:-40], "list": b"[]", "other fields": b'{"a": 1}'}
        (folder / file).write_bytes(damaged[damage])
    sentence = _refusal("tfds:small_squares", data_dir=str(tmp_path))
    if damage == "other fields":
        assert "small_squares" in sentence
    elif (file, damage) == ("features.json", "missing"):  # then there is no data set
        assert "was not found" in sentence
    else:
        assert str(folder / file) in sentence


def test_a_damaged_array_record_is_named(data_dir, tmp_path):
    folder = _copied(data_dir, tmp_path)
    (path,) = folder.glob("*-train.array_record*")
    content = path.read_bytes()
    rng = np.random.default_rng(0)
    told = []
    for _ in range(12):
        damaged = bytearray(content)
        for place in rng.integers(len(content), size=20):
            damaged[place] ^= int(rng.integers(1, 256))
        path.write_bytes(damaged)
        try:
            examples = sources.open_source(
                "tfds:small_squares", "train", data_dir=str(tmp_path)
            ).examples
            for index in range(len(examples)):
                examples[index]
        except DataError as error:
            told.append(str(error))
    assert all(str(path) in sentence for sentence in told)
    assert len(told) > 6  # a few only hit what fills up the blocks of the file
    path.write_bytes(content[: len(content) // 2])
    assert str(path) in _refusal("tfds:small_squares", data_dir=str(tmp_path))


def test_a_record_that_is_no_example_is_named(tfrecord_dir, tmp_path, write_tfrecord):
    shutil.copytree(tfrecord_dir, tmp_path / "copy")
    (path,) = (tmp_path / "copy").rglob("*train*-00001-of-*")
    write_tfrecord(path, [b"\xff" * 40] * 5)  # with checksums that are right
    examples = sources.open_source(
        "tfds:small_squares", "train", data_dir=str(tmp_path / "copy")
    ).examples
    examples[14]
    with pytest.raises(DataError) as refused:
        examples[15]
    assert f"{path} is damaged: the record of Image 15 of" in str(refused.value)


def test_an_image_that_is_a_line_is_refused_before_it_is_decoded(tmp_path):
    path = tmp_path / "line.png"
    PIL.Image.new("1", (1, 110_000)).save(path)
    sentence = f"{path} can't be used: An image of 1 x 110000 pixels is too long and narrow"
    with pytest.raises(BrokenImageError, match=re.escape(sentence)):
        decode(path, str(path))
