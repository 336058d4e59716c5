"""The 1000 classes of ImageNet-1k, which tfds identifies by their WordNet numbers."""

import functools
import importlib.resources
from collections.abc import Sequence


@functools.cache
def _table() -> tuple[tuple[str, str, str], ...]:
    """Return (WordNet number, name, letters of its subsets) of each class, in label order."""
    text = importlib.resources.files("vvt_jax.data").joinpath("imagenet_classes.txt").read_text()
    lines = (line.split("\t") for line in text.splitlines())
    return tuple((number, name, "".join(sets)) for number, name, *sets in lines)


@functools.cache
def class_names() -> dict[str, str]:
    """Return the names of the 1000 classes by their WordNet numbers, in the order of the labels.

    Each name is the first word of the class's WordNet 3.0 synset, except that the two cranes and
    the two swimsuits, which share theirs, have distinct names.
    """
    return {number: name for number, name, _ in _table()}


def classes_of(letter: str) -> frozenset[str]:
    """Return the names of the 200 classes of ImageNet-A (`"a"`) or ImageNet-R (`"r"`).

    Source: the evaluation code published by their authors,
    github.com/hendrycks/natural-adv-examples and github.com/hendrycks/imagenet-r.
    """
    return frozenset(name for _, name, sets in _table() if letter in sets)


def readable_class_names(names: Sequence[str]) -> tuple[str, ...]:
    """Return words for the names if all are WordNet numbers of ImageNet-1k, or else the names."""
    known = class_names()
    return tuple(known[n] for n in names) if set(names) <= set(known) else tuple(names)
