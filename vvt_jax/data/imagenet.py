"""The 1000 classes of ImageNet-1k: tfds calls them by their WordNet numbers."""

import functools
import importlib.resources
from collections.abc import Sequence


@functools.cache
def _table() -> tuple[tuple[str, str, str], ...]:
    """(WordNet number, name, letters of the subsets that have it), in the order of the labels."""
    text = importlib.resources.files("vvt_jax.data").joinpath("imagenet_classes.txt").read_text()
    lines = (line.split("\t") for line in text.splitlines())
    return tuple((number, name, "".join(sets)) for number, name, *sets in lines)


@functools.cache
def class_names() -> dict[str, str]:
    """The names of the 1000 classes by their WordNet numbers, in the order of the labels.

    Each is the first word of its WordNet 3.0 synset; the two cranes and the two swimsuits that
    share theirs are told apart.
    """
    return {number: name for number, name, _ in _table()}


def classes_of(letter: str) -> frozenset[str]:
    """The names of the 200 classes of ImageNet-A (`"a"`) or ImageNet-R (`"r"`).

    Source: the evaluations that their authors published, github.com/hendrycks/natural-adv-examples
    and github.com/hendrycks/imagenet-r.
    """
    return frozenset(name for _, name, sets in _table() if letter in sets)


def readable_class_names(names: Sequence[str]) -> tuple[str, ...]:
    """Words where all names are WordNet numbers of ImageNet-1k, and else the names as they are."""
    known = class_names()
    return tuple(known[n] for n in names) if set(names) <= set(known) else tuple(names)
