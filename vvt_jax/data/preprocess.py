"""The deterministic preprocessing of an image, shared by evaluation, prediction and notebooks.

A *preprocessing record* is a plain dict that is stored with a model's weights:

    {"size": [height, width],          # of the model's input, in pixels
     "crop_fraction": 0.9,             # the part of the resized image that the centre crop keeps
     "interpolation": "bicubic",       # a name in INTERPOLATIONS
     "mean": [red, green, blue],       # of pixel values scaled to 0..1
     "std": [red, green, blue]}        # likewise
"""

import math
import numbers
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import PIL.ExifTags
import PIL.Image

from vvt_jax.system.errors import UserError

INTERPOLATIONS: dict[str, PIL.Image.Resampling] = {
    method.name.lower(): method for method in PIL.Image.Resampling
}
_LARGEST_RESIZED = 2**25  # pixels; resizing a very narrow image could take gigabytes
_LARGEST_WHERE_ASKED_FOR = 2**27  # pixels, if the model's input itself is large
_LARGEST_SIDE = 2**14  # pixels
_LONGEST_COVER = 2**15  # pixels
_SMALLEST_STD, _LARGEST_STD = 1e-30, 10  # the inverse of the smallest is still a float32
_TURNS = {  # from an EXIF orientation to the operation that turns the image upright
    2: PIL.Image.Transpose.FLIP_LEFT_RIGHT,
    3: PIL.Image.Transpose.ROTATE_180,
    4: PIL.Image.Transpose.FLIP_TOP_BOTTOM,
    5: PIL.Image.Transpose.TRANSPOSE,
    6: PIL.Image.Transpose.ROTATE_270,
    7: PIL.Image.Transpose.TRANSVERSE,
    8: PIL.Image.Transpose.ROTATE_90,
}
FIELDS = ("size", "crop_fraction", "interpolation", "mean", "std")


class UnfitImageError(UserError):
    """An image that can be read but not turned into the model's input."""


def check_resized(image: PIL.Image.Image, size: tuple[int, int], asked: int) -> None:
    """Check that an image is not so long and narrow that its resized form would take gigabytes.

    Args:
        image: the image before it is resized.
        size: the (width, height) to which it would be resized.
        asked: the number of its pixels that the model's input has. The resized image may have up to
            eight times as many.

    Raises:
        UnfitImageError: if the resized image would be too large.
    """
    most = min(_LARGEST_WHERE_ASKED_FOR, max(_LARGEST_RESIZED, 8 * asked))
    if size[0] * size[1] > most:
        raise UnfitImageError(
            f"An image of {image.width} x {image.height} pixels is too long and narrow: it would "
            f"be resized to {size[0]} x {size[1]}."
        )


def check_record(record: Mapping[str, Any]) -> None:
    """Check a preprocessing record.

    Raises:
        ValueError: if a field is missing, unknown or out of range. The message names it.
    """
    if not isinstance(record, Mapping):
        raise ValueError(f"A preprocessing record must be a dict, not {type(record).__name__}.")
    if set(record) != set(FIELDS):
        raise ValueError(
            f"A preprocessing record has the fields {', '.join(FIELDS)}, "
            f"not {', '.join(map(str, record))}."
        )
    size = record["size"]
    if not _is_list(size) or len(size) != 2 or not all(map(_is_side, size)):
        raise ValueError(f"`size` must be [height, width] in whole pixels, not {size}.")
    if max(size) > _LARGEST_SIDE:
        raise ValueError(f"`size` is above {_LARGEST_SIDE} pixels: {size}.")
    crop_fraction = record["crop_fraction"]
    if not _is_number(crop_fraction) or not 0 < crop_fraction <= 1:
        raise ValueError(f"`crop_fraction` must be above 0 and at most 1, not {crop_fraction}.")
    if max(size) > _LONGEST_COVER * crop_fraction:
        raise ValueError(
            f"`crop_fraction` {crop_fraction} is too small for `size` {list(size)}: images would "
            f"be resized to more than {_LONGEST_COVER} pixels a side."
        )
    resampling(record["interpolation"])
    for field in ("mean", "std"):
        values = record[field]
        if not _is_list(values) or len(values) != 3 or not all(map(_is_number, values)):
            raise ValueError(f"`{field}` must have three numbers, not {values}.")
    if not all(0 <= value <= 1 for value in record["mean"]):
        raise ValueError(
            f"`mean` must be from 0 to 1, as pixels divided by 255 are, not {record['mean']}."
        )
    if not all(_SMALLEST_STD <= value <= _LARGEST_STD for value in record["std"]):
        raise ValueError(
            f"`std` must be from {_SMALLEST_STD} to {_LARGEST_STD}, of pixels divided by 255, not "
            f"{record['std']}."
        )


def _is_list(value: object) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str)


def _is_side(value: object) -> bool:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool) and int(value) > 0


def _is_number(value: object) -> bool:
    # Compare without converting to float: an integer may be larger than any float
    real = isinstance(value, numbers.Real) and not isinstance(value, bool)
    return real and -math.inf < value < math.inf  # type: ignore[operator]


def resampling(interpolation: str) -> PIL.Image.Resampling:
    """Return Pillow's resampling method of that name.

    Raises:
        ValueError: if there is no such method. The message lists those that exist.
    """
    if not isinstance(interpolation, str) or interpolation not in INTERPOLATIONS:
        raise ValueError(
            f"Unknown interpolation {interpolation!r}: it must be one of "
            f"{', '.join(INTERPOLATIONS)}."
        )
    return INTERPOLATIONS[interpolation]


