"""A survey of the masks before training: which classes they contain and how much is ignored.

Masks with the values 0 and 255, which many tools write for two classes, are valid, but 255 is
ignored. A model trained on them learns a single class, and learns it perfectly.
"""

import dataclasses
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from vvt_jax.data.examples import BrokenImageError, DataError, Source
from vvt_jax.data.pixel_labels import IGNORED

_MOST = 256  # masks in the sample, if there are more
_AT_ONCE = 32  # further masks read at a time in search of a second class
_THREADS = 4
_MOST_NAMED = 10  # classes listed in a sentence


@dataclasses.dataclass(frozen=True)
class MaskSurvey:
    """The contents of a number of masks.

    Attributes:
        pixels: the number of pixels of each class and, at index 255, of ignored pixels, int64
            `[256]`.
        read: the number of masks that were read.
        examples: the number of masks in total.
    """

    pixels: np.ndarray
    read: int
    examples: int

    def sentences(self, class_names: Sequence[str]) -> list[str]:
        """Return sentences for the user about the share of ignored pixels and absent classes."""
        share = self.pixels[IGNORED] / max(1, self.pixels.sum())
        read = f"{self.read} masks"
        if self.read < self.examples:
            read = f"{self.read} of {self.examples} masks, a sample,"
        told = [f"{share:.1%} of the pixels of {read} are ignored ({IGNORED})."]
        if missing := [name for i, name in enumerate(class_names) if not self.pixels[i]]:
            more = len(missing) - _MOST_NAMED
            named = ", ".join(missing[:_MOST_NAMED]) + (f" and {more} more" if more > 0 else "")
            told.append(f"None of these masks has the class {named}.")
        return told


def survey_masks(source: Source) -> MaskSurvey:
    """Count the pixels of each class in the masks of a source, or in an evenly spaced sample.

    If the sample has fewer than two classes, further masks are read until a second one is found.

    Raises:
        DataError: if all masks together have fewer than two classes, so there is nothing to learn.
    """
    count = len(source.examples)
    sample = np.unique(np.linspace(0, count - 1, min(count, _MOST)).round().astype(int))
    pixels = np.zeros(256, np.int64)
    read = 0
    with ThreadPoolExecutor(_THREADS) as pool:
        for counted in pool.map(lambda i: _count(source, i), sample.tolist()):
            pixels += counted
            read += bool(counted.any())
        rest = np.setdiff1d(np.arange(count), sample)
        for start in range(0, len(rest), _AT_ONCE):
            if _classes(pixels) > 1:
                break
            some = rest[start : start + _AT_ONCE].tolist()
            for counted in pool.map(lambda i: _count(source, i), some):
                pixels += counted
                read += bool(counted.any())
    if read and _classes(pixels) < 2:
        present = [name for i, name in enumerate(source.class_names) if pixels[i]]
        share = pixels[IGNORED] / pixels.sum()
        raise DataError(
            f"The masks of {source.name!r}, split {source.split!r}, have "
            f"{f'the class {present[0]!r} alone' if present else 'no class'}, and {share:.1%} of "
            f"their pixels are ignored, since {IGNORED} stands for that: write the number of its "
            "class, from 0 on, into every pixel that has one."
        )
    return MaskSurvey(pixels, read, count)


def _classes(pixels: np.ndarray) -> int:
    return int(np.count_nonzero(pixels[:IGNORED]))


def _count(source: Source, index: int) -> np.ndarray:
    """Count the pixels of each value in a mask.

    All counts are 0 if the mask can't be decoded, which the loader will report.
    """
    read = getattr(source.examples, "mask", None)  # faster, since it does not decode the image
    try:
        mask = read(index) if read else source.examples[index]["label"]
    except BrokenImageError:
        return np.zeros(256, np.int64)
    return np.bincount(mask.ravel(), minlength=256)
