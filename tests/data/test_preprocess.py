"""The deterministic preprocessing: sizes, colours, positions, and refusals."""

import io
import json
import pathlib
import runpy

import chex
import jax
import jax.numpy as jnp
import numpy as np
import PIL.Image
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vvt_jax.data import preprocess

_FOLDER = pathlib.Path(__file__).parent
_MAKER = runpy.run_path(str(_FOLDER / "make_timm_fixtures.py"))
_FIXTURES = dict(np.load(_FOLDER / "timm.npz"))
_META = json.loads(bytes(_FIXTURES["meta"]))


def _record(size=(32, 32), crop_fraction=1.0, interpolation="bilinear"):
    return {
        "size": list(size),
        "crop_fraction": crop_fraction,
        "interpolation": interpolation,
        "mean": [0.485, 0.456, 0.406],
        "std": [0.229, 0.224, 0.225],
    }


def _noise(*shape):
    return np.random.default_rng(0).integers(256, size=shape, dtype=np.uint8)


def _palette_with_transparency():
    image = PIL.Image.fromarray(_noise(8, 9, 3)).quantize(16)
    file = io.BytesIO()
    image.save(file, "PNG", transparency=b"\x00\x80" + b"\xff" * 14)
    file.seek(0)
    return PIL.Image.open(file)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "HSV"])
def test_to_rgb_of_any_mode(mode):
    rgb = preprocess.to_rgb(PIL.Image.fromarray(_noise(8, 9, 3)).convert(mode))
    assert (rgb.mode, rgb.size) == ("RGB", (9, 8))


def _on_white(rgba):
    share = rgba[..., 3:].astype(float) / 255
    return rgba[..., :3] * share + 255 * (1 - share)


def test_to_rgb_shows_transparent_parts_on_white():
    pixels = _noise(8, 9, 4)
    pixels[0, :, 3] = 0
    rgb = np.asarray(preprocess.to_rgb(PIL.Image.fromarray(pixels)))
    assert (rgb[0] == 255).all()
    np.testing.assert_allclose(rgb, _on_white(pixels), atol=1)
    palette = _palette_with_transparency()
    assert palette.mode == "P"
    expected = _on_white(np.asarray(palette.convert("RGBA")))
    np.testing.assert_allclose(np.asarray(preprocess.to_rgb(palette)), expected, atol=1)


@pytest.mark.parametrize(
    ("mode", "hidden", "clear"),
    [("RGB", (9, 8, 7), (9, 8, 7)), ("L", 9, 9), ("I;16", 2313, 2313), ("1", 0, 0)],
)
def test_one_transparent_colour_is_white(mode, hidden, clear):
    image = PIL.Image.new(mode, (4, 3), hidden)
    file = io.BytesIO()
    image.save(file, "PNG", transparency=clear)
    rgb = preprocess.to_rgb(PIL.Image.open(file))
    assert (np.asarray(rgb) == 255).all()


@pytest.mark.parametrize("mode", ["LA", "La", "PA", "RGBa"])
def test_other_modes_with_transparency_are_white_where_nothing_is(mode):
    clear = PIL.Image.new("LA" if "L" in mode else "RGBA", (4, 3))
    assert (np.asarray(preprocess.to_rgb(clear.convert(mode))) == 255).all()


def _oriented(orientation, size=(6, 4), image_format="PNG"):
    """An image whose pixels all differ, as a file with that orientation, opened."""
    width, height = size
    pixels = np.arange(width * height * 3, dtype=np.uint8).reshape(height, width, 3)
    exif = PIL.Image.Exif()
    exif[PIL.ExifTags.Base.Orientation] = orientation
    file = io.BytesIO()
    PIL.Image.fromarray(pixels).save(file, image_format, exif=exif, lossless=True)
    file.seek(0)
    return PIL.Image.open(file), pixels


