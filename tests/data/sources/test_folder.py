"""Folders of images: real files of every kind that is read, and every sentence of refusal."""

import os
import pickle

import numpy as np
import PIL.Image
import pytest

from vvt_jax.data import image_files
from vvt_jax.data.examples import BrokenImageError, DataError, Source
from vvt_jax.data.sources import open_source


def _write(path, colour=(10, 200, 30), size=(12, 8), **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    PIL.Image.new("RGB", size, colour).save(path, **options)


def _fill(folder, counts):
    """Images of each class: the red value is the number within the class."""
    for name, count in counts.items():
        for i in range(count):
            _write(folder / name / f"{i:03}.png", (i, 0, 0))


def _read(source):
    examples = [source.examples[i] for i in range(len(source.examples))]
    return [(int(np.asarray(e["image"])[0, 0, 0]), e["label"]) for e in examples]


def test_a_folder_of_classes_is_the_training_split(tmp_path):
    _fill(tmp_path, {"dog": 3, "cat": 2})
    source = pickle.loads(pickle.dumps(open_source("folder", "train", data_dir=str(tmp_path))))
    assert source.class_names == ("cat", "dog")
    assert _read(source) == [(0, 0), (1, 0), (0, 1), (1, 1), (2, 1)]


def test_parts_of_a_split_are_disjoint_complete_and_mixed(tmp_path):
    _fill(tmp_path, {"a": 40, "b": 40})

    def read(split):
        return _read(open_source("folder", split, data_dir=str(tmp_path)))

    train, rest = read("train[:75%]"), read("train[75%:]")
    assert (len(train), len(rest)) == (60, 20)
    assert sorted(train + rest) == sorted(read("train"))
    assert 4 < sum(label for _, label in rest) < 16
    assert read("train[:60]") == train
    assert len(read("train[5:25]")) == 20
    assert read("train[:75%]") == train


def test_splits_of_their_own(tmp_path):
    _fill(tmp_path / "train", {"a": 2, "b": 1})
    _fill(tmp_path / "val", {"b": 3})
    _fill(tmp_path / "test", {"a": 1})
    for split in ("val", "validation"):
        source = open_source("folder", split, data_dir=str(tmp_path))
        assert source.class_names == ("a", "b")
        assert _read(source) == [(0, 1), (1, 1), (2, 1)]
    assert len(open_source("folder", "test", data_dir=str(tmp_path)).examples) == 1
    assert len(open_source("folder", "train", data_dir=str(tmp_path)).examples) == 3


def test_every_kind_of_file_and_nothing_else(tmp_path):
    names = ("a.jpg", "b.JPEG", "c.PNG", "d.webp")
    for name in names:
        _write(tmp_path / "x" / name)
    (tmp_path / "x" / "notes.txt").write_text("no image")
    (tmp_path / "x" / ".hidden.png").write_text("no image")
    (tmp_path / ".cache").mkdir()
    PIL.Image.new("L", (5, 5), 100).save(tmp_path / "x" / "e.png")
    PIL.Image.new("RGBA", (5, 5), (1, 2, 3, 4)).save(tmp_path / "x" / "f.png")
    PIL.Image.fromarray(np.full((5, 5), 25700, np.uint16)).save(tmp_path / "x" / "g.png")
    source = open_source("folder", "train", data_dir=str(tmp_path))
    assert len(source.examples) == 7
    for i in range(7):
        image = source.examples[i]["image"]
        assert image.mode == "RGB"
    assert np.asarray(source.examples[4]["image"])[0, 0].tolist() == [100, 100, 100]
    assert np.asarray(source.examples[6]["image"])[0, 0].tolist() == [100, 100, 100]


def test_images_are_turned_upright(tmp_path):
    exif = PIL.Image.Exif()
    exif[PIL.ExifTags.Base.Orientation] = 6
    _write(tmp_path / "x" / "a.jpg", exif=exif)
    (example,) = [open_source("folder", "train", data_dir=str(tmp_path)).examples[0]]
    assert example["image"].size == (8, 12)


@pytest.mark.parametrize("damage", ["truncated", "empty", "text", "cut header"])
def test_a_broken_image_is_named(tmp_path, damage):
    path = tmp_path / "x" / "a.jpg"
    path.parent.mkdir()
    PIL.Image.fromarray(
        np.random.default_rng(0).integers(256, size=(64, 64, 3), dtype=np.uint8)
    ).save(path)
    content = path.read_bytes()
    path.write_bytes(
        {
            "truncated": content[: len(content) // 2],
            "empty": b"",
            "text": b"<html>not found</html>",
            "cut header": content[:30],
        }[damage]
    )
    source = open_source("folder", "train", data_dir=str(tmp_path))
    with pytest.raises(BrokenImageError) as refused:
        source.examples[0]
    assert str(refused.value).startswith(f"{path} can't be decoded: ")
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("split", "words"),
    [
        ("val", "{root} has no split 'validation': it has train."),
        ("train[", "'train[' is no split: write train, train[:90%] or train[100:]."),
        ("train[a:b]", "'train[a:b]' is no split"),
    ],
)
def test_other_splits_are_refused(tmp_path, split, words):
    _fill(tmp_path, {"a": 1})
    with pytest.raises(DataError) as refused:
        open_source("folder", split, data_dir=str(tmp_path))
    assert str(refused.value).startswith(words.format(root=tmp_path))


def test_what_is_missing_is_named(tmp_path):
    with pytest.raises(DataError, match=r"needs config.data.data_dir, the folder"):
        open_source("folder", "train")
    with pytest.raises(DataError, match=r"none can't be read: No such file or directory\."):
        open_source("folder", "train", data_dir=str(tmp_path / "none"))
    with pytest.raises(
        DataError, match=r"has no images in class folders \(jpg, jpeg, jpe, jfif, png"
    ):
        open_source("folder", "train", data_dir=str(tmp_path))
    _fill(tmp_path / "train", {"a": 1})
    _fill(tmp_path / "val", {"a": 1, "b": 1})
    with pytest.raises(DataError, match=r"val/b is a class that the training images lack\."):
        open_source("folder", "val", data_dir=str(tmp_path))


def _open(root, split="train", **options):
    return open_source("folder", split, data_dir=str(root), **options)


def _used(root, split="train"):
    """(class, red value) of every image."""
    source = _open(root, split)
    return [(source.class_names[label], red) for red, label in _read(source)]


def test_nested_folders_belong_to_their_class(tmp_path):
    _fill(tmp_path, {"a": 1, "a/x": 2, "a/x/y": 1, "b/z": 1})
    assert _used(tmp_path) == [("a", 0), ("a", 0), ("a", 1), ("a", 0), ("b", 0)]


def test_links_are_followed_and_circles_are_not(tmp_path):
    _fill(tmp_path / "elsewhere", {"p": 2})
    root = tmp_path / "data"
    _fill(root, {"a": 1, "b": 1})
    (root / "a" / "linked").symlink_to(tmp_path / "elsewhere" / "p")
    (root / "a" / "linked" / "back").symlink_to(root / "a")
    (root / "b" / "up").symlink_to(root)
    (root / "b" / "far_up").symlink_to(tmp_path)
    assert _used(root) == [("a", 0), ("a", 0), ("a", 1), ("b", 0)]
    told = " ".join(_open(root).left_out)
    assert str(root / "b" / "up") in told
    assert "a link to a folder" in told


@pytest.mark.parametrize("suffix", image_files.SUFFIXES)
def test_every_suffix_is_read(tmp_path, suffix):
    _write(tmp_path / "x" / f"a{suffix.upper()}", (200, 100, 50), **_format_of(suffix))
    image = _open(tmp_path).examples[0]["image"]
    assert image.mode == "RGB"
    if suffix not in (".pgm", ".pbm"):  # which have no colours, and the second no grey
        assert np.abs(np.subtract(image.getpixel((5, 5)), (200, 100, 50))).max() <= 8
    assert image.size == (12, 8)


def _format_of(suffix):
    (name,) = [name for name, (_, known) in image_files._KNOWN.items() if suffix in known]
    return {"format": name}


@pytest.mark.parametrize("name", ["EPS", "PSD", "ICO"])
def test_formats_that_are_not_listed_are_not_decoded(tmp_path, name):
    path = tmp_path / "x" / "a.png"
    path.parent.mkdir()
    if name == "PSD":
        path.write_bytes(b"8BPS" + bytes(60))
    else:
        PIL.Image.new("RGB", (16, 16)).save(path, name)
    with pytest.raises(BrokenImageError):
        _ = _open(tmp_path).examples[0]


def test_what_is_left_out_is_said(tmp_path):
    _fill(tmp_path, {"a": 2, "b": 1, "__MACOSX/a": 1, "lost+found": 1, "@eaDir": 1, ".git": 1})
    _fill(tmp_path, {"a/@eaDir": 1, "runs/mine/pictures": 1, "own_run/pictures": 1})
    for run in ("runs/mine", "own_run"):
        (tmp_path / run / "config.json").write_text("{}")
        (tmp_path / run / "checkpoints").mkdir()
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "read.txt").write_text("")
    for name in ("c.heic", "d.HEIC", "e.txt", "Thumbs.db"):
        (tmp_path / "a" / name).write_text("")
    _write(tmp_path / "a" / "._0.png")
    _write(tmp_path / "loose.png")
    source = _open(tmp_path)
    assert _used(tmp_path) == [("a", 0), ("a", 1), ("b", 0)]
    told = "\n".join(source.left_out)
    for words in (
        "4 files without the suffix of an image (2 .heic, 2 .txt)",
        "1 hidden files",
        "__MACOSX",
        "lost+found",
        f"{tmp_path / 'a' / '@eaDir'}",
        f"{tmp_path / 'runs' / 'mine'}",
        "the workdir of a run",
        "it has no images",
        "1 images in no class folder",
    ):
        assert words in told
    assert told.count("own_run") == 1


