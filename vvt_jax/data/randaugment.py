"""RandAugment: a few randomly drawn operations, applied to an image.

The operations, their severities and the specification are those of timm's `rand-...`, on whose
results published recipes are based. A *magnitude* from 0 to 10 is the strength of an operation, and
its *argument* is that strength in the operation's own unit. An operation that works in two
directions takes magnitudes from -10 to 10.
"""

import dataclasses
import functools
import re
from collections.abc import Callable

import numpy as np
import PIL.Image
from PIL import ImageEnhance, ImageOps

from vvt_jax.data import preprocess

MAX_MAGNITUDE = 10.0
Colour = tuple[int, int, int]


def _posterize(image: PIL.Image.Image, bits: float) -> PIL.Image.Image:
    if bits == 0:
        # Pillow returns black for 0 bits, but raises an error since version 13.
        return PIL.Image.new("RGB", image.size)
    return ImageOps.posterize(image, int(bits))


def _solarize(image: PIL.Image.Image, threshold: float) -> PIL.Image.Image:
    return ImageOps.solarize(image, int(threshold))


def _solarize_add(image: PIL.Image.Image, added: float) -> PIL.Image.Image:
    table = [min(255, value + int(added)) if value < 128 else value for value in range(256)]
    return image.point(table * 3)


def _color(image: PIL.Image.Image, factor: float) -> PIL.Image.Image:
    return ImageEnhance.Color(image).enhance(factor)


def _contrast(image: PIL.Image.Image, factor: float) -> PIL.Image.Image:
    return ImageEnhance.Contrast(image).enhance(factor)


def _brightness(image: PIL.Image.Image, factor: float) -> PIL.Image.Image:
    return ImageEnhance.Brightness(image).enhance(factor)


def _sharpness(image: PIL.Image.Image, factor: float) -> PIL.Image.Image:
    return ImageEnhance.Sharpness(image).enhance(factor)


def _rotate(
    image: PIL.Image.Image, degrees: float, fill: Colour, resample: PIL.Image.Resampling
) -> PIL.Image.Image:
    return image.rotate(degrees, resample, fillcolor=fill)


def _affine(
    matrix: Callable[[float, int, int], tuple[float, ...]],
) -> Callable[..., PIL.Image.Image]:
    """Return the affine operation whose `matrix(argument, width, height)` maps result to image."""

    def apply(
        image: PIL.Image.Image, argument: float, fill: Colour, resample: PIL.Image.Resampling
    ) -> PIL.Image.Image:
        return image.transform(
            image.size,
            PIL.Image.Transform.AFFINE,
            matrix(argument, *image.size),
            resample,
            fillcolor=fill,
        )

    return apply


@dataclasses.dataclass(frozen=True)
class Operation:
    """An operation on an RGB image, which returns a new image and leaves the original unchanged.

    Attributes:
        apply: a function of `(image)`; of `(image, argument)` if the operation has an argument; or
            of `(image, argument, fill, resample)` if it is geometric.
        argument: a function from magnitude to argument; None if the operation has no argument.
        signed: whether the operation works in two directions, so that magnitudes may be negative.
        geometric: whether the operation moves pixels, and therefore needs a fill colour and an
            interpolation method.
    """

    apply: Callable[..., PIL.Image.Image]
    argument: Callable[[float], float] | None = None
    signed: bool = False
    geometric: bool = False


# The arithmetic matches timm's to the last bit: (m / 10) * 30 does not always equal m * 3.
def _linear(largest: float) -> Callable[[float], float]:
    return lambda magnitude: magnitude / MAX_MAGNITUDE * largest


def _bits(magnitude: float) -> float:
    return int(magnitude / MAX_MAGNITUDE * 4)


def _threshold(magnitude: float) -> float:
    return int(magnitude / MAX_MAGNITUDE * 256)


def _added(magnitude: float) -> float:
    return int(magnitude / MAX_MAGNITUDE * 110)


