"""ImageNet's classes against tfds's own list, and names that people know."""

import pytest

from vvt_jax.data.imagenet import class_names, readable_class_names

tfds = pytest.importorskip("tensorflow_datasets")


def test_the_classes_are_those_of_tfds_in_its_order():
    labels = tfds.core.tfds_path("datasets/imagenet2012/labels.txt").read_text().split()
    assert list(class_names()) == labels
    assert len(set(class_names().values())) == 1000


@pytest.mark.parametrize(
    ("number", "name"),
    [
        ("n01440764", "tench"),
        ("n02012849", "crane (bird)"),
        ("n03126707", "crane (machine)"),
        ("n15075141", "toilet tissue"),
    ],
)
def test_names_are_words(number, name):
    assert class_names()[number] == name


def test_only_imagenets_own_numbers_become_words():
    assert readable_class_names(["n01440764", "n15075141"]) == ("tench", "toilet tissue")
    assert readable_class_names(["n01440764", "cat"]) == ("n01440764", "cat")
    assert readable_class_names(["cat", "dog"]) == ("cat", "dog")