@pytest.mark.parametrize("image_format", ["PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_images_are_turned_upright_once(orientation, image_format):
    opened, _ = _oriented(orientation, image_format=image_format)
    expected = np.asarray(PIL.ImageOps.exif_transpose(opened))
    rgb = preprocess.to_rgb(_oriented(orientation, image_format=image_format)[0])
    np.testing.assert_array_equal(np.asarray(rgb), expected)
    np.testing.assert_array_equal(np.asarray(preprocess.to_rgb(rgb)), expected)


def test_images_can_be_left_as_they_are_stored():
    opened, pixels = _oriented(6)
    rgb = preprocess.to_rgb(opened, upright=False)
    np.testing.assert_array_equal(np.asarray(preprocess.to_rgb(rgb)), pixels)


def test_preprocess_follows_the_orientation_of_a_pil_image():
    record = {"size": [6, 4], "crop_fraction": 1.0, "interpolation": "nearest"}
    card = {"preprocessing": {**record, "mean": [0.0] * 3, "std": [1.0] * 3}}
    opened, pixels = _oriented(6)
    found = preprocess.preprocess(opened, card)[0]
    np.testing.assert_allclose(found, np.rot90(pixels, -1).astype(np.float32) / 255, rtol=1e-6)


def test_damaged_exif_data_says_nothing():
    image = PIL.Image.new("RGB", (4, 3), (1, 2, 3))
    image.info["exif"] = b"Exif\x00\x00no header"
    assert preprocess.to_rgb(image).getpixel((0, 0)) == (1, 2, 3)


def test_grey_ppm_files_of_sixteen_bits_keep_the_brightness():
    file = io.BytesIO(b"P5 2 1 65535\n" + bytes([128, 0, 1, 255]))
    assert np.asarray(preprocess.to_rgb(PIL.Image.open(file)))[0, :, 0].tolist() == [128, 1]


def test_to_rgb_of_sixteen_bits_keeps_the_brightness():
    pixels = np.uint16([[0, 256, 32768, 65535]])
    rgb = preprocess.to_rgb(PIL.Image.fromarray(pixels))
    np.testing.assert_array_equal(np.asarray(rgb)[0, :, 0], [0, 1, 128, 255])


@pytest.mark.parametrize("shape", [(8, 9), (8, 9, 1), (8, 9, 3)])
def test_to_rgb_of_arrays(shape):
    pixels = _noise(*shape)
    rgb = np.asarray(preprocess.to_rgb(pixels))
    np.testing.assert_array_equal(rgb, np.broadcast_to(pixels.reshape(8, 9, -1), (8, 9, 3)))


@pytest.mark.parametrize(
    ("image", "words"),
    [
        (np.zeros((8, 9, 3), np.float32), "uint8"),
        (np.zeros((8, 9, 4), np.uint8), r"\[8, 9, 4\]"),
        (np.zeros((2, 8, 9, 3), np.uint8), r"\[2, 8, 9, 3\]"),
        (np.zeros((0, 9, 3), np.uint8), r"\[0, 9, 3\]"),
        (np.zeros(9, np.uint8), r"\[9\]"),
        ("cat.jpg", "str"),
        (PIL.Image.new("F", (4, 4)), "'F'"),
    ],
)
def test_to_rgb_refuses(image, words):
    with pytest.raises(ValueError, match=words):
        preprocess.to_rgb(image)


@settings(deadline=None, max_examples=60)
@given(
    source=st.tuples(st.integers(1, 90), st.integers(1, 90)),
    size=st.tuples(st.integers(1, 70), st.integers(1, 70)),
    crop_fraction=st.floats(0.3, 1),
    method=st.sampled_from(sorted(preprocess.INTERPOLATIONS)),
)
def test_eval_image_has_the_size_and_no_border(source, size, crop_fraction, method):
    white = np.full((*source, 3), 255, np.uint8)
    image = preprocess.eval_image(white, _record(size, crop_fraction, method))
    chex.assert_shape(image, (*size, 3))
    assert image.dtype == np.uint8
    assert image.min() == 255  # A crop that reached outside would be black there.


@pytest.mark.parametrize(
    ("source", "size", "crop_fraction", "resized"),
    [
        # timm: (floor(size / fraction)) on the short side; the long side floored if square.
        ((300, 500), (224, 224), 0.875, (256, 426)),
        ((500, 333), (224, 224), 0.9, (372, 248)),
        ((64, 64), (32, 32), 1.0, (32, 32)),
        ((300, 500), (192, 256), 0.9, (213, 355)),
        ((500, 300), (192, 256), 0.9, (473, 284)),
        ((300, 400), (100, 100), 1.0, (100, 133)),
    ],
)
def test_eval_image_follows_timm(source, size, crop_fraction, resized):
    pixels = _noise(*source, 3)
    image = PIL.Image.fromarray(pixels).resize(resized[::-1], PIL.Image.Resampling.BICUBIC)
    top = round((resized[0] - size[0]) / 2)
    left = round((resized[1] - size[1]) / 2)
    expected = np.asarray(image)[top : top + size[0], left : left + size[1]]
    given_image = preprocess.eval_image(pixels, _record(size, crop_fraction, "bicubic"))
    np.testing.assert_array_equal(given_image, expected)


@pytest.mark.parametrize("case", range(len(_META["evaluation"])))
def test_eval_image_equals_timm(case):
    shape, size, crop_fraction = _META["evaluation"][case]
    image = preprocess.eval_image(
        _MAKER["picture"](*shape), _record(size, crop_fraction, "bicubic")
    )
    digest, sample = _MAKER["fingerprint"](image)
    versions = f"made with Pillow {_META['versions']['pillow']}, tested with {PIL.__version__}"
    expected = _FIXTURES["evaluation_sample"][case]
    np.testing.assert_array_equal(sample, expected, err_msg=versions)
    np.testing.assert_array_equal(digest, _FIXTURES["evaluation_sha256"][case], err_msg=versions)


def test_eval_image_at_its_own_size_changes_nothing():
    pixels = _noise(32, 48, 3)
    np.testing.assert_array_equal(preprocess.eval_image(pixels, _record((32, 48))), pixels)


def test_normalize_is_the_same_for_numpy_jax_and_jit():
    pixels = _noise(2, 8, 9, 3)
    record = _record()
    expected = (pixels / 255.0 - np.array(record["mean"])) / np.array(record["std"])
    on_host = preprocess.normalize(pixels, record)
    on_device = preprocess.normalize(jnp.asarray(pixels), record)
    traced = jax.jit(lambda images: preprocess.normalize(images, record))(pixels)
    assert isinstance(on_host, np.ndarray)
    assert isinstance(on_device, jax.Array)
    for images in (on_host, on_device, traced):
        assert images.dtype == np.float32
        np.testing.assert_allclose(images, expected, rtol=0, atol=1e-6)


def test_normalize_refuses_floats():
    with pytest.raises(ValueError, match=r"uint8.*float32"):
        preprocess.normalize(np.zeros((2, 2, 3), np.float32), _record())


def test_preprocess_is_what_evaluation_feeds_the_model():
    record = _record((32, 40), 0.9, "bicubic")
    image = PIL.Image.fromarray(_noise(50, 70))
    images = preprocess.preprocess(image, {"preprocessing": record, "classes": ["a"]})
    chex.assert_shape(images, (1, 32, 40, 3))
    assert images.dtype == np.float32
    expected = preprocess.normalize(preprocess.eval_image(image, record), record)
    np.testing.assert_array_equal(images[0], expected)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"size": [32]}, "size"),
        ({"size": [32, 0]}, "size"),
        ({"size": [32, 3.5]}, "size"),
        ({"crop_fraction": 0}, "crop_fraction"),
        ({"crop_fraction": 1.5}, "crop_fraction"),
        ({"interpolation": "cubic"}, "'cubic'.*bilinear.*bicubic"),
        ({"mean": [0.5]}, "mean"),
        ({"std": [0.5, 0.5, 0]}, "std"),
        ({"colour": "red"}, "colour"),
    ],
)
def test_record_is_checked(change, words):
    record = _record() | change
    with pytest.raises(ValueError, match=words) as refused:
        preprocess.eval_image(_noise(8, 8), record)
    assert "\n" not in str(refused.value)
