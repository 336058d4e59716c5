"""Random changes of one training image: functions of the image and a numpy generator."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import PIL.Image
from PIL import ImageEnhance

from vvt_jax.data import preprocess, randaugment

CROPS = ("resize", "random_resized_crop")
_FIELDS = ("crop", "min_scale", "flip", "shift", "randaugment", "color_jitter")
_JITTERS = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)


def random_resized_crop(
    image: PIL.Image.Image,
    rng: np.random.Generator,
    size: tuple[int, int],
    interpolation: str,
    scale: tuple[float, float] = (0.08, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
) -> PIL.Image.Image:
    """Resizes a random rectangle of the image to `size`, as torchvision does.

    Ten rectangles are tried; should none fit, the largest centred one of an allowed ratio is taken.

    Args:
        image: an RGB image.
        rng: the source of randomness.
        size: (height, width) of the result, in pixels.
        interpolation: a name in `preprocess.INTERPOLATIONS`.
        scale: the range of the rectangle's area, as a fraction of the image's.
        ratio: the range of the rectangle's width / height, drawn evenly on a log scale.
    """
    left, top, width, height = _random_box(image.width, image.height, rng, scale, ratio)
    # Cropped first: `resize(box=...)` would blend in pixels from around the rectangle.
    cropped = image.crop((left, top, left + width, top + height))
    return cropped.resize((size[1], size[0]), preprocess.resampling(interpolation))


def _random_box(
    image_width: int,
    image_height: int,
    rng: np.random.Generator,
    scale: tuple[float, float],
    ratio: tuple[float, float],
) -> tuple[int, int, int, int]:
    """(left, top, width, height) of a rectangle inside the image, in pixels."""
    for _ in range(10):
        area = image_width * image_height * rng.uniform(*scale)
        aspect = math.exp(rng.uniform(math.log(ratio[0]), math.log(ratio[1])))
        width = round(math.sqrt(area * aspect))
        height = round(math.sqrt(area / aspect))
        if 0 < width <= image_width and 0 < height <= image_height:
            left = int(rng.integers(image_width - width + 1))
            top = int(rng.integers(image_height - height + 1))
            return left, top, width, height
    aspect = min(max(image_width / image_height, ratio[0]), ratio[1])
    width = max(1, min(image_width, round(image_height * aspect)))
    height = max(1, min(image_height, round(image_width / aspect)))
    return (image_width - width) // 2, (image_height - height) // 2, width, height


def random_flip(image: PIL.Image.Image, rng: np.random.Generator) -> PIL.Image.Image:
    """Mirrors left and right in half of all cases; the image itself in the others."""
    return image.transpose(PIL.Image.Transpose.FLIP_LEFT_RIGHT) if rng.random() < 0.5 else image


def color_jitter(
    image: PIL.Image.Image, rng: np.random.Generator, strength: float
) -> PIL.Image.Image:
    """Changes brightness, contrast and saturation in a random order, as torchvision does.

    Args:
        image: an RGB image.
        rng: the source of randomness.
        strength: each of the three factors is even in `[max(0, 1 - strength), 1 + strength]`.
    """
    for index, factor in _draw_jitter(rng, strength):
        image = _JITTERS[index](image).enhance(factor)
    return image


def _draw_jitter(rng: np.random.Generator, strength: float) -> list[tuple[int, float]]:
    """The index into `_JITTERS` and the factor of each change, in the order of the changes."""
    factors = rng.uniform(max(0.0, 1 - strength), 1 + strength, size=3).tolist()
    return [(index, factors[index]) for index in rng.permutation(3).tolist()]


def random_shift(image: np.ndarray, rng: np.random.Generator, pixels: int) -> np.ndarray:
    """Moves the image by whole pixels, even in `[-pixels, pixels]` both ways, and fills with 0.

    Args:
        image: `[height, width, channels]`.
        rng: the source of randomness.
        pixels: the largest shift.
    """
    height, width = image.shape[:2]
    padded = np.pad(image, ((pixels, pixels), (pixels, pixels), (0, 0)))
    top, left = rng.integers(2 * pixels + 1, size=2)
    return padded[top : top + height, left : left + width]


def check_augment(augment: Mapping[str, Any]) -> None:
    """Checks the settings of `train_image`; fields that it doesn't know are left to others.

    Raises:
        ValueError: a field is missing or out of range; one sentence says which.
    """
    missing = [field for field in _FIELDS if field not in augment]
    if missing:
        raise ValueError(f"The augmentation settings lack {', '.join(missing)}.")
    if augment["crop"] not in CROPS:
        raise ValueError(f"Unknown crop {augment['crop']!r}: it must be one of {', '.join(CROPS)}.")
    if not 0 < augment["min_scale"] <= 1:
        raise ValueError(f"`min_scale` must be above 0 and at most 1, not {augment['min_scale']}.")
    if augment["shift"] < 0:
        raise ValueError(f"`shift` must be 0 pixels or more, not {augment['shift']}.")
    if augment["randaugment"]:
        randaugment.parse(augment["randaugment"])
    if not 0 <= augment["color_jitter"] < math.inf:
        raise ValueError(f"`color_jitter` must be 0 or more, not {augment['color_jitter']}.")


def train_image(
    image: PIL.Image.Image | np.ndarray,
    rng: np.random.Generator,
    record: Mapping[str, Any],
    augment: Mapping[str, Any],
) -> np.ndarray:
    """One image as training sees it.

    Args:
        image: as for `preprocess.to_rgb`. A PIL image that is not decoded yet is decoded here.
        rng: the source of randomness.
        record: the preprocessing record, which gives the size, the interpolation and, as its mean,
            the colour of what RandAugment moves in.
        augment: what to do, in this order; `check_augment` checks it, once for all images. `crop`,
            `"resize"` (as in evaluation) or `"random_resized_crop"`; `min_scale`, the smallest part
            of the image's area that a random crop shows; `flip`, whether half of the images are
            mirrored; `randaugment`, a specification for `randaugment.parse` (`""`: none);
            `color_jitter`, the strength of `color_jitter` (0: none), which acts only where
            `randaugment` is empty; `shift`, the largest shift, in pixels of the model's input.

    Returns:
        uint8 `[height, width, 3]` of the record's size; it may be read-only.

    Raises:
        ValueError: the image is unsuitable.
    """
    if augment["crop"] == "resize":
        changed = PIL.Image.fromarray(preprocess.eval_image(image, record))
    else:
        changed = random_resized_crop(
            preprocess.to_rgb(image),
            rng,
            tuple(record["size"]),
            record["interpolation"],
            scale=(augment["min_scale"], 1.0),
        )
    if augment["flip"]:
        changed = random_flip(changed, rng)
    if augment["randaugment"]:
        red, green, blue = (min(255, round(255 * value)) for value in record["mean"])
        changed = randaugment.randaugment(
            changed,
            rng,
            randaugment.parse(augment["randaugment"]),
            fill=(red, green, blue),
            interpolation=record["interpolation"],
        )
    elif augment["color_jitter"]:
        changed = color_jitter(changed, rng, augment["color_jitter"])
    pixels = np.asarray(changed)
    if augment["shift"]:
        pixels = np.ascontiguousarray(random_shift(pixels, rng, augment["shift"]))
    return pixels


def train_example(
    example: Mapping[str, Any],
    rng: np.random.Generator,
    record: Mapping[str, Any],
    augment: Mapping[str, Any],
) -> dict[str, Any]:
    """An example of a source as `train_image` changes it: `image`, and `label`, int32."""
    image = train_image(example["image"], rng, record, augment)
    return {"image": image, "label": np.int32(example["label"])}
