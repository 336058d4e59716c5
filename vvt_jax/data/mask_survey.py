"""A look at masks before training starts: which classes they have, and how much of them is ignored.

Masks of the values 0 and 255, as many tools write them for two classes, are valid: 255 is ignored.
A model that is trained on them learns one class, perfectly.
"""

import dataclasses
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from vvt_jax.data.examples import BrokenImageError, DataError, Source
from vvt_jax.data.pixel_labels import IGNORED

_MOST = 256  # masks that are read if there are more
_AT_ONCE = 32  # of the others, while they are searched for a second class
_THREADS = 4
_MOST_NAMED = 10  # classes in a sentence


@dataclasses.dataclass(frozen=True)
class MaskSurvey:
    """What a number of masks contain.

    Attributes:
        pixels: of each class and, at index 255, of what is ignored: int64 `[256]`.
        read: how many masks were read.
        examples: how many there are.
    """

    pixels: np.ndarray
    read: int
    examples: int

    def sentences(self, class_names: Sequence[str]) -> list[str]:
        """What to tell the user: the share of ignored pixels, and the classes without any."""
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
    """Counts the classes in the masks of a source, or in a sample of them spread over all.

    Raises:
        DataError: not one of all the masks has a second class, so that there is nothing to learn.
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
    """Pixels by value in a mask; none in one that can't be decoded, which the loader reports."""
    read = getattr(source.examples, "mask", None)  # quicker, since the image is left alone
    try:
        mask = read(index) if read else source.examples[index]["label"]
    except BrokenImageError:
        return np.zeros(256, np.int64)
    return np.bincount(mask.ravel(), minlength=256)
