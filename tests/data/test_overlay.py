"""Pictures of segmentations: what each pixel of them is."""

import numpy as np
import PIL.Image
import pytest

from vvt_jax.data.overlay import draw_comparison, draw_overlay, index_mask, palette


@pytest.fixture
def classes():
    return np.array([[0, 1, 2], [149, 255, 0]], np.uint8)


def test_each_class_has_its_colour():
    colours = palette(150)[:150]
    assert len(np.unique(colours, axis=0)) == 150
    steps = np.abs(np.diff(colours.astype(int), axis=0)).sum(1)
    assert steps.min() > 60  # neighbours in number can be told apart


def test_a_mask_holds_the_numbers_and_shows_the_colours(classes, tmp_path):
    index_mask(classes, 150).save(tmp_path / "mask.png")
    with PIL.Image.open(tmp_path / "mask.png") as mask:
        assert mask.mode == "P"
        np.testing.assert_array_equal(np.asarray(mask), classes)
        np.testing.assert_array_equal(np.asarray(mask.convert("RGB")), palette(150)[classes])


def test_an_overlay_mixes_colours_but_for_ignored_pixels(classes):
    image = PIL.Image.new("RGB", (3, 2), (100, 50, 200))
    drawn = np.asarray(draw_overlay(image, classes, 150, strength=0.5))
    expected = np.round(0.5 * np.array([100, 50, 200]) + 0.5 * palette(150)[classes].astype(float))
    expected[1, 1] = (100, 50, 200)
    np.testing.assert_array_equal(drawn, expected)


def test_a_sheet_shows_image_truth_and_prediction():
    image = PIL.Image.new("RGB", (20, 20), "white")
    truth, predicted = np.zeros((20, 20), np.uint8), np.ones((20, 20), np.uint8)
    sheet = np.asarray(draw_comparison([image], [truth], [predicted], ["sky", "road"]))
    middle = [sheet[100, 6 + 96 + i * 198] for i in range(3)]
    for seen, kind in zip(middle, (None, truth, predicted), strict=True):
        drawn = image if kind is None else draw_overlay(image, kind, 2)
        np.testing.assert_array_equal(seen, np.asarray(drawn)[0, 0])
    colours = {tuple(colour) for colour in sheet[200:].reshape(-1, 3)}
    assert {tuple(colour) for colour in palette(2)[:2]} <= colours
