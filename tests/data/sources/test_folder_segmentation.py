"""Folders of images and masks: real files of every kind that is read, and what is refused."""

import io
import os
import pickle
import struct
import zlib

import numpy as np
import PIL.EpsImagePlugin
import PIL.Image
import pytest

from vvt_jax.data import pixel_labels
from vvt_jax.data.examples import BrokenImageError, DataError
from vvt_jax.data.image_files import grey_scale
from vvt_jax.data.mask_survey import survey_masks
from vvt_jax.data.overlay import index_mask
from vvt_jax.data.preprocess import UnfitImageError
from vvt_jax.data.sources import open_source
from vvt_jax.data.sources.folder_segmentation import decode_mask


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
        pixel_labels.train_example(example, np.random.default_rng(0), record, settings)


def _grey_png(path, rows, bits):
    """A grey PNG file of that many bits a pixel, which Pillow doesn't write."""

    def chunk(kind, data):
        content = kind + data
        return len(data).to_bytes(4, "big") + content + zlib.crc32(content).to_bytes(4, "big")

    per_byte = 8 // bits
    lines = b""
    for row in rows:
        padded = [*row, *[0] * (-len(row) % per_byte)]
        groups = [padded[i : i + per_byte] for i in range(0, len(padded), per_byte)]
        packed = [sum(v << (8 - bits * (i + 1)) for i, v in enumerate(g)) for g in groups]
        lines += b"\0" + bytes(packed)
    header = struct.pack(">IIBBBBB", len(rows[0]), len(rows), bits, 0, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(lines)) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + body)