def _factor(magnitude: float) -> float:
    return magnitude / MAX_MAGNITUDE * 1.8 + 0.1


def _factor_around_one(magnitude: float) -> float:
    return max(0.1, 1 + magnitude / MAX_MAGNITUDE * 0.9)


def _geometric(apply: Callable[..., PIL.Image.Image], largest: float) -> Operation:
    return Operation(apply, _linear(largest), signed=True, geometric=True)


OPERATIONS: dict[str, Operation] = {
    "AutoContrast": Operation(ImageOps.autocontrast),
    "Equalize": Operation(ImageOps.equalize),
    "Invert": Operation(ImageOps.invert),
    "Rotate": _geometric(_rotate, 30.0),  # degrees
    "Posterize": Operation(_posterize, _bits),  # bits that are kept
    "PosterizeIncreasing": Operation(_posterize, lambda magnitude: 4 - _bits(magnitude)),
    "Solarize": Operation(_solarize, _threshold),  # the value from which values are inverted
    "SolarizeIncreasing": Operation(_solarize, lambda magnitude: 256 - _threshold(magnitude)),
    "SolarizeAdd": Operation(_solarize_add, _added),  # added to values below 128
    "Color": Operation(_color, _factor),
    "ColorIncreasing": Operation(_color, _factor_around_one, signed=True),
    "Contrast": Operation(_contrast, _factor),
    "ContrastIncreasing": Operation(_contrast, _factor_around_one, signed=True),
    "Brightness": Operation(_brightness, _factor),
    "BrightnessIncreasing": Operation(_brightness, _factor_around_one, signed=True),
    "Sharpness": Operation(_sharpness, _factor),
    "SharpnessIncreasing": Operation(_sharpness, _factor_around_one, signed=True),
    # Shears are in pixels per pixel along the other axis, translations in fractions of the side.
    "ShearX": _geometric(_affine(lambda part, *_: (1, part, 0, 0, 1, 0)), 0.3),
    "ShearY": _geometric(_affine(lambda part, *_: (1, 0, 0, part, 1, 0)), 0.3),
    "TranslateXRel": _geometric(_affine(lambda part, w, _: (1, 0, part * w, 0, 1, 0)), 0.45),
    "TranslateYRel": _geometric(_affine(lambda part, _, h: (1, 0, 0, 0, 1, part * h)), 0.45),
}
_TWINS = {"Posterize", "Solarize", "Color", "Contrast", "Brightness", "Sharpness"}
INCREASING = tuple(name for name in OPERATIONS if name not in _TWINS)
NOT_INCREASING = tuple(name for name in OPERATIONS if not name.endswith("Increasing"))


def apply_operation(
    name: str,
    image: PIL.Image.Image,
    magnitude: float,
    fill: Colour,
    interpolation: str,
) -> PIL.Image.Image:
    """Apply one operation to an image; the result has the same size.

    Args:
        name: a key of `OPERATIONS`.
        image: an RGB image.
        magnitude: the strength, from 0 to 10, or from -10 to 10 if the operation is signed.
        fill: the red, green and blue, from 0 to 255, with which uncovered pixels are filled.
        interpolation: a name in `preprocess.INTERPOLATIONS`. For geometric operations, Pillow
            supports `"nearest"`, `"bilinear"` and `"bicubic"`, which also replaces all the others.
    """
    operation = OPERATIONS[name]
    if operation.argument is None:
        return operation.apply(image)
    argument = operation.argument(magnitude)
    if not operation.geometric:
        return operation.apply(image, argument)
    if interpolation not in ("nearest", "bilinear"):
        interpolation = "bicubic"
    return operation.apply(image, argument, fill, preprocess.resampling(interpolation))


