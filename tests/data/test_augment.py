"""Augmentation: what may come out, how often, and that only the generator decides."""

import io
import itertools

import numpy as np
import PIL.Image
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import ImageEnhance

from vvt_jax.data import augment, preprocess, randaugment

_RECORD = {
    "size": [24, 40],
    "crop_fraction": 0.9,
    "interpolation": "bilinear",
    "mean": [0.5, 0.5, 0.5],
    "std": [0.5, 0.5, 0.5],
}
_AUGMENT = {
    "crop": "random_resized_crop",
    "min_scale": 0.08,
    "flip": True,
    "shift": 2,
    "randaugment": "rand-m9-mstd0.5-inc1",
    "color_jitter": 0.4,
}
_NOTHING = {
    "crop": "resize",
    "min_scale": 0.08,
    "flip": False,
    "shift": 0,
    "randaugment": "",
    "color_jitter": 0.0,
}


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


def test_boxes_are_as_often_tall_as_wide():
    """The logarithm of width / height is what is even, not the ratio, which would favour wide."""
    rng = np.random.default_rng(0)
    boxes = [augment._random_box(400, 400, rng, (0.08, 0.5), (1 / 3, 3)) for _ in range(2000)]
    logarithms = np.log([w / h for _, _, w, h in boxes])
    assert abs(logarithms.mean()) < 0.05


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
    pixels = _noise(5, 7, 3)
    image = PIL.Image.fromarray(pixels)
    rng = np.random.default_rng(0)
    flipped = 0
    for _ in range(400):
        result = np.asarray(augment.random_flip(image, rng))
        mirrored = np.array_equal(result, pixels[:, ::-1])
        assert mirrored or np.array_equal(result, pixels)
        flipped += mirrored
    assert 160 < flipped < 240
    np.testing.assert_array_equal(image, pixels)


def _jitter_draws(strength, count):
    """`[count, 3, 2]`: the kind and the factor of every change in `count` images."""
    rng = np.random.default_rng(0)
    return np.array([augment._draw_jitter(rng, strength) for _ in range(count)])


def test_color_jitter_draws_even_factors_in_every_order():
    draws = _jitter_draws(0.4, 3000)
    orders, counts = np.unique(draws[..., 0], axis=0, return_counts=True)
    assert sorted(map(tuple, orders)) == sorted(itertools.permutations(range(3)))
    assert 400 < counts.min() < counts.max() < 600
    for kind in range(3):
        factors = draws[..., 1][draws[..., 0] == kind]
        assert 0.6 <= factors.min() < 0.605
        assert 1.395 < factors.max() <= 1.4
        quartiles = np.quantile(factors, [0.25, 0.5, 0.75])
        np.testing.assert_allclose(quartiles, [0.8, 1.0, 1.2], atol=0.03)


def test_color_jitter_has_no_factors_below_zero():
    factors = _jitter_draws(1.5, 300)[..., 1]
    assert 0 <= factors.min() < 0.05
    assert 2.4 < factors.max() <= 2.5


@settings(deadline=None, max_examples=50)
@given(
    size=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    seed=st.integers(0, 2**32 - 1),
    strength=st.floats(0, 2),
)
def test_color_jitter_is_pillows_of_its_draws(size, seed, strength):
    image = PIL.Image.fromarray(_noise(*size, 3))
    before = image.copy()
    result = augment.color_jitter(image, np.random.default_rng(seed), strength)
    rng = np.random.default_rng(seed)
    factors = rng.uniform(max(0, 1 - strength), 1 + strength, 3)
    expected = image
    enhancers = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)
    for kind in rng.permutation(3):
        expected = enhancers[kind](expected).enhance(factors[kind])
    assert result == expected
    assert result.size == image.size
    assert image == before


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


