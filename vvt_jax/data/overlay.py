"""Visualisations of segmentations: a colour for each class, over the image or as an index mask."""

import colorsys
from collections.abc import Sequence

import numpy as np
import PIL.Image
import PIL.ImageDraw
import PIL.ImageFont

from vvt_jax.data.pixel_labels import IGNORED

_GOLDEN = 0.618033988749895  # of the hue circle between consecutive classes, to keep them apart
_TILE_HEIGHT, _MARGIN, _LINE = 192, 6, 16  # pixels
_LEGEND = 24  # number of classes named below a sheet, the most frequent ones


def palette(num_classes: int) -> np.ndarray:
    """Return a colour for each class, uint8 `[256, 3]`, with white for ignored pixels."""
    colours = np.zeros((256, 3), np.uint8)
    for i in range(num_classes):
        value = (1.0, 0.75, 0.5)[i % 3]
        rgb = colorsys.hsv_to_rgb(i * _GOLDEN % 1, 0.85, value)
        colours[i] = [round(255 * part) for part in rgb]
    colours[IGNORED] = 255
    return colours


def index_mask(classes: np.ndarray, num_classes: int) -> PIL.Image.Image:
    """Return an image whose pixels are class numbers, coloured by a palette, like VOC's masks.

    Args:
        classes: the class of each pixel, uint8 `[height, width]`.
        num_classes: the number of the model's classes.
    """
    image = PIL.Image.fromarray(classes).convert("L")
    image.putpalette(palette(num_classes).tobytes())
    return image


def draw_overlay(
    image: PIL.Image.Image, classes: np.ndarray, num_classes: int, strength: float = 0.6
) -> PIL.Image.Image:
    """Tint each pixel of an image with the colour of its class, except for ignored pixels.

    Args:
        image: an RGB image.
        classes: the class of each pixel, uint8 `[height, width]`, of the image's size.
        num_classes: the number of the model's classes.
        strength: the share of the class's colour in the result, from 0 to 1.
    """
    pixels = np.asarray(image, np.float32)
    tinted = (1 - strength) * pixels + strength * palette(num_classes)[classes]
    kept = np.where((classes == IGNORED)[..., None], pixels, tinted)
    return PIL.Image.fromarray(np.round(kept).astype(np.uint8))


def draw_comparison(
    images: Sequence[PIL.Image.Image],
    truths: Sequence[np.ndarray],
    predictions: Sequence[np.ndarray] | None,
    class_names: Sequence[str],
) -> PIL.Image.Image:
    """Draw a sheet that compares ground truth and predictions.

    Each row shows an image, its ground truth and, if given, the prediction. Below the rows is a
    legend of the most frequent classes.

    Args:
        images: the RGB images.
        truths: the ground truth of each image, uint8 `[height, width]`, of the image's size.
        predictions: the predictions, in the same form as the ground truth, or None.
        class_names: the names of the classes in the order of their labels.
    """
    count = len(class_names)
    rows = []
    for i, (image, truth) in enumerate(zip(images, truths, strict=True)):
        tiles = [image, draw_overlay(image, truth, count)]
        if predictions is not None:
            tiles.append(draw_overlay(image, predictions[i], count))
        width = max(1, round(image.width * _TILE_HEIGHT / image.height))
        rows.append([tile.resize((width, _TILE_HEIGHT)) for tile in tiles])
    every = np.concatenate([t.ravel() for t in (*truths, *(predictions or ()))])
    frequency = np.bincount(every, minlength=256)[:count]
    named = [int(i) for i in np.argsort(-frequency, kind="stable")[:_LEGEND] if frequency[i]]
    width = max(sum(tile.width + _MARGIN for tile in row) for row in rows) + _MARGIN
    columns = max(1, width // 160)
    lines = -(-len(named) // columns)
    top = _MARGIN + len(rows) * (_TILE_HEIGHT + _MARGIN)
    sheet = PIL.Image.new("RGB", (width, top + lines * _LINE + _MARGIN), "white")
    for number, row in enumerate(rows):
        left = _MARGIN
        for tile in row:
            sheet.paste(tile, (left, _MARGIN + number * (_TILE_HEIGHT + _MARGIN)))
            left += tile.width + _MARGIN
    draw, font = PIL.ImageDraw.Draw(sheet), PIL.ImageFont.load_default(11)
    colours = palette(count)
    for place, index in enumerate(named):
        line, column = divmod(place, columns)
        x, y = _MARGIN + column * 160, top + line * _LINE
        draw.rectangle((x, y, x + 11, y + 11), fill=tuple(colours[index].tolist()))
        draw.text((x + 16, y - 1), class_names[index][:22], "black", font)
    return sheet
