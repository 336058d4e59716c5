"""Contact sheets: images in rows, each with its label."""

from collections.abc import Sequence

import numpy as np
import PIL.Image
import PIL.ImageDraw
import PIL.ImageFont

_WIDTH = 1600  # pixels; the largest width of a sheet
_LEAST_TILE = 96  # pixels; smaller images are enlarged by a whole factor
_MARGIN, _CAPTION = 6, 18  # pixels around a tile, and height of the line below it
_FAINT = 0.02  # smaller shares of a label are omitted, such as those of label smoothing


def draw_sheet(
    images: np.ndarray, targets: np.ndarray, class_names: Sequence[str]
) -> PIL.Image.Image:
    """Draw images in rows, each with its label or, for mixed images, the shares of its labels.

    Args:
        images: the images, uint8 `[count, height, width, 3]`.
        targets: the share of each class in each image, `[count, classes]`, which sum to 1.
        class_names: the names of the classes in the order of their labels.
    """
    count, height, width = images.shape[:3]
    scale = max(1, -(-_LEAST_TILE // min(height, width)))
    cell_width = width * scale + _MARGIN
    cell_height = height * scale + _MARGIN + _CAPTION
    columns = max(1, min(count, (_WIDTH - _MARGIN) // cell_width))
    rows = -(-count // columns)
    sheet = PIL.Image.new(
        "RGB", (columns * cell_width + _MARGIN, rows * cell_height + _MARGIN), "white"
    )
    draw, font = PIL.ImageDraw.Draw(sheet), PIL.ImageFont.load_default(12)
    for index, (pixels, target) in enumerate(zip(images, targets, strict=True)):
        row, column = divmod(index, columns)
        left, top = _MARGIN + column * cell_width, _MARGIN + row * cell_height
        tile = PIL.Image.fromarray(pixels).resize(
            (width * scale, height * scale), PIL.Image.Resampling.NEAREST
        )
        sheet.paste(tile, (left, top))
        caption = _caption(target, class_names)
        while draw.textlength(caption, font) > width * scale and len(caption) > 4:
            caption = caption[:-2].rstrip("…") + "…"
        draw.text((left, top + height * scale + 2), caption, "black", font)
    return sheet


def _caption(target: np.ndarray, class_names: Sequence[str]) -> str:
    smoothed = float(target.min())  # the share of every class by label smoothing
    shares = (target - smoothed) / max(1e-9, 1 - smoothed * len(target))
    order = [i for i in np.argsort(-shares) if shares[i] > _FAINT]
    if len(order) == 1:
        return class_names[order[0]]
    return " + ".join(f"{class_names[i]} {shares[i]:.2f}" for i in order)