@pytest.mark.parametrize("crop", augment.CROPS)
@pytest.mark.parametrize("change", [{}, {"randaugment": ""}, {"color_jitter": 0.0}])
def test_train_image_of_pil_images_and_arrays_is_the_same(crop, change):
    pixels = _noise(50, 70, 3)
    file = io.BytesIO()
    PIL.Image.fromarray(pixels).save(file, "PNG")
    settings_ = _AUGMENT | {"crop": crop} | change
    for seed in range(5):
        expected = augment.train_image(pixels, np.random.default_rng(seed), _RECORD, settings_)
        for image in (
            PIL.Image.fromarray(pixels),
            PIL.Image.fromarray(pixels).convert("RGBA"),
            PIL.Image.open(file),
        ):
            result = augment.train_image(image, np.random.default_rng(seed), _RECORD, settings_)
            np.testing.assert_array_equal(result, expected)
            np.testing.assert_array_equal(np.asarray(image)[..., :3], pixels)


@settings(deadline=None, max_examples=50)
@given(
    shape=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    size=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    crop=st.sampled_from(augment.CROPS),
    spec=st.sampled_from(["", "rand-m9-mstd0.5-inc1-p1"]),
    seed=st.integers(0, 2**32 - 1),
)
def test_train_image_of_any_size_depends_on_the_generator_alone(shape, size, crop, spec, seed):
    image = _noise(*shape, 3)
    before = image.copy()
    arguments = (_RECORD | {"size": list(size)}, _AUGMENT | {"crop": crop, "randaugment": spec})
    first, again = (
        augment.train_image(image, np.random.default_rng(seed), *arguments) for _ in range(2)
    )
    assert (first.shape, first.dtype) == ((*size, 3), np.uint8)
    np.testing.assert_array_equal(first, again)
    np.testing.assert_array_equal(image, before)


def test_train_image_without_augmentation_is_the_evaluation_image():
    image = _noise(50, 70, 3)
    result = augment.train_image(image, np.random.default_rng(0), _RECORD, _NOTHING)
    np.testing.assert_array_equal(result, preprocess.eval_image(image, _RECORD))


@pytest.mark.parametrize("spec", ["rand-m9-mstd0.5-inc1", ""])
def test_train_image_crops_flips_then_augments_then_shifts(spec):
    record = _RECORD | {"mean": [0.485, 0.456, 0.406], "interpolation": "bicubic"}
    image = PIL.Image.fromarray(_noise(30, 50, 3))
    for seed in range(10):
        result = augment.train_image(
            image, np.random.default_rng(seed), record, _AUGMENT | {"randaugment": spec}
        )
        rng = np.random.default_rng(seed)
        step = augment.random_resized_crop(image, rng, (24, 40), "bicubic", (0.08, 1.0))
        step = augment.random_flip(step, rng)
        if spec:
            policy = randaugment.parse(spec)
            step = randaugment.randaugment(step, rng, policy, (124, 116, 104), "bicubic")
        else:
            step = augment.color_jitter(step, rng, 0.4)
        expected = augment.random_shift(np.asarray(step), rng, 2)
        np.testing.assert_array_equal(result, expected)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"crop": "centre"}, "'centre'.*resize.*random_resized_crop"),
        ({"min_scale": 0.0}, "min_scale.*0.0"),
        ({"shift": -1}, "shift.*-1"),
        ({"randaugment": "rand-m9-q1"}, "'q1'.*'rand-m9-q1'"),
        ({"color_jitter": -0.4}, "color_jitter.*-0.4"),
        ({"color_jitter": float("nan")}, "color_jitter.*nan"),
        ({"color_jitter": float("inf")}, "color_jitter.*inf"),
    ],
)
def test_settings_are_checked(change, words):
    with pytest.raises(ValueError, match=words) as refused:
        augment.check_augment(_AUGMENT | change)
    assert "\n" not in str(refused.value)


def test_good_settings_pass_the_check():
    augment.check_augment(_AUGMENT)
    augment.check_augment(_NOTHING | {"mixup": 0.8})


def test_missing_settings_are_named():
    with pytest.raises(ValueError, match="lack flip, shift, randaugment, color_jitter"):
        augment.check_augment({"crop": "resize", "min_scale": 0.1})
