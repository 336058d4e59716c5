"""How a segmenter processes whole images, as recorded in `card["inference"]` of its card:

{"short_side": 512,     # pixels that the shorter side of an image is resized to
 "window": [512, 512],  # height and width of the sliding window in pixels, if stride is not 0
 "stride": 0,           # pixels between windows; 0: the whole image at once
 "scales": [1.0],       # sizes to process, as multiples of short_side; the first is the reference
 "flip": False}         # whether to process the mirrored image as well
"""

from collections.abc import Mapping
from typing import Any

_LARGEST_SIDE = 2**13  # upper limit of a short side, window or stride, in pixels
_MOST_SCALES = 32
_FIELDS = ("short_side", "window", "stride", "scales", "flip")


def check_inference(inference: Mapping[str, Any]) -> None:
    """Check the settings that the module docstring describes.

    Raises:
        ValueError: a field is missing, unknown or out of range; the message is one sentence.
    """
    if not isinstance(inference, Mapping):
        raise ValueError(f"The settings must be a dict, not {type(inference).__name__}.")
    if set(inference) != set(_FIELDS):
        raise ValueError(
            f"The settings are {', '.join(_FIELDS)}, not {', '.join(map(str, inference))}."
        )
    if not _is_whole(inference["short_side"], 32):
        raise ValueError(
            f"`short_side` must be a whole number from 32 to {_LARGEST_SIDE}, not "
            f"{inference['short_side']}."
        )
    stride = inference["stride"]
    if not _is_whole(stride, 0):
        raise ValueError(
            f"`stride` must be a whole number from 0 to {_LARGEST_SIDE}, not {stride}."
        )
    window = inference["window"]
    if (
        not _is_list(window)
        or len(window) != 2
        or not all(_is_whole(side, max(32, stride)) for side in window)
    ):
        raise ValueError(
            f"`window` must be [height, width], no less than 32 and the stride, not "
            f"{inference['window']}."
        )
    scales = inference["scales"]
    numbers = _is_list(scales) and all(
        isinstance(scale, int | float) and not isinstance(scale, bool) for scale in scales
    )
    sides = [inference["short_side"] * scale for scale in scales] if numbers else []
    if not 0 < len(sides) <= _MOST_SCALES or not all(0 < side <= _LARGEST_SIDE for side in sides):
        raise ValueError(
            f"`scales` must be 1 to {_MOST_SCALES} numbers above 0 that make no short side longer "
            f"than {_LARGEST_SIDE}, not {scales}."
        )
    if not isinstance(inference["flip"], bool):
        raise ValueError(f"`flip` must be True or False, not {inference['flip']}.")


def _is_list(value: object) -> bool:
    return isinstance(value, list | tuple)


def _is_whole(value: object, least: int) -> bool:
    whole = isinstance(value, int) and not isinstance(value, bool)
    return whole and least <= value <= _LARGEST_SIDE  # type: ignore[operator]


def plain_inference(preprocessing: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings to process the whole image once, at the short side of the training crops."""
    size = list(preprocessing["size"])
    return {"short_side": min(size), "window": size, "stride": 0, "scales": [1.0], "flip": False}