def test_a_class_without_training_images_keeps_its_number_in_every_split(tmp_path):
    _fill(tmp_path / "train", {"b": 1, "c": 1})
    (tmp_path / "train" / "a").mkdir()
    _fill(tmp_path / "val", {"a": 1, "b": 1})
    for split in ("train", "val"):
        assert _open(tmp_path, split).class_names == ("a", "b", "c")


def test_a_folder_of_what_is_measured_needs_no_training_images(tmp_path):
    _fill(tmp_path / "val", {"blue": 2, "red": 1})
    source = open_source("folder", "validation", data_dir=str(tmp_path))
    assert source.class_names == ("blue", "red")
    assert len(source.examples) == 3
    with pytest.raises(DataError, match="has no split 'train': it has validation"):
        open_source("folder", "train", data_dir=str(tmp_path))


def test_the_pictures_of_an_evaluation_are_no_class(tmp_path):
    _fill(tmp_path, {"blue": 2, "red": 1, "checked/evaluation": 1})
    (tmp_path / "checked" / "evaluation" / "metrics.json").write_text("{}")
    source = open_source("folder", "train", data_dir=str(tmp_path))
    assert source.class_names == ("blue", "red")


def test_a_class_may_be_called_val(tmp_path):
    _fill(tmp_path, {"val": 2, "red": 1})
    assert open_source("folder", "train", data_dir=str(tmp_path)).class_names == ("red", "val")


