"""Images with a class for each pixel: training augmentation, and batches of whole images.

Masks are uint8 `[height, width]`. `IGNORED` marks pixels that count neither in the loss nor in any
measurement.
"""

import contextlib
import functools
import math
from collections.abc import Generator, Mapping, Sequence
from typing import Any

import grain
import numpy as np
import PIL.Image

from vvt_jax.data import augment as augment_lib
from vvt_jax.data import preprocess
from vvt_jax.data.examples import BrokenImageError, Examples, Source
from vvt_jax.data.loader import Batch, check, stream

IGNORED = 255
MULTIPLE = 32  # pixels; the sides of whole images are rounded to multiples, so that few sizes occur
_LONGEST = 4  # times the short side; longer images are shrunk further
_CROPS = 10  # attempts to find a crop in which no class has too large a share
_CANVAS = 128  # pixels; the masks of a batch are padded to a multiple
_BRIGHTNESS, _CONTRAST, _SATURATION, _HUE = 32, (0.5, 1.5), (0.5, 1.5), 18 / 180


def train_example(
    example: Mapping[str, Any],
    rng: np.random.Generator,
    record: Mapping[str, Any],
    augment: Mapping[str, Any],
) -> dict[str, Any]:
    """Augment an image and its mask for training by random resizing, cropping, flips and colours.

    The short side is resized to that of `record["size"]` times a factor drawn from the range
    `augment["scale"]`. Of up to ten random crops, the first is used in which no class has more than
    `augment["class_share"]` of the pixels that are not ignored, or else the last one.
    `augment["flip"]` determines whether half of the images are flipped, and
    `augment["photometric"]` whether colours are distorted. If an image is smaller than the crop, it
    is padded with the mean colour, and its mask with `IGNORED`.

    Args:
        example: a dict of `image`, as for `preprocess.to_rgb`, and `label`, its mask.
        rng: the source of randomness.
        record: the preprocessing record.
        augment: the settings, which `check_augment` checks.

    Returns:
        A dict of `image`, uint8 `[height, width, 3]`, and `segmentation`, uint8 `[height, width]`.

    Raises:
        UnfitImageError: if the image is so long and narrow that its resized form would take
            gigabytes.
    """
    image, mask = preprocess.to_rgb(example["image"]), PIL.Image.fromarray(example["label"])
    height, width = record["size"]
    ratio = min(height, width) * rng.uniform(*augment["scale"]) / min(image.size)
    size = (max(1, round(image.width * ratio)), max(1, round(image.height * ratio)))
    preprocess.check_resized(image, size, min(size) ** 2)
    image = image.resize(size, preprocess.resampling(record["interpolation"]))
    mask = mask.resize(size, PIL.Image.Resampling.NEAREST)
    box = _crop_box(np.asarray(mask), rng, (height, width), augment["class_share"])
    image, mask = image.crop(box), mask.crop(box)
    if augment["flip"] and rng.random() < 0.5:
        image = image.transpose(PIL.Image.Transpose.FLIP_LEFT_RIGHT)
        mask = mask.transpose(PIL.Image.Transpose.FLIP_LEFT_RIGHT)
    if augment["photometric"]:
        image = photometric_distortion(image, rng)
    pixels = np.empty((height, width, 3), np.uint8)
    pixels[:] = np.round(255 * np.asarray(record["mean"]))
    classes = np.full((height, width), IGNORED, np.uint8)
    pixels[: image.height, : image.width] = image
    classes[: mask.height, : mask.width] = mask
    return {"image": pixels, "segmentation": classes}


def _crop_box(
    mask: np.ndarray, rng: np.random.Generator, size: tuple[int, int], share: float
) -> tuple[int, int, int, int]:
    """Draw a crop of at most that size as (left, top, right, bottom)."""
    height, width = (min(side, of) for side, of in zip(size, mask.shape, strict=True))
    for _ in range(_CROPS):
        top = int(rng.integers(mask.shape[0] - height + 1))
        left = int(rng.integers(mask.shape[1] - width + 1))
        counts = np.bincount(mask[top : top + height, left : left + width].ravel(), minlength=256)
        counts[IGNORED] = 0
        if share == 1 or 0 < counts.max() <= share * counts.sum():
            break
    return left, top, left + width, top + height


