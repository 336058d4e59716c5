"""The common interface to the examples of any data set, and the errors that they can raise."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeAlias

import numpy as np

from vvt_jax.system.errors import UserError

# A function of a split as written in a config, and of the name and class of every example of the
# whole split. It returns the indices of the examples that belong to the part; see `splits`.
Cut: TypeAlias = Callable[[str, Sequence[str], Sequence[int]], np.ndarray]


class DataError(UserError):
    """Data that is missing or unsuitable; the message says in one sentence what can be done."""


class BrokenImageError(DataError):
    """An image that can't be decoded; the message names it."""


class Examples(Protocol):
    """Random access: `examples[i]` is a dict with `image` and `label`."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> dict[str, Any]: ...


def describe(examples: Examples, index: int) -> str:
    """Return what to call an example in a message: its file, if the source knows it."""
    method = getattr(examples, "describe", None)
    return method(index) if method else f"Image {index}"


@dataclasses.dataclass(frozen=True)
class Source:
    """One split of a data set, in a fixed order.

    Attributes:
        examples: a sequence with `len(examples)` and `examples[i]`, a dict with `image`, an RGB PIL
            image or a uint8 array `[height, width, 1 or 3]` of any size, and `label`, an integer
            that indexes `class_names` or, with `pixels`, a uint8 array `[height, width]` of such
            integers, where 255 is ignored. Reading an image that can't be decoded raises
            BrokenImageError. The sequence can be pickled, for the loader's worker processes.
        class_names: the names of the classes in the order of their labels.
        name: the name with which the source was opened.
        split: the split that was requested.
        pixels: whether each pixel has a label, rather than each image.
        left_out: a sentence about each kind of file or folder beside the examples that is not used.
        names: a name for each example that stays the same whenever the source is opened, such as
            the path of its file within the source's folder; None if the source has no such names.
    """

    examples: Examples
    class_names: tuple[str, ...]
    name: str
    split: str
    pixels: bool = False
    left_out: tuple[str, ...] = ()
    names: Sequence[str] | None = None

    @property
    def num_classes(self) -> int:
        return len(self.class_names)


def with_classes(source: Source, class_names: Sequence[str]) -> Source:
    """Return a source with labels that follow another list of classes.

    Args:
        source: a source each of whose class names occurs once in `class_names`.
        class_names: the class names in the order of the new labels, which may include classes that
            the source does not have.
    """
    if tuple(class_names) == source.class_names:
        return source
    labels = {name: label for label, name in enumerate(class_names)}
    examples = _Relabelled(source.examples, [labels[name] for name in source.class_names])
    return dataclasses.replace(source, examples=examples, class_names=tuple(class_names))


class _Relabelled:
    """Examples with their labels mapped to other class numbers."""

    def __init__(self, examples: Examples, labels: Sequence[int]):
        self._examples = examples
        self._labels = np.array(labels, np.int32)

    def __len__(self) -> int:
        return len(self._examples)

    def __getitem__(self, index: int) -> dict[str, Any]:
        example = self._examples[index]
        label = example["label"]
        if np.ndim(label):
            table = np.arange(256).astype(np.uint8)  # ignored pixels stay ignored
            table[: len(self._labels)] = self._labels
            return {**example, "label": table[label]}
        return {**example, "label": int(self._labels[label])}
