"""ImageNet's other validation sets, as tfds prepares them: V2, ReaL, A, R and the corruptions.

A model of ImageNet's classes is measured on them as it is. Their examples carry, in place of a
label, what a set says of each class that the model knows:

    `label`: int8 `[num_classes]`, 1 where the class is right (ReaL has several, or none), 0 where
    it is wrong, -1 where it can't be chosen (A and R have 200 classes).

Classes are found by their names, so that the order of the model's or the set's is free.
"""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from vvt_jax.data.examples import DataError, Examples, Source
from vvt_jax.data.imagenet import classes_of, readable_class_names
from vvt_jax.data.sources.prepared import open_prepared
from vvt_jax.system.storage import AnyPath

CORRUPTED = "imagenet2012_corrupted"
SEVERITIES = (1, 2, 3, 4, 5)
# Top-1 error of AlexNet on each corruption of ImageNet-C, the mean over its severities: Hendrycks
# and Dietterich, arXiv 1903.12261; in full digits as in github.com/hendrycks/robustness.
ALEXNET_ERRORS = {
    "gaussian_noise": 0.886428,
    "shot_noise": 0.894468,
    "impulse_noise": 0.922640,
    "defocus_blur": 0.819880,
    "glass_blur": 0.826268,
    "motion_blur": 0.785948,
    "zoom_blur": 0.798360,
    "snow": 0.866816,
    "frost": 0.826572,
    "fog": 0.819324,
    "brightness": 0.564592,
    "contrast": 0.853204,
    "elastic_transform": 0.646056,
    "pixelate": 0.717840,
    "jpeg_compression": 0.606500,
}
_SUBSETS = {"imagenet_a": "a", "imagenet_r": "r"}  # their labels are numbered as the 1000 are
_VALIDATION = ("imagenet2012_real", CORRUPTED)  # have this split; the others have "test"


@dataclasses.dataclass(frozen=True)
class EvaluationSet:
    """A set to measure a model on.

    Attributes:
        name: as tfds writes it.
        source: its examples, labelled as this module says.
        cropped: the images are centre crops already and have to be taken whole.
    """

    name: str
    source: Source
    cropped: bool


def open_sets(
    names: Iterable[str],
    class_names: Sequence[str],
    num_classes: int,
    *,
    data_dir: str | None,
    cache_dir: AnyPath | None = None,
    upright: bool = True,
) -> list[EvaluationSet]:
    """Opens sets by tfds's names; of `imagenet2012_corrupted` all 15 corruptions by 5 severities.

    Args:
        names: `"imagenet_v2"` (`"imagenet_v2/topimages"`, ...), `"imagenet2012_real"`,
            `"imagenet_a"`, `"imagenet_r"`, `"imagenet2012_corrupted"` (or one of it, such as
            `"imagenet2012_corrupted/fog_3"`), or any other that has the features `image` and
            `label` and a split `test`, such as `"imagenet_sketch"`. Where a set has a part of the
            model's classes, the model chooses among these.
        class_names: the model's classes, WordNet numbers or the words for them.
        num_classes: the model's outputs, as many or more.
        data_dir, cache_dir, upright: as for `sources.open_source`.

    Raises:
        DataError: a set is missing, or has classes that the model doesn't know.
    """
    corruptions = [part for kind in ALEXNET_ERRORS for part in _corrupted(kind)]
    parts = [part for name in names for part in (corruptions if name == CORRUPTED else [name])]
    labels = {name: label for label, name in enumerate(readable_class_names(class_names))}
    return [_open(name, labels, num_classes, data_dir, cache_dir, upright) for name in parts]


