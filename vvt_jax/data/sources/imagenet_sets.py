"""ImageNet's additional evaluation sets, as tfds prepares them: V2, ReaL, A, R and the corruptions.

A model with ImageNet's classes is evaluated on them unchanged. In place of a single label, their
examples have a verdict on each of the model's classes:

    `label`: int8 `[num_classes]`, which is 1 for a correct class (ReaL may have several or none), 0
    for a wrong class, and -1 for a class that can't be chosen (A and R have 200 classes).

Classes are matched by name, so they may be in any order in the model and in the set.
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
# Top-1 error of AlexNet on each corruption of ImageNet-C, averaged over its severities (Hendrycks
# and Dietterich, arXiv 1903.12261), with all digits, from github.com/hendrycks/robustness.
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
_SUBSETS = {"imagenet_a": "a", "imagenet_r": "r"}  # their labels are numbers among the 1000
_VALIDATION = ("imagenet2012_real", CORRUPTED)  # sets with this split; the others have "test"


@dataclasses.dataclass(frozen=True)
class EvaluationSet:
    """A set on which to evaluate a model.

    Attributes:
        name: the name of the set in tfds.
        source: the examples, with labels as described for this module.
        cropped: whether the images are already centre crops and must not be cropped again.
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
    """Open evaluation sets by their names in tfds.

    `imagenet2012_corrupted` stands for all 15 corruptions at all 5 severities.

    Args:
        names: `"imagenet_v2"` (`"imagenet_v2/topimages"`, ...), `"imagenet2012_real"`,
            `"imagenet_a"`, `"imagenet_r"`, `"imagenet2012_corrupted"` (or one of its sets, such as
            `"imagenet2012_corrupted/fog_3"`), or any other set with the features `image` and
            `label` and a split `test`, such as `"imagenet_sketch"`. If a set has only some of the
            model's classes, the model chooses among these.
        class_names: the model's classes, as WordNet numbers or as words.
        num_classes: the number of the model's outputs, at least the number of class names.
        data_dir, cache_dir, upright: as for `sources.open_source`.

    Raises:
        DataError: if a set is missing, or has classes that the model doesn't know.
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
    """Examples whose label is a verdict on each of the model's classes."""

    def __init__(self, source: Source, classes: np.ndarray, unlabelled: np.ndarray):
        """Take the examples of `source`.

        `classes` maps each of the source's classes to a class of the model, or to -1. `unlabelled`
        is the verdict before the correct classes are set: 0 or, for excluded classes, -1.
        """
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
    """Compute the corruption error of each corruption, and their mean (mCE).

    The corruption error is the sum of a model's top-1 errors over the severities, divided by the
    same sum for AlexNet, so 1 is as good as AlexNet. (Hendrycks and Dietterich, arXiv 1903.12261,
    section 4.)

    Args:
        errors: the top-1 errors, as fractions, of every corruption in `ALEXNET_ERRORS`, one for
            each severity.
    """
    relative = {
        kind: float(np.mean(errors[kind])) / alexnet for kind, alexnet in ALEXNET_ERRORS.items()
    }
    return relative, float(np.mean(list(relative.values())))


def sum_up_corruptions(
    measured: Mapping[str, Mapping[str, float]],
) -> tuple[dict[str, Mapping[str, float]], dict[str, list[float]], dict[str, float]]:
    """Combine the measurements on all corruptions.

    Args:
        measured: `loss`, `top1`, `top5` and `examples` by the name of each set.

    Returns:
        Three mappings. The first is `measured` with all corruptions combined into one entry
        `imagenet2012_corrupted`, which has the means over the sets, the total number of examples,
        `ce_KIND` for each kind of corruption, and `mce`. The second has each kind's top-1 errors by
        severity, and the third each kind's corruption error. If not all corruptions were measured,
        the first is an unchanged copy of `measured` and the others are empty.
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
