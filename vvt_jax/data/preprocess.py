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
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import PIL.ExifTags
import PIL.Image

from vvt_jax.system.errors import UserError

INTERPOLATIONS: dict[str, PIL.Image.Resampling] = {
    method.name.lower(): method for method in PIL.Image.Resampling
}
_LARGEST_RESIZED = 2**25  # pixels; a line of pixels would become gigabytes
_LARGEST_WHERE_ASKED_FOR = 2**27  # pixels, where the model's input itself is large
_LARGEST_SIDE = 2**14  # pixels
_LONGEST_COVER = 2**15  # pixels
_SMALLEST_STD, _LARGEST_STD = 1e-30, 10  # the inverse of the smallest one is still a float32
_TURNS = {  # from an EXIF orientation to what shows the image upright
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
    """An image that the model's input can't be made of, whatever its file."""


def check_resized(image: PIL.Image.Image, size: tuple[int, int], asked: int) -> None:
    """Refuses an image so long and narrow that its resized form would take gigabytes.

    Args:
        image: the image.
        size: (width, height) that it would be resized to.
        asked: pixels that the model's input has of it; up to eight times as many are granted.

    Raises:
        UnfitImageError: it would.
    """
    most = min(_LARGEST_WHERE_ASKED_FOR, max(_LARGEST_RESIZED, 8 * asked))
    if size[0] * size[1] > most:
        raise UnfitImageError(
            f"An image of {image.width} x {image.height} pixels is too long and narrow: it would "
            f"be resized to {size[0]} x {size[1]}."
        )


def check_record(record: Mapping[str, Any]) -> None:
    """Checks a preprocessing record.

    Raises:
        ValueError: a field is missing, unknown or out of range; one sentence says which.
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
    # Compared and not converted: a whole number may be larger than any float
    real = isinstance(value, numbers.Real) and not isinstance(value, bool)
    return real and -math.inf < value < math.inf  # type: ignore[operator]


def resampling(interpolation: str) -> PIL.Image.Resampling:
    """Pillow's method of that name; ValueError names the known ones."""
    if not isinstance(interpolation, str) or interpolation not in INTERPOLATIONS:
        raise ValueError(
            f"Unknown interpolation {interpolation!r}: it must be one of "
            f"{', '.join(INTERPOLATIONS)}."
        )
    return INTERPOLATIONS[interpolation]


def orientation(image: PIL.Image.Image) -> int:
    """The EXIF orientation of an image, 1 to 8; 1, which is upright, if it says none."""
    try:
        found = image.getexif().get(PIL.ExifTags.Base.Orientation, 1)
        return found if found in _TURNS else 1
    except Exception:  # EXIF data that can't be parsed says nothing, and the pixels may be sound
        return 1


def turn_upright(image: PIL.Image.Image) -> PIL.Image.Image:
    """The image as its EXIF orientation shows it; the result has no orientation of its own."""
    image.load()
    if (turn := _TURNS.get(orientation(image))) is None:
        return image
    return _without_orientation(image.transpose(turn))


def _without_orientation(image: PIL.Image.Image) -> PIL.Image.Image:
    """A copy with the same pixels."""
    copy = image.copy()
    copy.info = {key: copy.info[key] for key in ("transparency",) if key in copy.info}
    return copy


def to_rgb(image: PIL.Image.Image | np.ndarray, *, upright: bool = True) -> PIL.Image.Image:
    """An RGB image, transparent parts on white.

    The result has no EXIF orientation of its own, so that a second call does not turn it again.

    Args:
        image: a PIL image, or a uint8 array `[height, width]`, `[height, width, 1]` or
            `[height, width, 3]`.
        upright: turn a PIL image as its EXIF orientation says.

    Raises:
        ValueError: another type or shape, or a PIL image whose range of values isn't known.
    """
    if isinstance(image, PIL.Image.Image):
        image.load()  # which turns a TIFF file upright and takes its orientation away
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
    """In RGB, transparent parts on white; not turned."""
    if image.mode == "RGB" and "transparency" not in image.info:
        return image  # `convert` would copy it
    sixteen_bits = image.mode.startswith("I;16") or (
        # Pillow gives a PPM file with more than 8 bits this mode, and scales it to 16
        image.mode == "I" and image.format == "PPM"
    )
    if sixteen_bits:
        values = np.asarray(image)
        # Pillow would clip 16 bits to 8, leaving a white image.
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
    if image.mode == "La":  # which Pillow converts to LA only
        image = image.convert("LA")
    rgba = image.convert("RGBA")
    white = PIL.Image.new("RGB", rgba.size, "white")
    white.paste(rgba, mask=rgba.getchannel("A"))
    return white


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
        ValueError: the record.
        UnfitImageError: an image so long and narrow that covering the size needs more than 2^25
            pixels, or eight times the size.
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
    check_resized(rgb, resized, cover_height * cover_width)
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
