"""Whole images: scores of every view, and sums at each image's own size, against plain numpy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import PIL.Image
import pytest
from flax import linen as nn

from vvt_jax.data.pixel_labels import IGNORED
from vvt_jax.inference.segment import (
    classes_at_own_size,
    make_scores,
    pixel_sums,
    segment_image,
    segmentation_metrics,
)
from vvt_jax.weights.inference_settings import check_inference

_RECORD = {
    "size": [32, 32],
    "crop_fraction": 1.0,
    "interpolation": "bilinear",
    "mean": [0.0, 0.0, 0.0],
    "std": [1.0, 1.0, 1.0],
}
_INFERENCE = {"short_side": 64, "window": [32, 32], "stride": 0, "scales": [1.0], "flip": False}


class Colours(nn.Module):
    """Logits that are a pixel's colours, plus its column (of its window) times `slope`."""

    slope: float = 0.0
    num_classes: int = 3

    @nn.compact
    def __call__(self, images, train=False):
        return 5 * images + self.slope * jnp.arange(images.shape[2])[:, None]


def _pixels(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def _interpolated(scores, height, width):
    """`[h, w, classes]` -> `[height, width, classes]`, by jax's general form."""
    shape = (height, width, scores.shape[-1])
    return np.asarray(jax.image.resize(scores, shape, "bilinear", antialias=False))


@pytest.fixture(scope="module")
def batch():
    """Scores of two images of 8 x 12, and masks of their own sizes."""
    rng = np.random.default_rng(0)
    scores = rng.normal(size=(2, 8, 12, 4)).astype(np.float32)
    sizes = [(11, 16), (5, 20)]
    masks = np.full((2, 12, 20), IGNORED, np.uint8)
    for i, (height, width) in enumerate(sizes):
        masks[i, :height, :width] = rng.choice([0, 1, 2, 3, IGNORED], (height, width))
    return scores, masks, np.array(sizes, np.int32)


def test_sums_are_those_of_each_image_at_its_own_size(batch):
    scores, masks, sizes = batch
    sums = jax.jit(pixel_sums)(scores, masks, sizes)
    loss, confusion = 0.0, np.zeros((4, 4), int)
    for i, (height, width) in enumerate(sizes):
        own = _interpolated(scores[i], height, width).astype(np.float64)
        mask = masks[i, :height, :width]
        counted = mask != IGNORED
        log_p = own - np.log(np.exp(own).sum(-1, keepdims=True))
        loss -= np.take_along_axis(log_p[counted], mask[counted][:, None], 1).sum()
        np.add.at(confusion, (mask[counted], own[counted].argmax(-1)), 1)
    np.testing.assert_array_equal(sums["confusion"], confusion)
    np.testing.assert_allclose(sums["loss"], loss, rtol=1e-5)


def test_classes_are_those_of_each_image_at_its_own_size(batch):
    scores, _, sizes = batch
    found = jax.jit(classes_at_own_size, static_argnums=(2, 3))(scores, sizes, 12, 20)
    for i, (height, width) in enumerate(sizes):
        expected = _interpolated(scores[i], height, width).argmax(-1)
        np.testing.assert_array_equal(found[i, :height, :width], expected)


def test_measurements_by_hand():
    confusion = np.array([[3, 1, 0], [2, 4, 0], [0, 0, 0]])
    metrics = segmentation_metrics(5.0, confusion)
    assert metrics["miou"] == pytest.approx((3 / 6 + 4 / 7) / 2)  # the third is nowhere
    assert metrics["pixel_accuracy"] == pytest.approx(0.7)
    assert metrics["loss"] == pytest.approx(0.5)


def _scores(model, views, **inference):
    scores = make_scores(model, _RECORD, {**_INFERENCE, **inference})
    return np.asarray(jax.jit(functools.partial(scores, {}))(views))


def test_one_view_gives_the_models_logits():
    pixels = _pixels(1, 32, 64, 3)
    np.testing.assert_allclose(_scores(Colours(), {"image": pixels}), 5 * (pixels / 255), atol=1e-5)


@pytest.mark.parametrize("stride", [16, 20, 32])
def test_windows_are_averaged_where_they_overlap(stride):
    pixels = _pixels(1, 32, 72, 3)
    starts = {16: [0, 16, 32, 40], 20: [0, 20, 40], 32: [0, 32, 40]}[stride]
    found = _scores(Colours(slope=1.0), {"image": pixels}, stride=stride)
    for column in range(72):
        seen = [column - start for start in starts if 0 <= column - start < 32]
        expected = 5 * (pixels[:, :, column] / 255) + np.mean(seen)
        np.testing.assert_allclose(found[:, :, column], expected, atol=1e-4)


def test_probabilities_of_sizes_and_mirror_images_are_averaged():
    views = {"image": _pixels(1, 32, 64, 3), "image_1": _pixels(1, 64, 128, 3, seed=1)}
    model = Colours(slope=0.1)
    found = _scores(model, views, scales=[1.0, 2.0], flip=True)
    total = 0.0
    for view in views.values():
        images = view / np.float32(255)
        column = 0.1 * np.arange(view.shape[2])[:, None]
        mirrored = (5 * images[:, :, ::-1] + column)[:, :, ::-1]
        for logits in (5 * images + column, mirrored):
            logits = jax.image.resize(logits, (1, 32, 64, 3), "bilinear", antialias=False)
            total = total + jax.nn.softmax(logits)
    np.testing.assert_allclose(np.exp(found), total / 4, atol=1e-5)


def test_an_image_is_segmented_at_its_own_size():
    pixels = np.zeros((50, 70, 3), np.uint8)
    pixels[:25, :, 0] = pixels[25:, :35, 1] = pixels[25:, 35:, 2] = 200
    card = {"preprocessing": _RECORD, "inference": _INFERENCE}
    found = segment_image(Colours(), {}, card, PIL.Image.fromarray(pixels))
    assert found.dtype == np.uint8
    assert found.shape == (50, 70)
    assert (found == pixels.argmax(-1)).mean() > 0.98


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"short_side": 16}, "`short_side` must be a whole number from 32"),
        ({"stride": 40}, "no less than 32 and the stride"),
        ({"scales": []}, "`scales` must be"),
        ({"overlap": 2}, "The settings are"),
    ],
)
def test_settings_that_cannot_be_meant(change, told):
    with pytest.raises(ValueError, match=told):
        check_inference({**_INFERENCE, **change})
