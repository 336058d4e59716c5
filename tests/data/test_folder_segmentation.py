"""Folders of images and masks: real files of every kind that is read, and what is refused."""

import io
import os
import pickle

import numpy as np
import PIL.EpsImagePlugin
import PIL.Image
import pytest

from vvt_jax.data import segmentation
from vvt_jax.data.overlay import index_mask
from vvt_jax.data.preprocess import UnfitImageError
from vvt_jax.data.sources import BrokenImageError, DataError, open_source


def _open(folder, split="train"):
    return open_source("folder_segmentation", split, data_dir=str(folder))


def _write(place, name="a", mask=None, size=(6, 4), suffix="jpg"):
    for part in ("images", "masks"):
        (place / part).mkdir(parents=True, exist_ok=True)
    PIL.Image.new("RGB", size, (200, 10, 30)).save(place / "images" / f"{name}.{suffix}")
    mask = PIL.Image.new("L", size, 1) if mask is None else mask
    mask.save(place / "masks" / f"{name}.png")


@pytest.fixture
def root(tmp_path):
    (tmp_path / "classes.txt").write_text("sky\nroad surface\n")
    return tmp_path


def test_pairs_with_palettes_and_ignored_pixels(root):
    numbers = np.array([[0, 1, 255], [1, 1, 0]], np.uint8)
    _write(root, "a", index_mask(numbers, 2), size=(3, 2))
    _write(root, "b", PIL.Image.fromarray(numbers[:1]), size=(3, 1), suffix="png")
    _write(root, "c", PIL.Image.fromarray(numbers[:, :2] > 0), size=(2, 2), suffix="webp")
    source = pickle.loads(pickle.dumps(_open(root)))
    assert source.class_names == ("sky", "road surface")
    assert source.pixels
    masks = [source.examples[i]["label"] for i in range(len(source.examples))]
    for mask, expected in zip(masks, (numbers, numbers[:1], numbers[:, :2] > 0), strict=True):
        np.testing.assert_array_equal(mask, expected)
        assert mask.dtype == np.uint8
    assert source.examples[0]["image"].size == (3, 2)


def test_splits_and_parts_of_them(root):
    for i in range(10):
        _write(root / "train", f"{i}")
    _write(root / "val", "x")
    assert len(_open(root, "val").examples) == 1
    assert len(_open(root, "train[:70%]").examples) == 7
    assert len(_open(root, "train[70%:]").examples) == 3
    with pytest.raises(DataError, match="has no split 'test': it has train, validation"):
        _open(root, "test")


@pytest.mark.parametrize(
    ("mask", "told"),
    [
        (PIL.Image.new("L", (5, 4)), "5x4 pixels, but its image has 6x4"),
        (PIL.Image.new("L", (6, 4), 2), "the class number 2, but there are 2 classes"),
        (PIL.Image.new("RGB", (6, 4)), "pixels of mode RGB"),
    ],
)
def test_a_mask_that_does_not_fit_is_named(root, mask, told):
    _write(root, "a", mask)
    with pytest.raises(BrokenImageError, match=told):
        _ = _open(root).examples[0]


def test_what_is_missing_is_said(root, tmp_path):
    with pytest.raises(DataError, match=r"needs config\.data\.data_dir"):
        open_source("folder_segmentation", "train")
    with pytest.raises(DataError, match="images can't be read: No such file"):
        _open(root)
    _write(root)
    (root / "masks" / "a.png").write_bytes(b"no picture")
    with pytest.raises(BrokenImageError, match=r"a\.png can't be decoded"):
        _ = _open(root).examples[0]
    (root / "masks" / "a.png").unlink()
    with pytest.raises(DataError, match=r"has no a\.png: 1 of 1 images lack their mask"):
        _open(root)
    (root / "classes.txt").unlink()
    with pytest.raises(DataError, match=r"classes\.txt can't be read"):
        _open(root)


def _encoded(image, kind):
    file = io.BytesIO()
    image.save(file, kind)
    return file.getvalue()


def test_a_mask_of_another_format_is_not_even_tried(root, monkeypatch):
    # Pillow would run Ghostscript for this one
    monkeypatch.setattr(PIL.EpsImagePlugin, "Ghostscript", lambda *_, **__: pytest.fail("it ran"))
    _write(root)
    (root / "masks" / "a.png").write_bytes(_encoded(PIL.Image.new("L", (6, 4)), "EPS"))
    with pytest.raises(BrokenImageError, match=r"a\.png can't be decoded: it is not an image of"):
        _ = _open(root).examples[0]


@pytest.mark.parametrize("place", ["images/a.jpg", "masks/a.png"])
def test_a_pipe_is_not_waited_for(root, place):
    _write(root)
    (root / place).unlink()
    os.mkfifo(root / place)
    with pytest.raises(BrokenImageError, match=f"{place} can't be read: it is a pipe"):
        _ = _open(root).examples[0]


def test_class_names_that_cannot_be_read_are_said(root):
    _write(root)
    (root / "classes.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(DataError, match="is not UTF-8"):
        _open(root)
    with (root / "classes.txt").open("wb") as file:
        file.truncate(2**40)
    with pytest.raises(DataError, match=r"classes\.txt can't be read .it has 1099511627776 bytes"):
        _open(root)
    (root / "classes.txt").unlink()
    os.mkfifo(root / "classes.txt")
    with pytest.raises(DataError, match=r"classes\.txt can't be read .it is a pipe"):
        _open(root)


def test_a_line_of_pixels_is_replaced_in_training_and_refused_where_it_can_be_only(root):
    """20,000 x 1 pixels would be resized to gigabytes."""
    _write(root, "a", size=(20_000, 1), suffix="png")
    example = _open(root).examples[0]
    record = {
        "size": [512, 512],
        "crop_fraction": 1.0,
        "interpolation": "bilinear",
        "mean": [0.5] * 3,
        "std": [0.5] * 3,
    }
    settings = {"scale": (0.5, 2.0), "class_share": 0.75, "flip": True, "photometric": True}
    with pytest.raises(UnfitImageError, match="20000 x 1 pixels is too long and narrow"):
        segmentation.train_example(example, np.random.default_rng(0), record, settings)
