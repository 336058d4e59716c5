"""Rules for the values of each config field, checked before anything is compiled or written.

`RULES` has a rule for every field of `configs/common.py`, apart from those of the model. A rule
returns what is wrong with a value, or an empty string.
"""

import math
import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

Rule = Callable[[Any], str]

_MOST_STEPS = 2**31 - 1  # the state counts steps in int32
_MOST_IMAGES = 2**20  # in a batch
_MOST_PIXELS = 2**16  # on a side
_SMALLEST, _LARGEST = 1.2e-38, 3e38  # limits of float32


def _whole(low: int, high: int) -> Rule:
    """Return a rule for integers from `low` up to and including `high`."""

    def check(value: Any) -> str:
        if not isinstance(value, int) or isinstance(value, bool):
            return "it has to be a whole number"
        return _below(value, low) or (f"it can be at most {high:,}" if value > high else "")

    return check


def _real(low: float, high: float = _LARGEST, *, above: bool = False, below: bool = False) -> Rule:
    """Return a rule for finite numbers from `low` up to `high`.

    Args:
        low: the smallest value.
        high: the largest value.
        above: whether to exclude `low` itself.
        below: whether to exclude `high` itself.
    """

    def check(value: Any) -> str:
        if not isinstance(value, int | float) or isinstance(value, bool):
            return "it has to be a number"
        if isinstance(value, float) and not math.isfinite(value):
            return "it has to be a finite number"
        if abs(value) > _LARGEST:
            return "float32 does not reach so far"
        if 0 < abs(value) < _SMALLEST:
            return "float32 takes it for 0"
        if high == _LARGEST:
            return "it has to be positive" if above and value <= 0 else _below(value, low)
        inside = (low < value if above else low <= value) and (
            value < high if below else value <= high
        )
        if inside:
            return ""
        start = f"from, not including, {low:g}" if above else f"from {low:g}"
        end = f"up to, not including, {high:g}" if below else f"up to {high:g}"
        return f"it goes {start} {end}"

    return check


def _below(value: Any, low: float) -> str:
    if value >= low:
        return ""
    return {0: "it can't be negative", 1: "it has to be positive"}.get(
        int(low), f"it has to be {low} or more"
    )


def _one_of(*choices: str) -> Rule:
    def check(value: Any) -> str:
        named = ", ".join(map(repr, choices[:-1])) + f" or {choices[-1]!r}"
        return "" if isinstance(value, str) and value in choices else f"it is {named}"

    return check


def _text(value: Any) -> str:
    return "" if isinstance(value, str) else "it has to be a string"


def _flag(value: Any) -> str:
    return "" if isinstance(value, bool) else "it has to be True or False"


def _optional(rule: Rule) -> Rule:
    """Return a rule for a field that may also be None."""
    return lambda value: "" if value is None else rule(value)


def _each(rule: Rule, what: str, count: int | None = None, example: str = "") -> Rule:
    """Return a rule for tuples whose elements all follow another rule.

    Args:
        rule: the rule for each element.
        what: a phrase that describes the elements.
        count: the required number of elements; None allows any number.
        example: an example of how to write such a tuple.
    """

    def check(value: Any) -> str:
        if not isinstance(value, tuple | list) or (count is not None and len(value) != count):
            many = "" if count is None else f"{count} "
            return f"it is a tuple of {many}{what}" + (f", such as {example}" if example else "")
        for element in value:
            if wrong := rule(element):
                return f"{element!r} does not fit: {wrong}"
        return ""

    return check


def _pattern(value: Any) -> str:
    if not isinstance(value, str):
        return "it has to be a string"
    try:
        re.compile(value)
    except re.error as error:
        return f"it is not a regular expression ({error})"
    return ""


def _by_the_model(value: Any) -> str:
    """Accept any value, because the model itself rejects invalid ones."""
    del value
    return ""


def _epochs(*, above: bool) -> Rule:
    number = _real(0.0, above=above)
    return lambda value: number(value) or ("it can be at most 10,000,000" if value > 1e7 else "")


def _duration(name: str, low: int) -> dict[str, Rule]:
    """Return the rules for a duration's three units; `low` is 1 if the duration can't be zero."""
    return {
        f"{name}_steps": _optional(_whole(low, _MOST_STEPS)),
        f"{name}_examples": _optional(_whole(low, 10**15)),
        f"{name}_epochs": _optional(_epochs(above=low > 0)),
    }


_POSITIVE = _real(0.0, above=True)
_NOT_NEGATIVE = _real(0.0)
_PROBABILITY = _real(0.0, 1.0)
_BELOW_ONE = _real(0.0, 1.0, below=True)
_SHARE = _real(0.0, 1.0, above=True)
_SIDE = _whole(1, _MOST_PIXELS)

