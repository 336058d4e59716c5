"""scikit-learn's 8x8 digits, which need no download."""

import functools
from typing import Any

import numpy as np

from vvt_jax.data.examples import DataError, Source


def open_digits(name: str, split: str) -> Source:
    """Open a split of the digits; see `sources.open_source`."""
    splits = _digits_splits()
    if split not in splits:
        raise DataError(f"'digits' has no split {split!r}: it has {', '.join(splits)}.")
    return Source(splits[split], tuple("0123456789"), name, split)


class _ArrayExamples:
    """Examples in memory: `images` `[examples, height, width, channels]`, `labels` `[examples]`."""

    def __init__(self, images: np.ndarray, labels: np.ndarray):
        self._images = images
        self._labels = labels

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"image": self._images[index], "label": int(self._labels[index])}


@functools.cache
def _digits_splits() -> dict[str, _ArrayExamples]:
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    images = np.round(digits.images * (255 / 16)).astype(np.uint8)[..., np.newaxis]

    def separate(indices: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
        labels = digits.target[indices]
        return train_test_split(indices, test_size=size, stratify=labels, random_state=0)

    rest, test = separate(np.arange(len(images)), 360)
    train, validation = separate(rest, 144)
    parts = {"train": train, "validation": validation, "test": test}
    return {key: _ArrayExamples(images[part], digits.target[part]) for key, part in parts.items()}