def _open(
    name: str,
    labels: Mapping[str, int],
    num_classes: int,
    data_dir: str | None,
    cache_dir: AnyPath | None,
    upright: bool,
) -> EvaluationSet:
    family = name.partition(":")[0].partition("/")[0]
    split = "validation" if family in _VALIDATION else "test"
    real = family == "imagenet2012_real"
    source = open_prepared(
        f"tfds:{name}",
        split,
        data_dir,
        cache_dir,
        label="real_label" if real else "label",
        several=real,
        upright=upright,
    )
    names = set(source.class_names)
    if letter := _SUBSETS.get(family):
        names &= classes_of(letter)
    if unknown := sorted(names - set(labels)):
        raise DataError(
            f"The model can't be measured on {name!r}: it doesn't know {len(unknown)} of its "
            f"{len(names)} classes, such as {unknown[0]!r}."
        )
    if names == set(labels):
        unlabelled = np.zeros(num_classes, np.int8)
    else:
        unlabelled = np.full(num_classes, -1, np.int8)
        unlabelled[[labels[known] for known in names]] = 0
    classes = np.array([labels[n] if n in names else -1 for n in source.class_names], np.int64)
    examples = _Verdicts(source, classes, unlabelled)
    return EvaluationSet(
        name, dataclasses.replace(source, examples=examples), cropped=family == CORRUPTED
    )


class _Verdicts:
    """Examples whose label says of each of the model's classes what it is."""

    def __init__(self, source: Source, classes: np.ndarray, unlabelled: np.ndarray):
        """`classes`: the model's, of each of the source's, or -1; `unlabelled`: 0 and -1."""
        self._examples: Examples = source.examples
        self._told = f"{source.name!r}, split {source.split!r}"
        self._classes = classes
        self._unlabelled = unlabelled

    def __len__(self) -> int:
        return len(self._examples)

    def __getitem__(self, index: int) -> dict[str, Any]:
        example = self._examples[index]
        right = self._classes[np.atleast_1d(example["label"])]
        if (right < 0).any():
            raise DataError(
                f"Image {index} of {self._told} is of a class that this set doesn't have: is it "
                "another data set of this name?"
            )
        verdict = self._unlabelled.copy()
        verdict[right] = 1
        return {"image": example["image"], "label": verdict}


def corruption_errors(errors: Mapping[str, Sequence[float]]) -> tuple[dict[str, float], float]:
    """The corruption error of each corruption, and their mean (mCE).

    A model's corruption error is the sum of its top-1 errors over the severities, divided by that
    of AlexNet's: 1 is as good as AlexNet. (Hendrycks and Dietterich, arXiv 1903.12261, section 4.)

    Args:
        errors: fractions, of every corruption in `ALEXNET_ERRORS` one for each severity.
    """
    relative = {
        kind: float(np.mean(errors[kind])) / alexnet for kind, alexnet in ALEXNET_ERRORS.items()
    }
    return relative, float(np.mean(list(relative.values())))


def sum_up_corruptions(
    measured: Mapping[str, Mapping[str, float]],
) -> tuple[dict[str, Mapping[str, float]], dict[str, list[float]], dict[str, float]]:
    """Puts the measurements on all corruptions together.

    Args:
        measured: of each set's name `loss`, `top1`, `top5` and `examples`.

    Returns:
        The same with one entry `imagenet2012_corrupted` for its sets, the means over them, all of
        the examples, `ce_KIND` of each kind of corruption, and `mce`; each kind's top-1 errors by
        severity; each kind's corruption error. Where the sets are not all there, the same alone.
    """
    names = {kind: _corrupted(kind) for kind in ALEXNET_ERRORS}
    every = [name for row in names.values() for name in row]
    if not set(every) <= set(measured):
        return dict(measured), {}, {}
    errors = {kind: [1 - measured[name]["top1"] for name in row] for kind, row in names.items()}
    relative, mce = corruption_errors(errors)
    together: dict[str, float] = {
        key: float(np.mean([measured[name][key] for name in every]))
        for key in ("loss", "top1", "top5")
    }
    together["examples"] = sum(int(measured[name]["examples"]) for name in every)
    together |= {f"ce_{kind}": value for kind, value in relative.items()}
    together["mce"] = mce
    rest = {name: values for name, values in measured.items() if name not in every}
    return {**rest, CORRUPTED: together}, errors, relative


def _corrupted(kind: str) -> list[str]:
    return [f"{CORRUPTED}/{kind}_{severity}" for severity in SEVERITIES]