def orientation(image: PIL.Image.Image) -> int:
    """Return the EXIF orientation of an image, 1 to 8; 1, which is upright, if it has none."""
    try:
        found = image.getexif().get(PIL.ExifTags.Base.Orientation, 1)
        return found if found in _TURNS else 1
    except Exception:  # the pixels may be intact even if the EXIF data can't be parsed
        return 1


def turn_upright(image: PIL.Image.Image) -> PIL.Image.Image:
    """Turn an image as its EXIF orientation says; the result no longer has an orientation."""
    image.load()
    if (turn := _TURNS.get(orientation(image))) is None:
        return image
    return _without_orientation(image.transpose(turn))


def _without_orientation(image: PIL.Image.Image) -> PIL.Image.Image:
    """Return a copy with the same pixels but without the EXIF orientation."""
    copy = image.copy()
    copy.info = {key: copy.info[key] for key in ("transparency",) if key in copy.info}
    return copy


def to_rgb(image: PIL.Image.Image | np.ndarray, *, upright: bool = True) -> PIL.Image.Image:
    """Convert an image to RGB, with transparent parts on white.

    The result has no EXIF orientation, so a second call does not turn it again.

    Args:
        image: a PIL image, or a uint8 array `[height, width]`, `[height, width, 1]` or
            `[height, width, 3]`.
        upright: whether to turn a PIL image as its EXIF orientation says.

    Raises:
        ValueError: if the type, dtype or shape is a different one, or the range of values of a PIL
            image is unknown.
    """
    if isinstance(image, PIL.Image.Image):
        image.load()  # turns a TIFF image upright and removes its orientation
        rgb = _blended(image)
        if orientation(image) == 1:
            return rgb
        turn = _TURNS[orientation(image)]
        return _without_orientation(rgb.transpose(turn) if upright else rgb)
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


def _blended(image: PIL.Image.Image) -> PIL.Image.Image:
    """Convert an image to RGB, with transparent parts on white, without turning it."""
    if image.mode == "RGB" and "transparency" not in image.info:
        return image  # `convert` would copy it
    sixteen_bits = image.mode.startswith("I;16") or (
        # Pillow opens PPM files of more than 8 bits in this mode and scales them to 16 bits
        image.mode == "I" and image.format == "PPM"
    )
    if sixteen_bits:
        values = np.asarray(image)
        # Pillow would clip the values to 8 bits, which makes nearly everything white.
        grey = (values >> 8).astype(np.uint8)
        if isinstance(clear := image.info.get("transparency"), int):
            grey[values == clear] = 255
        return PIL.Image.fromarray(grey).convert("RGB")
    if image.mode in ("I", "F"):
        raise ValueError(
            f"An image of mode {image.mode!r} has no fixed range of values: convert it to "
            "8 bits first."
        )
    if not image.has_transparency_data:
        return image.convert("RGB")
    if image.mode == "La":  # Pillow converts this mode only to LA
        image = image.convert("LA")
    rgba = image.convert("RGBA")
    white = PIL.Image.new("RGB", rgba.size, "white")
    white.paste(rgba, mask=rgba.getchannel("A"))
    return white


def eval_image(image: PIL.Image.Image | np.ndarray, record: Mapping[str, Any]) -> np.ndarray:
    """Resize an image to cover `size / crop_fraction`, keeping proportions, and crop the centre.

    The lengths match timm's evaluation, on which published accuracies are based: both sides of
    `size / crop_fraction` are rounded down, and the resized image just covers them.

    Args:
        image: an image, as for `to_rgb`.
        record: a preprocessing record.

    Returns:
        uint8 `[height, width, 3]`, of the size in the record.

    Raises:
        ValueError: if the record or the image is unsuitable.
        UnfitImageError: if the image is so long and narrow that it would be resized to more than
            2^25 pixels and more than eight times the pixels to be covered, or in any case to more
            than 2^27 pixels.
    """
    check_record(record)
    rgb = to_rgb(image)
    height, width = record["size"]
    cover_height = math.floor(height / record["crop_fraction"])
    cover_width = math.floor(width / record["crop_fraction"])
    # timm has two resizing functions, which round the longer side differently.
    whole = math.floor if cover_height == cover_width else round
    if cover_height * rgb.width >= cover_width * rgb.height:
        resized = (whole(rgb.width * cover_height / rgb.height), cover_height)
    else:
        resized = (cover_width, whole(rgb.height * cover_width / rgb.width))
    check_resized(rgb, resized, cover_height * cover_width)
    rgb = rgb.resize(resized, resampling(record["interpolation"]))
    left = round((rgb.width - width) / 2)
    top = round((rgb.height - height) / 2)
    return np.array(rgb.crop((left, top, left + width, top + height)))


def normalize(images: Any, record: Mapping[str, Any]) -> Any:
    """Compute `(images / 255 - mean) / std` in float32.

    Args:
        images: uint8 `[..., 3]`, a NumPy or JAX array, which may be traced, as in the training
            step.
        record: a preprocessing record.

    Returns:
        A float32 array of the same shape and kind as `images`.

    Raises:
        ValueError: if the images aren't uint8, since they may already be normalised.
    """
    if images.dtype != np.uint8:
        raise ValueError(
            f"Images to normalise must be uint8 with values 0..255, not {images.dtype}."
        )
    mean = np.asarray(record["mean"], np.float32)
    std = np.asarray(record["std"], np.float32)
    return (images / np.float32(255) - mean) / std


def preprocess(image: PIL.Image.Image | np.ndarray, card: Mapping[str, Any]) -> np.ndarray:
    """Prepare an image as evaluation does: float32 `[1, height, width, 3]`, ready for the model.

    Args:
        image: an image, as for `to_rgb`.
        card: a model's card, which has the preprocessing record as `preprocessing`.
    """
    record = card["preprocessing"]
    return normalize(eval_image(image, record)[np.newaxis], record)
