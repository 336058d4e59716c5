"""Hugging Face data sets as the package itself writes them: to a folder, and into its cache."""

import contextlib
import io
import os
import pickle
import re
import subprocess
import sys

import numpy as np
import PIL.Image
import pytest

from tests.conftest import no_network
from vvt_jax.data.examples import BrokenImageError, DataError
from vvt_jax.data.loader import BrokenImages, eval_batches, train_batches
from vvt_jax.data.sources import hugging_face, open_source

datasets = pytest.importorskip("datasets")

_RECORD = {
    "size": [8, 8],
    "crop_fraction": 1.0,
    "interpolation": "nearest",
    "mean": [0.0] * 3,
    "std": [1.0] * 3,
}
_AUGMENT = {"crop": "resize", "flip": False, "shift": 0}
_AUGMENT |= {"min_scale": 1.0, "randaugment": "", "color_jitter": 0.0}


def _png(number, mode="RGB"):
    file = io.BytesIO()
    PIL.Image.new(mode, (16 + number, 12), number if mode == "L" else (number, 2, 255)).save(
        file, "PNG"
    )
    return file.getvalue()


def _made(numbers, *, names=("picture", "kind"), broken=(), **features):
    """Squares of growing width; every fourth file is grey."""
    image, label = names
    files = [_png(i, "L" if i % 4 == 0 else "RGB") for i in numbers]
    rows = {
        image: [
            {"bytes": file[:50] if i in broken else file, "path": f"{i}.png"}
            for i, file in zip(numbers, files, strict=True)
        ],
        label: [i % 3 for i in numbers],
        "text": [str(i) for i in numbers],
    }
    kinds = {
        image: datasets.Image(),
        label: datasets.ClassLabel(names=["red", "green", "blue"]),
        "text": datasets.Value("string"),
    }
    return datasets.Dataset.from_dict(rows, features=datasets.Features(kinds | features))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    parts = {"train": _made(range(40)), "test": _made(range(40, 50))}
    datasets.DatasetDict(parts).save_to_disk(folder / "squares")
    _made(range(10), broken=[3]).save_to_disk(folder / "someone" / "broken" / "small")
    return str(folder)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """The package's cache, with a data set of the Hub in it: built from files by its own builder,
    in the folder that it has for those."""
    from datasets.packaged_modules.imagefolder.imagefolder import ImageFolder

    root = tmp_path_factory.mktemp("cache")
    for kind in ("cat", "dog"):
        folder = root / "files" / kind
        folder.mkdir(parents=True)
        for i in range(5):
            (folder / f"{i}.png").write_bytes(_png(i))
    for config in ("default", "other"):
        builder = ImageFolder(
            cache_dir=root / "datasets",
            dataset_name="Pets",
            config_name=config,
            hash="0" * 16,
            data_files={"train": [str(root / "files" / "*" / "*")]},
        )
        builder.download_and_prepare()
    made = (root / "datasets" / "pets").rename(root / "datasets" / "someone___pets")
    for folder in list(made.iterdir()):  # named for the files, which those of the Hub are not
        folder.rename(made / folder.name.partition("-")[0])
    return root / "datasets"


def _widths(source):
    return [source.examples[i]["image"].width for i in range(len(source.examples))]


def test_examples_of_a_saved_data_set(saved):
    source = open_source("huggingface:squares", "train", data_dir=saved)
    assert (source.name, source.split) == ("huggingface:squares", "train")
    assert source.class_names == ("red", "green", "blue")
    copy = pickle.loads(pickle.dumps(source))
    for i in range(40):
        example = source.examples[np.int64(i)]
        assert set(example) == {"image", "label"}
        assert (example["image"].size, example["image"].mode) == ((16 + i, 12), "RGB")
        colour = (i, i, i) if i % 4 == 0 else (i, 2, 255)
        assert example["image"].getpixel((0, 0)) == colour
        assert example["label"] == i % 3
        assert isinstance(example["label"], int)
        if i < 3:
            assert copy.examples[i]["image"].tobytes() == example["image"].tobytes()


