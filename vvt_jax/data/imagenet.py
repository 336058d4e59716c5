"""The 1000 classes of ImageNet-1k: tfds calls them by their WordNet numbers."""

import functools
import importlib.resources
from collections.abc import Sequence


@functools.cache
def class_names() -> dict[str, str]:
    """The names of the 1000 classes by their WordNet numbers, in the order of the labels.

    Each is the first word of its WordNet 3.0 synset; the two cranes and the two swimsuits that
    share theirs are told apart.
    """
    text = importlib.resources.files("vvt_jax.data").joinpath("imagenet_classes.txt").read_text()
    return dict(line.split("\t") for line in text.splitlines())


def readable_class_names(names: Sequence[str]) -> tuple[str, ...]:
    """Words where all names are WordNet numbers of ImageNet-1k, and else the names as they are."""
    known = class_names()
    return tuple(known[n] for n in names) if set(names) <= set(known) else tuple(names)