def test_masks_of_few_bits_are_prepared_with_the_numbers_that_are_stored(tmp_path):
    _grey_png(tmp_path / "mask.png", [[0, 1, 2], [3, 1, 2]], 2)
    with PIL.Image.open(tmp_path / "mask.png") as image:
        scale = grey_scale(image)
        assert (np.array(image) // scale).tolist() == [[0, 1, 2], [3, 1, 2]]


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_grey_masks_of_few_bits_have_the_numbers_that_are_stored(tmp_path, bits):
    rows = [[0, 1, 2**bits - 1 if bits < 8 else 15], [1, 0, 1]]
    _grey_png(tmp_path / "mask.png", rows, bits)
    assert decode_mask(tmp_path / "mask.png", "it", 16).tolist() == rows


@pytest.mark.parametrize("orientation", range(1, 9))
def test_masks_belong_to_the_image_as_it_is_displayed(root, orientation):
    exif = PIL.Image.Exif()
    exif[PIL.ExifTags.Base.Orientation] = orientation
    upright = np.zeros((4, 6), np.uint8)
    upright[0, :2] = upright[1, 0] = 1  # unlike itself, however it is turned or mirrored
    upright[0, 2] = 1
    stored = PIL.Image.fromarray(upright)
    for turn in range(8):  # what `exif_transpose` undoes
        candidate = stored.transpose(PIL.Image.Transpose(turn)) if turn < 7 else stored
        candidate.info["exif"] = exif.tobytes()
        if np.array_equal(np.asarray(PIL.ImageOps.exif_transpose(candidate)), upright):
            break
    for part in ("images", "masks"):
        (root / part).mkdir()
        candidate.convert("RGB").save(root / "images" / f"{part}.png", exif=exif)
    stored.save(root / "masks" / "images.png")  # labelled as displayed
    candidate.save(root / "masks" / "masks.png", exif=exif)  # turned by its own orientation
    for i in range(2):
        example = _open(root).examples[i]
        np.testing.assert_array_equal(example["label"], upright)
        assert example["image"].size == (6, 4)


def test_a_mask_of_the_stored_image_is_refused_with_the_reason(root):
    _write(root, mask=PIL.Image.new("L", (6, 4)))
    exif = PIL.Image.Exif()
    exif[PIL.ExifTags.Base.Orientation] = 6
    PIL.Image.new("RGB", (6, 4)).save(root / "images" / "a.jpg", exif=exif)
    with pytest.raises(BrokenImageError, match="4x6 once it is turned as its EXIF orientation"):
        _ = _open(root).examples[0]
    source = open_source("folder_segmentation", "train", data_dir=str(root), upright=False)
    assert source.examples[0]["image"].size == (6, 4)


@pytest.mark.parametrize("other", ["EPS", "BMP"])
def test_a_mask_in_another_format_is_not_decoded(root, other):
    _write(root)
    PIL.Image.new("L", (6, 4)).save(root / "masks" / "a.png", other)
    with pytest.raises(BrokenImageError, match=r"a\.png can't be decoded"):
        _ = _open(root).examples[0]


@pytest.mark.parametrize(
    ("content", "names"),
    [
        ("\ufeffsky\nroad\n", ("sky", "road")),
        ("sky\r\n road \n\n \n", ("sky", "road")),
        ("\nsky\nroad\n", "blank line 1, which would be the name of class 0"),
        ("sky\n\nroad\n", "blank line 2"),
        ("sky\nroad\nsky\n", "the class 'sky' twice"),
        ("\n\n", "has 0 classes"),
    ],
)
def test_class_names_stand_on_their_lines(root, content, names):
    _write(root)
    (root / "classes.txt").write_text(content, encoding="utf-8")
    if isinstance(names, tuple):
        assert _open(root).class_names == names
    else:
        with pytest.raises(DataError, match=names):
            _open(root)


def test_two_images_for_one_mask_are_refused(root):
    _write(root, suffix="jpg")
    _write(root, suffix="png")
    with pytest.raises(DataError, match=r"a\.jpg and .*a\.png have the same name"):
        _open(root)


def test_nested_folders_and_what_is_left_out(root):
    for part, suffix in (("images", "tif"), ("masks", "png")):
        (root / part / "city").mkdir(parents=True)
        PIL.Image.new("L", (6, 4)).save(root / part / "city" / f"a.{suffix}")
    _write(root, "b")
    PIL.Image.new("L", (6, 4)).save(root / "masks" / "spare.png")
    (root / "images" / "list.csv").write_text("")
    source = _open(root)
    assert len(source.examples) == 2
    assert source.examples[1]["label"].shape == (4, 6)
    told = " ".join(source.left_out)
    assert "1 masks without an image" in told
    assert "1 .csv" in told


def _masks(root, *values):
    for i, value in enumerate(values):
        _write(root, f"{i:04}", PIL.Image.fromarray(np.array([value], np.uint8)), size=(2, 1))
    return _open(root)


def test_classes_without_a_mask_and_ignored_pixels_are_reported(root):
    (root / "classes.txt").write_text("sky\nroad\ncar\n")
    source = _masks(root, [0, 255], [0, 1], [255, 255])
    ignored, absent = survey_masks(source).sentences(source.class_names)
    assert ignored.startswith("50.0% of the pixels of 3 masks")
    assert absent.endswith("car.")


def test_masks_of_one_class_are_refused(root):
    with pytest.raises(DataError, match=r"have the class 'sky' alone, and 50\.0% of their pixels"):
        survey_masks(_masks(root, [0, 255], [0, 255]))


def test_a_sample_of_masks_is_read_and_the_others_only_for_a_second_class(root, monkeypatch):
    monkeypatch.setattr("vvt_jax.data.mask_survey._MOST", 2)
    monkeypatch.setattr("vvt_jax.data.mask_survey._AT_ONCE", 1)
    seen = survey_masks(_masks(root, [0, 0], [0, 0], [0, 1], [0, 0], [0, 0]))
    assert (seen.read, seen.examples) == (4, 5)  # the first, the last, and up to the second class
    assert "4 of 5 masks, a sample, are ignored" in seen.sentences(["sky", "road"])[0]


def test_a_mask_that_cannot_be_decoded_is_left_to_the_loader(root):
    source = _masks(root, [0, 1], [0, 1])
    (root / "masks" / "0001.png").write_bytes(b"no picture")
    assert survey_masks(source).read == 1