RULES: dict[str, Rule] = {
    "seed": _whole(0, 2**31 - 1),  # the state stores it in 32 bits
    "mode": _one_of("train", "eval"),
    "batch_size": _whole(1, _MOST_IMAGES),
    **_duration("total", 1),
    **_duration("log_every", 1),
    **_duration("eval_every", 1),
    **_duration("checkpoint_every", 1),
    "keep_checkpoints": _whole(1, 10**6),
    "compilation_cache": _text,
    "init_from": _text,
    "profile_at_step": _whole(0, _MOST_STEPS),
    "profile_steps": _whole(1, 10**6),
    **{f"mesh.{axis}": _whole(-1, 10**6) for axis in ("data", "fsdp", "spatial")},
    "distributed.coordinator": _optional(
        lambda value: "" if re.fullmatch(r".+:\d+", str(value)) else "it is HOST:PORT"
    ),
    "distributed.num_processes": _optional(_whole(1, 10**6)),
    "distributed.process_id": _optional(_whole(0, 10**6)),
    "distributed.start_timeout": _whole(1, 10**6),
    "distributed.heartbeat_timeout": _whole(1, 10**6),
    "data.source": _text,
    "data.data_dir": _optional(_text),
    "data.train_split": _text,
    "data.validation_split": _text,
    "data.test_split": _text,
    "data.eval_also": _each(_text, "names", example="\"('imagenet_a',)\""),
    "data.size": _each(_SIDE, "sides in pixels", 2, "(224, 224)"),
    "data.crop_fraction": _SHARE,
    "data.interpolation": _text,
    "data.mean": _each(_real(-1e6, 1e6), "numbers", 3, "(0.5, 0.5, 0.5)"),
    "data.std": _each(_POSITIVE, "positive numbers", 3, "(0.5, 0.5, 0.5)"),
    "data.upright": _flag,
    "data.workers": _whole(0, 1024),
    "data.threads": _whole(0, 1024),
    "data.broken_limit": _whole(0, 10**9),
    "augment.crop": _text,
    "augment.min_scale": _SHARE,
    "augment.flip": _flag,
    "augment.shift": _whole(0, 4096),
    "augment.randaugment": _text,
    "augment.color_jitter": _NOT_NEGATIVE,
    "augment.scale": _each(_POSITIVE, "positive numbers", 2, "(0.5, 2.0)"),
    "augment.class_share": _SHARE,
    "augment.photometric": _flag,
    "augment.repeats": _whole(1, 10**6),
    "augment.erase": _PROBABILITY,
    "augment.mixup": _NOT_NEGATIVE,
    "augment.cutmix": _NOT_NEGATIVE,
    "augment.mix_probability": _PROBABILITY,
    "augment.mix_groups": _whole(1, _MOST_IMAGES),
    "augment.cutmix_probability": _PROBABILITY,
    "inference.short_side": _optional(_SIDE),
    "inference.stride": _whole(0, _MOST_PIXELS),
    "inference.scales": _each(_POSITIVE, "positive numbers", example="(1.0,)"),
    "inference.flip": _flag,
    "optimizer.learning_rate": _POSITIVE,
    "optimizer.learning_rate_batch": _whole(0, _MOST_IMAGES),
    "optimizer.schedule": _one_of("cosine", "polynomial", "cosine_by_epoch"),
    "optimizer.schedule_power": _POSITIVE,
    **_duration("optimizer.warmup", 0),
    "optimizer.warmup_learning_rate": _NOT_NEGATIVE,
    "optimizer.final_learning_rate": _NOT_NEGATIVE,
    "optimizer.b1": _BELOW_ONE,
    "optimizer.b2": _BELOW_ONE,
    "optimizer.eps": _POSITIVE,
    "optimizer.weight_decay": _NOT_NEGATIVE,
    "optimizer.clip_norm": _NOT_NEGATIVE,
    "optimizer.skip_nonfinite": _whole(0, _MOST_STEPS),
    "optimizer.label_smoothing": _BELOW_ONE,
    "optimizer.auxiliary_weight": _NOT_NEGATIVE,
    "optimizer.ema_decay": _BELOW_ONE,
    "optimizer.accumulate": _whole(0, _MOST_IMAGES),  # it must also divide the batch size
    "optimizer.layer_decay": _SHARE,
    "optimizer.freeze": _each(_pattern, "regular expressions", example="\"('stage1/',)\""),
}


def rule_of(field: str) -> Rule | None:
    """Return the rule for a field such as `data.size`, or None if there is none."""
    return _by_the_model if field.startswith("model.") else RULES.get(field)


def _unwrap(value: Any) -> Any:
    """Convert NumPy types, which values computed in a config may have, into Python's own."""
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, tuple | list):
        return tuple(_unwrap(element) for element in value)
    return value


def problem_of(fields: Mapping[str, Any]) -> tuple[str, str] | None:
    """Return the first field with an invalid value and what is wrong with it, or None.

    Args:
        fields: the values by field, such as `data.size`.
    """
    for field, value in fields.items():
        rule = rule_of(field)
        if rule is not None and (wrong := rule(_unwrap(value))):
            return field, wrong
    return None
