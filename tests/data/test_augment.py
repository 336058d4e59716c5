"""Augmentation: what may come out, how often, and that only the generator decides."""

import numpy as np
import PIL.Image
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vvt_jax.data import augment, preprocess

_RECORD = {
    "size": [24, 40],
    "crop_fraction": 0.9,
    "interpolation": "bilinear",
    "mean": [0.5, 0.5, 0.5],
    "std": [0.5, 0.5, 0.5],
}
_AUGMENT = {"crop": "random_resized_crop", "min_scale": 0.08, "flip": True, "shift": 2}


def _noise(*shape):
    return np.random.default_rng(0).integers(256, size=shape, dtype=np.uint8)


@settings(deadline=None, max_examples=200)
@given(
    width=st.integers(1, 400),
    height=st.integers(1, 400),
    seed=st.integers(0, 2**32 - 1),
    min_scale=st.floats(0.01, 1),
)
def test_box_lies_inside_and_keeps_to_scale_and_ratio(width, height, seed, min_scale):
    rng = np.random.default_rng(seed)
    left, top, w, h = augment._random_box(width, height, rng, (min_scale, 1.0), (3 / 4, 4 / 3))
    assert left >= 0
    assert top >= 0
    assert w >= 1
    assert h >= 1
    assert left + w <= width
    assert top + h <= height
    if w > 20 and h > 20:
        assert 3 / 4 * 0.95 <= w / h <= 4 / 3 * 1.05


def test_box_areas_are_even():
    rng = np.random.default_rng(0)
    boxes = [augment._random_box(400, 400, rng, (0.08, 1.0), (3 / 4, 4 / 3)) for _ in range(4000)]
    areas = np.array([w * h for _, _, w, h in boxes]) / 400**2
    assert 0.075 <= areas.min() < 0.1
    # Large boxes are often too wide or too high and are drawn again, which lowers the mean of .54.
    assert 0.45 < areas.mean() < 0.54
    assert (areas < 0.31).mean() == pytest.approx(0.25, abs=0.07)


@pytest.mark.parametrize(
    ("size", "box"),
    [((10, 1000), (0, 493, 10, 13)), ((1000, 10), (493, 0, 13, 10))],
)
def test_box_of_an_image_where_none_fits_is_centred(size, box):
    rng = np.random.default_rng(0)
    assert augment._random_box(*size, rng, (0.9, 1.0), (3 / 4, 4 / 3)) == box


def test_random_resized_crop_of_everything_is_a_resize():
    image = PIL.Image.fromarray(_noise(30, 50, 3))
    cropped = augment.random_resized_crop(
        image, np.random.default_rng(0), (24, 40), "bicubic", (1.0, 1.0), (50 / 30, 50 / 30)
    )
    assert cropped == image.resize((40, 24), PIL.Image.Resampling.BICUBIC)


def test_random_flip_mirrors_half_of_all():
    image = _noise(5, 7, 3)
    rng = np.random.default_rng(0)
    flipped = 0
    for _ in range(400):
        result = augment.random_flip(image, rng)
        mirrored = np.array_equal(result, image[:, ::-1])
        assert mirrored or np.array_equal(result, image)
        flipped += mirrored
    assert 160 < flipped < 240


def test_random_shift_reaches_every_shift_and_fills_with_zeros():
    image = np.zeros((9, 11, 3), np.uint8)
    image[4, 5] = 255
    rng = np.random.default_rng(0)
    counts = np.zeros((5, 5), int)
    for _ in range(2000):
        shifted = augment.random_shift(image, rng, 2)
        assert shifted.shape == image.shape
        (row, column), *others = np.argwhere(shifted[..., 0])
        assert not others
        counts[row - 2, column - 3] += 1
    assert counts.min() > 40  # 80 are expected of each of the 25.
    white = np.full((9, 11, 3), 255, np.uint8)
    assert any(augment.random_shift(white, rng, 2).min() == 0 for _ in range(10))


@pytest.mark.parametrize("crop", augment.CROPS)
@pytest.mark.parametrize("shape", [(8, 8, 1), (30, 50), (100, 20, 3)])
def test_train_image(crop, shape):
    settings_ = _AUGMENT | {"crop": crop}
    image = _noise(*shape)
    first, again, other = (
        augment.train_image(image, np.random.default_rng(seed), _RECORD, settings_)
        for seed in (1, 1, 2)
    )
    assert (first.shape, first.dtype, first.flags.c_contiguous) == ((24, 40, 3), np.uint8, True)
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)


def test_train_image_without_augmentation_is_the_evaluation_image():
    nothing = {"crop": "resize", "min_scale": 0.08, "flip": False, "shift": 0}
    image = _noise(50, 70, 3)
    result = augment.train_image(image, np.random.default_rng(0), _RECORD, nothing)
    np.testing.assert_array_equal(result, preprocess.eval_image(image, _RECORD))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"crop": "centre"}, "'centre'.*resize.*random_resized_crop"),
        ({"min_scale": 0.0}, "min_scale"),
        ({"shift": -1}, "shift"),
    ],
)
def test_settings_are_checked(change, words):
    with pytest.raises(ValueError, match=words):
        augment.train_image(_noise(8, 8), np.random.default_rng(0), _RECORD, _AUGMENT | change)


def test_missing_settings_are_named():
    with pytest.raises(ValueError, match="lack flip, shift"):
        augment.check_augment({"crop": "resize", "min_scale": 0.1})
