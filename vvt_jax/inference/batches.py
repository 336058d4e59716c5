"""Images one by one, in lists and in batches."""

import itertools
import os
from collections.abc import Iterable, Iterator
from typing import Any, TypeAlias

import numpy as np
import PIL.Image

from vvt_jax.data.image_files import decode

ImageLike: TypeAlias = str | os.PathLike | PIL.Image.Image | np.ndarray


def several(images: ImageLike | Iterable[ImageLike]) -> Iterable[ImageLike]:
    """Return several images as they are, and a single one as a list of one."""
    one = isinstance(images, str | os.PathLike | PIL.Image.Image) or (
        isinstance(images, np.ndarray) and images.ndim < 4
    )
    return [images] if one else images  # type: ignore[list-item, return-value]


def batched(items: Iterable[Any], size: int) -> Iterator[list[Any]]:
    items = iter(items)
    while batch := list(itertools.islice(items, size)):
        yield batch


def read_upright(path: str) -> PIL.Image.Image:
    """Read the RGB image in a file, turned upright according to its EXIF orientation.

    Raises:
        BrokenImageError: the file can't be decoded.
    """
    return decode(path, path, upright=True)
