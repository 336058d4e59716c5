"""ADE20K's builder on a miniature of the archive's layout."""

import io
import zipfile

import numpy as np
import PIL.EpsImagePlugin
import PIL.Image
import pytest

from vvt_jax.data.examples import DataError
from vvt_jax.data.sources import open_source
from vvt_jax.prepare import prepare

pytest.importorskip("tensorflow_datasets")

_ROOT = "ADEChallengeData2016"
_INFO = """Idx\tRatio\tTrain\tVal\tName
1\t0.1\t2\t1\twall
2\t0.1\t2\t1\tscreen, silver screen, projection screen
3\t0.1\t2\t1\tscreen, CRT screen
"""


def _encode(array, kind):
    file = io.BytesIO()
    PIL.Image.fromarray(array).save(file, kind, quality=95)
    return file.getvalue()


def _files():
    """Content by name: three images of growing size to train, two for validation."""
    files = {"objectInfo150.txt": _INFO.encode(), "sceneCategories.txt": b""}
    for split, short, count in (("training", "train", 3), ("validation", "val", 2)):
        for i in range(count):
            stem = f"ADE_{short}_{i + 1:08}"
            image = np.full((8 + i, 12, 3), 40 * i, np.uint8)
            files[f"images/{split}/{stem}.jpg"] = _encode(image, "JPEG")
            mask = np.arange(12 * (8 + i), dtype=np.uint8).reshape(8 + i, 12) % 4
            files[f"annotations/{split}/{stem}.png"] = _encode(mask, "PNG")
    return files


@pytest.fixture(params=["archive", "folder"])
def given(request, tmp_path):
    place = tmp_path / "given"
    place.mkdir()
    if request.param == "archive":
        with zipfile.ZipFile(place / f"{_ROOT}.zip", "w") as archive:
            for name, content in _files().items():
                archive.writestr(f"{_ROOT}/{name}", content)
    else:
        for name, content in _files().items():
            path = place / _ROOT / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
    return place


def test_the_prepared_masks_count_from_0_and_ignore_none_of_the_classes(given, tmp_path):
    prepare("ade20k", data_dir=str(tmp_path / "out"), manual_dir=str(given))
    for split, count in (("train", 3), ("validation", 2)):
        source = open_source("tfds:ade20k", split, data_dir=str(tmp_path / "out"))
        assert source.class_names == ("wall", "screen", "screen CRT screen")
        assert source.pixels
        assert len(source.examples) == count
        for i in range(count):
            example = source.examples[i]
            size = (8 + i, 12)
            there = np.arange(12 * size[0]).reshape(size) % 4
            np.testing.assert_array_equal(example["label"], np.where(there == 0, 255, there - 1))
            image = np.asarray(example["image"])
            assert image.shape == (*size, 3)
            np.testing.assert_allclose(image, 40 * i, atol=2)


def test_what_is_missing_is_said(tmp_path):
    with pytest.raises(DataError, match="needs --manual_dir"):
        prepare("ade20k", data_dir=str(tmp_path / "out"))
    with pytest.raises(DataError, match="has neither ADEChallengeData2016"):
        prepare("ade20k", data_dir=str(tmp_path / "out"), manual_dir=str(tmp_path))
    (tmp_path / f"{_ROOT}.zip").write_bytes(b"torn")
    with pytest.raises(DataError, match="can't be read"):
        prepare("ade20k", data_dir=str(tmp_path / "out"), manual_dir=str(tmp_path))


def test_an_image_without_its_mask_is_named(given, tmp_path):
    if (given / _ROOT).is_dir():
        (given / _ROOT / "annotations/training/ADE_train_00000002.png").unlink()
        with pytest.raises(DataError, match=r"no readable annotations/training/ADE_train_00000002"):
            prepare("ade20k", data_dir=str(tmp_path / "out"), manual_dir=str(given))


@pytest.mark.parametrize("kind", ["EPS", "GIF", "cut"])
def test_a_mask_of_another_format_is_not_even_tried(tmp_path, monkeypatch, kind):
    # Pillow would run Ghostscript for the first one
    monkeypatch.setattr(PIL.EpsImagePlugin, "Ghostscript", lambda *_, **__: pytest.fail("it ran"))
    for name, content in _files().items():
        path = tmp_path / "given" / _ROOT / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    mask = tmp_path / "given" / _ROOT / "annotations" / "training" / "ADE_train_00000001.png"
    damaged = mask.read_bytes()[:45] if kind == "cut" else _encode(np.ones((8, 12), "u1"), kind)
    mask.write_bytes(damaged)
    with pytest.raises(DataError, match=r"ADE_train_00000001\.png in .* can't be decoded as a PNG"):
        prepare("ade20k", data_dir=str(tmp_path / "out"), manual_dir=str(tmp_path / "given"))
