"""Random augmentation of a training image, as functions of the image and a NumPy generator."""

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
    """Crop a random rectangle from an image and resize it to `size`, as torchvision does.

    Up to ten rectangles are drawn. If none of them fits, the largest centred rectangle with an
    allowed aspect ratio is used.

    Args:
        image: an RGB image.
        rng: the source of randomness.
        size: the (height, width) of the result, in pixels.
        interpolation: a name in `preprocess.INTERPOLATIONS`.
        scale: the range of the rectangle's area, as a fraction of the image's area.
        ratio: the range of the rectangle's aspect ratio, width / height, which is drawn uniformly
            on a log scale.
    """
    left, top, width, height = _random_box(image.width, image.height, rng, scale, ratio)
    # Crop first, because `resize(box=...)` would blend in pixels from around the rectangle.
    cropped = image.crop((left, top, left + width, top + height))
    return cropped.resize((size[1], size[0]), preprocess.resampling(interpolation))


def _random_box(
    image_width: int,
    image_height: int,
    rng: np.random.Generator,
    scale: tuple[float, float],
    ratio: tuple[float, float],
) -> tuple[int, int, int, int]:
    """Draw (left, top, width, height) of a rectangle inside the image, in pixels."""
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
    """Flip an image horizontally with probability 0.5, or else return the image itself."""
    return image.transpose(PIL.Image.Transpose.FLIP_LEFT_RIGHT) if rng.random() < 0.5 else image


def color_jitter(
    image: PIL.Image.Image, rng: np.random.Generator, strength: float
) -> PIL.Image.Image:
    """Change brightness, contrast and saturation in random order, as torchvision does.

    Args:
        image: an RGB image.
        rng: the source of randomness.
        strength: the range of the three factors, each of which is drawn uniformly from
            `[max(0, 1 - strength), 1 + strength]`.
    """
    for index, factor in _draw_jitter(rng, strength):
        image = _JITTERS[index](image).enhance(factor)
    return image


def _draw_jitter(rng: np.random.Generator, strength: float) -> list[tuple[int, float]]:
    """Draw the index into `_JITTERS` and the factor of each change, in the order of application."""
    factors = rng.uniform(max(0.0, 1 - strength), 1 + strength, size=3).tolist()
    return [(index, factors[index]) for index in rng.permutation(3).tolist()]


def random_shift(image: np.ndarray, rng: np.random.Generator, pixels: int) -> np.ndarray:
    """Shift an image by whole pixels, drawn uniformly from `[-pixels, pixels]` for each axis.

    Uncovered pixels become 0.

    Args:
        image: an array `[height, width, channels]`.
        rng: the source of randomness.
        pixels: the largest shift, in pixels.
    """
    height, width = image.shape[:2]
    padded = np.pad(image, ((pixels, pixels), (pixels, pixels), (0, 0)))
    top, left = rng.integers(2 * pixels + 1, size=2)
    return padded[top : top + height, left : left + width]


def check_augment(augment: Mapping[str, Any]) -> None:
    """Check the settings of `train_image`, ignoring any other fields.

    Raises:
        ValueError: if a field is missing or out of range. The message names it.
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
    """Augment an image for training.

    Args:
        image: an image, as for `preprocess.to_rgb`. A PIL image that has not been decoded yet is
            decoded here.
        rng: the source of randomness.
        record: the preprocessing record, which gives the size, the interpolation and, as its mean,
            the colour with which RandAugment fills uncovered pixels.
        augment: the settings, which are not checked here: call `check_augment` once for all images.
            The steps are, in this order: `crop`, `"resize"` (as in evaluation) or
            `"random_resized_crop"`, with `min_scale`, the smallest fraction of the image's area
            that a random crop shows; `flip`, whether to flip half of the images; `randaugment`, a
            specification for `randaugment.parse` (`""` for none); `color_jitter`, the strength of
            `color_jitter` (0 for none), which applies only if `randaugment` is empty; `shift`, the
            largest shift, in pixels of the model's input.

    Returns:
        uint8 `[height, width, 3]`, of the size in the record. The array may be read-only.

    Raises:
        ValueError: if the image is unsuitable.
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
    """Augment an example of a source: `image` as `train_image` returns it, and `label`, int32."""
    image = train_image(example["image"], rng, record, augment)
    return {"image": image, "label": np.int32(example["label"])}