def photometric_distortion(image: PIL.Image.Image, rng: np.random.Generator) -> PIL.Image.Image:
    """Change brightness, contrast, saturation and hue, each with probability 0.5.

    As in SSD (Liu et al., arXiv 1512.02325), brightness changes by up to 32 of 255, contrast and
    saturation by a factor of 0.5 to 1.5, and hue by up to a tenth of the colour circle. Contrast is
    changed either before or after saturation and hue.

    Args:
        image: an RGB image.
        rng: the source of randomness.
    """
    on = rng.random(4) < 0.5
    contrast_first = rng.random() < 0.5
    shift, contrast, saturation, hue = (
        rng.uniform(-_BRIGHTNESS, _BRIGHTNESS),
        rng.uniform(*_CONTRAST),
        rng.uniform(*_SATURATION),
        rng.uniform(-_HUE, _HUE),
    )
    linear = np.arange(256, dtype=np.float64)
    if on[0]:
        linear = np.clip(linear + shift, 0, 255)
    if on[1] and contrast_first:
        linear = np.clip(linear * contrast, 0, 255)
    image = image.point([round(value) for value in linear] * 3)
    if on[2] or on[3]:
        channels = np.array(image.convert("HSV"))
        if on[2]:
            channels[..., 1] = np.clip(np.round(channels[..., 1] * saturation), 0, 255)
        if on[3]:
            channels[..., 0] += np.uint8(round(hue * 256) % 256)  # around the circle
        image = PIL.Image.fromarray(channels, "HSV").convert("RGB")
    if on[1] and not contrast_first:
        image = image.point([round(min(255.0, i * contrast)) for i in range(256)] * 3)
    return image


def check_augment(augment: Mapping[str, Any]) -> None:
    """Check the settings of `train_example`, including that those for classification are off.

    Raises:
        ValueError: if a setting is unsuitable. The message names it.
    """
    augment_lib.check_augment(augment)
    scale = augment["scale"]
    if len(scale) != 2 or not 0 < scale[0] <= scale[1]:
        raise ValueError(f"`scale` must be (smallest, largest) above 0, not {scale}.")
    if not 0 < augment["class_share"] <= 1:
        raise ValueError(
            f"`class_share` must be above 0 and at most 1, not {augment['class_share']}."
        )
    for field in ("shift", "randaugment", "color_jitter", "erase", "mixup", "cutmix"):
        if augment[field]:
            raise ValueError(
                f"`{field}` is for classification: a segmenter is trained without it, not "
                f"{augment[field]!r}."
            )


def whole_size(height: int, width: int, short_side: int) -> tuple[int, int]:
    """Return the model's input size (height, width) for a whole image, in multiples of `MULTIPLE`.

    The short side becomes `short_side`, and the proportions are kept up to rounding. Images whose
    long side is more than four times their short side are shrunk further, until the long side is
    four times `short_side`.

    Args:
        height, width: the size of the image, in pixels.
        short_side: the length of the short side, in pixels.
    """
    ratio = min(short_side / min(height, width), _LONGEST * short_side / max(height, width))
    return _whole(height * ratio), _whole(width * ratio)


def _whole(length: float) -> int:
    return MULTIPLE * max(1, math.floor(length / MULTIPLE + 0.5))


def view_names(scales: Sequence[float]) -> list[str]:
    """Return the names under which batches hold the same image at each of `scales`."""
    return ["image", *(f"image_{i}" for i in range(1, len(scales)))]