@pytest.mark.parametrize(
    ("split", "expected"),
    [
        ("test", range(40, 50)),
        ("train[:90%]", range(36)),
        ("train[90%:]", range(36, 40)),
        ("train[3:5]", range(3, 5)),
        ("train[-2:]", range(38, 40)),
        ("test[:1]+train[39:]", [40, 39]),
        ("train[:0]", []),
    ],
)
def test_splits(saved, split, expected):
    source = open_source("huggingface:squares", split, data_dir=saved)
    assert _widths(source) == [16 + i for i in expected]


def test_a_data_set_without_splits_is_train(saved):
    source = open_source("huggingface:someone/broken/small", "train[4:]", data_dir=saved)
    assert _widths(source) == [16 + i for i in range(4, 10)]


def test_a_broken_image_is_named_and_replaced(saved):
    source = open_source("huggingface:someone/broken/small", "train", data_dir=saved)
    with pytest.raises(BrokenImageError) as refused:
        source.examples[3]
    told = "Image 3 of 'huggingface:someone/broken/small', split 'train' (3.png) can't be decoded: "
    assert str(refused.value).startswith(told)
    said = []
    batches = train_batches(source, record=_RECORD, augment=_AUGMENT, batch_size=10, seed=0)
    broken = BrokenImages(source, 1, said.append)
    with contextlib.closing(broken.watch(batches)) as reported:
        assert next(reported)["image"].shape == (10, 8, 8, 3)
    broken.tell(broken.take())
    assert len(said) == 1
    assert told in said[0]


def test_splits_of_other_classes_are_refused(tmp_path):
    """Their labels would count as those of the first split's classes."""
    other = _made(range(3)).cast_column("kind", datasets.ClassLabel(names=["green", "red", "x"]))
    splits = datasets.DatasetDict(train=_made(range(3)), test=other)
    splits.save_to_disk(tmp_path / "two")
    with pytest.raises(DataError, match="have different classes"):
        open_source("huggingface:two", "test", data_dir=str(tmp_path))


@pytest.mark.parametrize("address", ["http://127.0.0.1/x.png", "gs://bucket/x.png"])
def test_a_data_set_does_not_choose_what_is_fetched(address):
    """`datasets` itself would put the image into the files that it saves."""
    rows = [{"picture": {"bytes": None, "path": address}, "kind": 0}]
    examples = hugging_face._HuggingFaceExamples(rows, "picture", "kind", "a set", True)
    with no_network(), pytest.raises(BrokenImageError, match="may not choose what is fetched"):
        examples[0]


def test_a_missing_image_is_named(tmp_path):
    _made(range(3)).map(
        lambda row: {"picture": None if row["text"] == "1" else row["picture"]}
    ).save_to_disk(tmp_path / "gaps")
    source = open_source("huggingface:gaps", "train", data_dir=str(tmp_path))
    assert source.examples[2]["label"] == 2
    with pytest.raises(BrokenImageError, match=r"^Image 1 of 'huggingface:gaps', split 'train' is"):
        source.examples[1]


@pytest.mark.parametrize("label", [None, -1])
@pytest.mark.parametrize("unlabelled", [(0, 1, 2), (2,)])
def test_examples_without_a_label_are_refused(tmp_path, label, unlabelled):
    _made(range(3)).map(
        lambda row, i: {"kind": label if i in unlabelled else row["kind"]}, with_indices=True
    ).save_to_disk(tmp_path / "gaps")
    words = (
        r"The examples of 'huggingface:gaps', split 'train', have no labels"
        if len(unlabelled) == 3
        else rf"Image 2 of 'huggingface:gaps', split 'train', has the label {label}, but .*: 1 of 3"
    )
    with pytest.raises(DataError, match=words):
        open_source("huggingface:gaps", "train", data_dir=str(tmp_path))


def test_images_are_turned_as_the_package_turns_them(tmp_path):
    image = PIL.Image.fromarray(np.arange(60, dtype=np.uint8).reshape(4, 5, 3))
    exif = PIL.Image.Exif()
    exif[0x0112] = 6
    file = io.BytesIO()
    image.save(file, "PNG", exif=exif)
    made = _made(range(1)).remove_columns("picture").to_dict()
    made["picture"] = [{"bytes": file.getvalue(), "path": None}]
    kinds = {"picture": datasets.Image(), "kind": datasets.ClassLabel(names=["a"])}
    kinds["text"] = datasets.Value("string")
    datasets.Dataset.from_dict(made, features=datasets.Features(kinds)).save_to_disk(tmp_path / "x")
    theirs = datasets.load_from_disk(tmp_path / "x")[0]["picture"]
    ours = open_source("huggingface:x", "train", data_dir=str(tmp_path)).examples[0]["image"]
    assert ours.size == (4, 5)
    np.testing.assert_array_equal(np.asarray(ours), np.asarray(theirs))


