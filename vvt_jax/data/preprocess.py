"""The deterministic side of one image, shared by evaluation, prediction and notebooks.

A *preprocessing record* is a plain dict that is stored with a model's weights:

    {"size": [height, width],          # pixels of the model's input
     "crop_fraction": 0.9,             # the part of the resized image that the centre crop keeps
     "interpolation": "bicubic",       # a name in INTERPOLATIONS
     "mean": [red, green, blue],       # of pixels in 0..1
     "std": [red, green, blue]}
"""

import math
import numbers
from collections.abc import Mapping
from typing import Any

import numpy as np
import PIL.Image

INTERPOLATIONS: dict[str, PIL.Image.Resampling] = {
    method.name.lower(): method for method in PIL.Image.Resampling
}
_LARGEST_RESIZED = 2**27  # pixels; a line of pixels would become gigabytes
FIELDS = ("size", "crop_fraction", "interpolation", "mean", "std")


def check_record(record: Mapping[str, Any]) -> None:
    """Checks a preprocessing record.

    Raises:
        ValueError: a field is missing, unknown or out of range; one sentence says which.
    """
    if set(record) != set(FIELDS):
        raise ValueError(
            f"A preprocessing record has the fields {', '.join(FIELDS)}, "
            f"not {', '.join(map(str, record))}."
        )
    size = record["size"]
    if len(size) != 2 or any(int(side) != side or side < 1 for side in size):
        raise ValueError(f"`size` must be [height, width] in whole pixels, not {size}.")
    if not 0 < record["crop_fraction"] <= 1:
        raise ValueError(
            f"`crop_fraction` must be above 0 and at most 1, not {record['crop_fraction']}."
        )
    resampling(record["interpolation"])
    for field in ("mean", "std"):
        if len(record[field]) != 3 or not all(map(_is_finite, record[field])):
            raise ValueError(f"`{field}` must have three numbers, not {record[field]}.")
    if min(record["std"]) <= 0:
        raise ValueError(f"`std` must be above 0, not {record['std']}.")


def _is_finite(value: object) -> bool:
    return isinstance(value, numbers.Real) and math.isfinite(float(value))


def resampling(interpolation: str) -> PIL.Image.Resampling:
    """Pillow's method of that name; ValueError names the known ones."""
    if interpolation not in INTERPOLATIONS:
        raise ValueError(
            f"Unknown interpolation {interpolation!r}: it must be one of "
            f"{', '.join(INTERPOLATIONS)}."
        )
    return INTERPOLATIONS[interpolation]


def to_rgb(image: PIL.Image.Image | np.ndarray) -> PIL.Image.Image:
    """An RGB image; transparency is dropped, not blended.

    Args:
        image: a PIL image, or a uint8 array `[height, width]`, `[height, width, 1]` or
            `[height, width, 3]`.

    Raises:
        ValueError: another type or shape, or a PIL image whose range of values isn't known.
    """
    if isinstance(image, PIL.Image.Image):
        if image.mode == "RGB":
            return image  # `convert` would copy it; transparency of this mode is one colour's
        if image.mode.startswith("I;16"):
            # Pillow would clip 16 bits to 8, leaving a white image.
            return PIL.Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
        if image.mode in ("I", "F"):
            raise ValueError(
                f"An image of mode {image.mode!r} has no fixed range of values: convert it to "
                "8 bits first."
            )
        # By way of RGBA, because Pillow warns about palettes with transparency otherwise.
        if image.has_transparency_data:
            image = image.convert("RGBA")
        return image.convert("RGB")
    if not isinstance(image, np.ndarray):
        raise ValueError(f"An image must be a PIL image or a numpy array, not {type(image)}.")
    if image.dtype != np.uint8:
        raise ValueError(f"An image array must be uint8 with values 0..255, not {image.dtype}.")
    if image.ndim == 3 and image.shape[-1] == 1:
        image = image[..., 0]
    if 0 in image.shape or not (image.ndim == 2 or (image.ndim == 3 and image.shape[-1] == 3)):
        raise ValueError(
            "An image array must be [height, width], [height, width, 1] or [height, width, 3], "
            f"not {list(image.shape)}."
        )
    return PIL.Image.fromarray(image).convert("RGB")


def eval_image(image: PIL.Image.Image | np.ndarray, record: Mapping[str, Any]) -> np.ndarray:
    """Resizes to cover `size / crop_fraction`, keeping proportions, and takes the centre.

    The lengths are those of timm's evaluation, on which published accuracies rest: both sides of
    `size / crop_fraction` are rounded down, and the image just covers them.

    Args:
        image: as for `to_rgb`.
        record: a preprocessing record.

    Returns:
        uint8 `[height, width, 3]` of the record's size.

    Raises:
        ValueError: the record, or an image so long and narrow that covering the size needs more
            than 2^27 pixels.
    """
    check_record(record)
    rgb = to_rgb(image)
    height, width = record["size"]
    cover_height = math.floor(height / record["crop_fraction"])
    cover_width = math.floor(width / record["crop_fraction"])
    # timm has two resizers, which round the longer side differently.
    whole = math.floor if cover_height == cover_width else round
    if cover_height * rgb.width >= cover_width * rgb.height:
        resized = (whole(rgb.width * cover_height / rgb.height), cover_height)
    else:
        resized = (cover_width, whole(rgb.height * cover_width / rgb.width))
    if resized[0] * resized[1] > _LARGEST_RESIZED:
        raise ValueError(
            f"An image of {rgb.width} x {rgb.height} pixels is too long and narrow for an input of "
            f"{width} x {height}."
        )
    rgb = rgb.resize(resized, resampling(record["interpolation"]))
    left = round((rgb.width - width) / 2)
    top = round((rgb.height - height) / 2)
    return np.array(rgb.crop((left, top, left + width, top + height)))


def normalize(images: Any, record: Mapping[str, Any]) -> Any:
    """`(images / 255 - mean) / std` in float32.

    Args:
        images: uint8 `[..., 3]`, a numpy or JAX array; may be traced, as in the training step.
        record: a preprocessing record.

    Returns:
        float32, the shape and kind of array that was given.

    Raises:
        ValueError: the images aren't uint8, so they may be normalised already.
    """
    if images.dtype != np.uint8:
        raise ValueError(
            f"Images to normalise must be uint8 with values 0..255, not {images.dtype}."
        )
    mean = np.asarray(record["mean"], np.float32)
    std = np.asarray(record["std"], np.float32)
    return (images / np.float32(255) - mean) / std


def preprocess(image: PIL.Image.Image | np.ndarray, card: Mapping[str, Any]) -> np.ndarray:
    """What evaluation feeds the model: float32 `[1, height, width, 3]`.

    Args:
        image: as for `to_rgb`.
        card: a model's card; its `preprocessing` is the record.
    """
    record = card["preprocessing"]
    return normalize(eval_image(image, record)[np.newaxis], record)