def whole_views(
    image: PIL.Image.Image | np.ndarray, record: Mapping[str, Any], inference: Mapping[str, Any]
) -> dict[str, np.ndarray]:
    """Return the whole image at each scale of the inference, uint8 `[h, w, 3]` by name.

    Args:
        image: an image, as for `preprocess.to_rgb`.
        record: the preprocessing record.
        inference: the settings `short_side` and `scales`; see `vvt_jax.segment`.
    """
    rgb = preprocess.to_rgb(image)
    height, width = whole_size(rgb.height, rgb.width, inference["short_side"])
    views = {}
    for name, scale in zip(view_names(inference["scales"]), inference["scales"], strict=True):
        # Scale the rounded size, so that images of equal size are equal in all views
        size = (_whole(width * scale), _whole(height * scale))
        resized = rgb.resize(size, preprocess.resampling(record["interpolation"]))
        views[name] = np.asarray(resized)
    return views


def whole_image_batches(
    source: Source,
    *,
    record: Mapping[str, Any],
    inference: Mapping[str, Any],
    batch_size: int,
    broken: list[int] | None,
    workers: int = 0,
    threads: int = 4,
) -> Generator[Batch, None, None]:
    """Generate batches of whole images that contain every image exactly once, grouped by size.

    Batches that are still incomplete at the end are padded with black images.

    Args:
        source: the source of the examples.
        record: the preprocessing record.
        inference: the settings, as for `whole_views`.
        batch_size: the number of examples in a batch.
        broken: a list to which the numbers of examples that can't be used are added; such examples
            are left out. None raises an error for them instead.
        workers: the number of worker processes. With 0, this process does the work.
        threads: the number of threads that prepare images in each worker.

    Returns:
        A generator of batches with the views of `whole_views`, uint8 `[batch, h, w, 3]`;
        `segmentation`, uint8 `[batch, height, width]`, the masks in their own sizes, padded on the
        right and at the bottom with `IGNORED`; `own_size`, int32 `[batch, 2]`, their heights and
        widths; and `mask`, bool `[batch]`, False for padding.

    Raises:
        DataError: if the source is empty, or, without `broken`, as BrokenImageError if an image
            can't be decoded.
        ValueError: if a setting is out of range, or, without `broken`, as UnfitImageError if an
            image is too long and narrow.
    """
    check(source, batch_size, workers, threads)

    prepare = functools.partial(
        _whole_example,
        examples=source.examples,
        record=record,
        inference=inference,
        skip=broken is not None,
    )
    waiting: dict[tuple[int, ...], list[dict[str, Any]]] = {}
    numbers = grain.MapDataset.range(len(source.examples))
    examples = stream(numbers.map(prepare), workers, threads)
    with contextlib.closing(examples):
        for example in examples:
            if broken is not None and "broken" in example:
                broken.append(int(example["broken"]))
                continue
            size = example["image"].shape
            group = waiting.setdefault(size, [])
            group.append(example)
            if len(group) == batch_size:
                yield _stack(waiting.pop(size), batch_size)
    for group in waiting.values():
        yield _stack(group, batch_size)


def _whole_example(
    index: int,
    examples: Examples,
    record: Mapping[str, Any],
    inference: Mapping[str, Any],
    skip: bool,
) -> dict[str, Any]:
    try:
        example = examples[index]
        views = whole_views(example["image"], record, inference)
    except (BrokenImageError, preprocess.UnfitImageError):
        if not skip:
            raise
        return {"broken": np.int32(index)}
    return {**views, "label": example["label"]}


def _stack(examples: list[dict[str, Any]], batch_size: int) -> Batch:
    masks = [example.pop("label") for example in examples]
    batch = {
        name: np.zeros((batch_size, *views.shape), np.uint8) for name, views in examples[0].items()
    }
    for i, example in enumerate(examples):
        for name, view in example.items():
            batch[name][i] = view
    height, width = (
        _CANVAS * math.ceil(max(mask.shape[axis] for mask in masks) / _CANVAS) for axis in (0, 1)
    )
    batch["segmentation"] = np.full((batch_size, height, width), IGNORED, np.uint8)
    batch["own_size"] = np.ones((batch_size, 2), np.int32)
    for i, mask in enumerate(masks):
        batch["segmentation"][i, : mask.shape[0], : mask.shape[1]] = mask
        batch["own_size"][i] = mask.shape
    batch["mask"] = np.arange(batch_size) < len(examples)
    return batch