@pytest.mark.slow
def test_worker_processes_give_the_same(saved):
    source = open_source("huggingface:squares", "train[:20]", data_dir=saved)
    alone, shared = (
        list(eval_batches(source, record=_RECORD, batch_size=8, workers=workers))
        for workers in (0, 2)
    )
    assert len(alone) == len(shared) == 3
    for a, b in zip(alone, shared, strict=True):
        for name in a:
            np.testing.assert_array_equal(a[name], b[name])


@pytest.mark.parametrize("name", ["someone/Pets/default", "someone/Pets/other"])
def test_the_packages_cache(cache, monkeypatch, name):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(cache))
    source = open_source(f"huggingface:{name}", "train[:80%]")
    assert source.class_names == ("cat", "dog")
    assert _widths(source) == [16, 17, 18, 19, 20, 16, 17, 18]
    assert not datasets.config.HF_HUB_OFFLINE  # only while it was opened


def _refusal(name, split="train", data_dir=None):
    with no_network(), pytest.raises(DataError) as refused:
        open_source(name, split, data_dir=data_dir)
    sentence = str(refused.value)
    assert "\n" not in sentence
    assert re.fullmatch(r"\S.*\.", sentence)
    return sentence


@pytest.mark.parametrize("name", ["imagenet-1k", "ylecun/mnist", "ylecun/mnist/mnist", ""])
def test_what_is_not_in_the_cache_says_how_to_get_it(cache, monkeypatch, name):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(cache))
    sentence = _refusal(f"huggingface:{name}")
    assert f"'huggingface:{name}' was not found in {cache}: fetch it with" in sentence


def test_one_of_several_configs_has_to_be_named(cache, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(cache))
    sentence = _refusal("huggingface:someone/Pets")
    assert "multiple" in sentence
    assert "default" in sentence
    assert "'default', 'other'" in _refusal("huggingface:someone/Pets/third").replace(
        "'other', 'default'", "'default', 'other'"
    )


@pytest.mark.parametrize(
    ("name", "split", "words"),
    [
        ("nothing", "train", ["nothing", "save_to_disk"]),
        ("", "train", ["save_to_disk"]),
        ("someone", "train", ["someone", "can't be opened"]),
        ("squares", "valid", ["'valid'", "train, test"]),
        ("squares", "train[:200%]", ["'train[:200%]'"]),
        ("squares", "train[", ["'train['"]),
    ],
)
def test_refusals(saved, name, split, words):
    sentence = _refusal(f"huggingface:{name}", split, saved)
    for word in words:
        assert word in sentence


@pytest.mark.parametrize(
    ("features", "words"),
    [
        ({"text": datasets.ClassLabel(names=list("0123456789"))}, ["several", "kind, text"]),
        ({"kind": datasets.Value("int64")}, ["no feature of type ClassLabel", "kind (Value)"]),
    ],
)
def test_features_that_leave_it_open(tmp_path, features, words):
    _made(range(10), **features).save_to_disk(tmp_path / "unclear")
    sentence = _refusal("huggingface:unclear", data_dir=str(tmp_path))
    for word in words:
        assert word in sentence


def test_labels_that_are_missing(tmp_path):
    made = _made(range(3)).map(lambda row: {"kind": -1})
    made.save_to_disk(tmp_path / "hidden")
    assert "have no labels" in _refusal("huggingface:hidden", data_dir=str(tmp_path))


def test_without_the_package(tmp_path):
    """Where `import datasets` fails."""
    blocked = tmp_path / "datasets"
    blocked.mkdir()
    (blocked / "__init__.py").write_text('raise ImportError("blocked by the test")\n')
    code = """
from vvt_jax.data import sources
try:
    sources.open_source("huggingface:squares", "train")
except sources.DataError as error:
    print(error)
"""
    paths = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": paths},
        capture_output=True,
        text=True,
    )
    assert "needs the package datasets: pip install 'vvt_jax[huggingface]'." in done.stdout