def test_a_class_may_be_called_train(tmp_path):
    _fill(tmp_path, {"train": 2, "plane": 1})
    assert _used(tmp_path) == [("plane", 0), ("train", 0), ("train", 1)]


def test_a_split_and_a_class_called_train_that_cannot_be_told_apart_are_refused(tmp_path):
    _fill(tmp_path, {"train/steam": 1, "plane": 1})
    with pytest.raises(DataError, match=r"folders 'train' and 'plane' side by side"):
        _open(tmp_path)
    _fill(tmp_path, {"val/steam": 1})
    source = _open(tmp_path)
    assert source.class_names == ("steam",)
    assert f"{tmp_path / 'plane'} (it lies beside train/" in " ".join(source.left_out)


def test_images_can_be_read_as_they_are_stored(tmp_path):
    exif = PIL.Image.Exif()
    exif[PIL.ExifTags.Base.Orientation] = 6
    _write(tmp_path / "x" / "a.jpg", exif=exif)
    assert _open(tmp_path, upright=False).examples[0]["image"].size == (12, 8)


def test_unknown_kinds_are_told_the_known_ones():
    with pytest.raises(DataError, match="it must be 'digits', 'tfds:NAME', 'folder', "):
        open_source("folders", "train")
    assert Source


def test_a_pipe_is_not_waited_for(tmp_path):
    (tmp_path / "x").mkdir()
    os.mkfifo(tmp_path / "x" / "a.jpg")
    source = open_source("folder", "train", data_dir=str(tmp_path))
    with pytest.raises(BrokenImageError, match=r"a\.jpg can't be read: it is a pipe and not a reg"):
        source.examples[0]