@dataclasses.dataclass(frozen=True)
class Policy:
    """The distribution from which operations are drawn.

    Attributes:
        names: the operations to draw from, all with equal probability.
        count: the number of operations drawn for each image, with replacement.
        probability: the probability with which each drawn operation is applied.
        magnitude: the mean of the magnitudes, which are drawn from a normal distribution and
            clipped to between 0 and 10.
        magnitude_std: the standard deviation of that distribution.
    """

    names: tuple[str, ...] = NOT_INCREASING
    count: int = 2
    probability: float = 0.5
    magnitude: float = MAX_MAGNITUDE
    magnitude_std: float = 0.0


_NUMBER = r"\d+(?:\.\d+)?"
_PARTS: dict[str, Callable[[str], bool]] = {
    "m": lambda value: float(value) <= MAX_MAGNITUDE,
    # In timm, larger values stand for uniformly distributed magnitudes.
    "mstd": lambda value: float(value) <= 100,
    "n": lambda value: value.isdecimal() and int(value) >= 1,
    "p": lambda value: float(value) <= 1,
    "inc": lambda value: value in ("0", "1"),
}
_HELP = (
    "'rand' may be followed by -mM (magnitude, 0 to 10), -mstdS (its deviation, 0 to 100), "
    "-nN (operations, 1 or more), -pP (probability, 0 to 1) and -inc0 or -inc1, each once"
)


@functools.cache
def parse(specification: str) -> Policy:
    """Parse a specification such as `"rand-m9-mstd0.5-inc1"` into a policy.

    By default, 2 operations are drawn, with a probability of 0.5 and a constant magnitude of 10,
    from the operations whose severity does not necessarily increase with the magnitude.

    Raises:
        ValueError: if a part is unknown, out of range or given twice. The message names it.
    """
    first, *parts = specification.split("-")
    if first != "rand":
        raise ValueError(f"Unknown RandAugment {specification!r}: {_HELP}.")
    values: dict[str, str] = {}
    for part in parts:
        match = re.fullmatch(rf"({'|'.join(_PARTS)})({_NUMBER})", part, re.ASCII)
        if match is None or match[1] in values or not _PARTS[match[1]](match[2]):
            raise ValueError(
                f"Unsuitable part {part!r} of the RandAugment {specification!r}: {_HELP}."
            )
        values[match[1]] = match[2]
    return Policy(
        names=INCREASING if values.get("inc") == "1" else NOT_INCREASING,
        count=int(values.get("n", Policy.count)),
        probability=float(values.get("p", Policy.probability)),
        magnitude=float(values.get("m", Policy.magnitude)),
        magnitude_std=float(values.get("mstd", Policy.magnitude_std)),
    )


def draw(policy: Policy, rng: np.random.Generator) -> list[tuple[str, float]]:
    """Draw the names and magnitudes of the operations for one image, in order of application.

    Args:
        policy: the policy from which to draw.
        rng: the source of randomness.
    """
    drawn = []
    for index in rng.integers(len(policy.names), size=policy.count):
        if rng.random() >= policy.probability:
            continue
        name = policy.names[index]
        operation = OPERATIONS[name]
        magnitude = 0.0
        if operation.argument is not None:
            magnitude = rng.normal(policy.magnitude, policy.magnitude_std)
            magnitude = min(max(magnitude, 0.0), MAX_MAGNITUDE)
        if operation.signed and rng.random() < 0.5:
            magnitude = -magnitude
        drawn.append((name, magnitude))
    return drawn


def randaugment(
    image: PIL.Image.Image,
    rng: np.random.Generator,
    policy: Policy,
    fill: Colour,
    interpolation: str,
) -> PIL.Image.Image:
    """Apply randomly drawn operations to an image, or return the image itself if there are none.

    Args:
        image: an RGB image.
        rng: the source of randomness.
        policy: the policy from which `draw` draws the operations.
        fill: the fill colour, as for `apply_operation`.
        interpolation: the interpolation method, as for `apply_operation`.
    """
    for name, magnitude in draw(policy, rng):
        image = apply_operation(name, image, magnitude, fill, interpolation)
    return image
