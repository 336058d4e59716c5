"""Checks that weights are finite and are those of a model."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from vvt_jax.system.errors import UserError


class WeightsError(UserError):
    """Weights can't be read, or are not those of the model."""


def check_arrays(given: Mapping[str, Any], expected: Mapping[str, tuple[int, ...]]) -> None:
    """Compare arrays, by name, with the shapes that a model has.

    Args:
        given: the arrays, or anything else with a shape, by name.
        expected: the shapes of the model's arrays, by name.

    Raises:
        WeightsError: an array is missing, unexpected or of another shape; the message names it.
    """
    missing = [name for name in expected if name not in given]
    surplus = [name for name in given if name not in expected]
    if missing or surplus:
        lists = [("lack", missing), ("have the surplus", surplus)]
        told = " and ".join(f"{verb} {_some(names)}" for verb, names in lists if names)
        raise WeightsError(f"These weights are not the model's: they {told}.")
    for name, shape in expected.items():
        if np.shape(given[name]) != tuple(shape):
            raise WeightsError(
                f"These weights are not the model's: {name} is {list(np.shape(given[name]))} "
                f"where the model has {list(shape)}."
            )


def check_finite(arrays: Mapping[str, np.ndarray]) -> None:
    """Refuse weights with NaN or infinite values, which would spread to the model's output.

    Raises:
        WeightsError: an array has a NaN or an infinite value; the message names the array.
    """
    for name, array in arrays.items():
        with np.errstate(over="ignore"):  # the model computes in float32 at most
            finite = np.isfinite(np.asarray(array).astype(np.float32, copy=False)).all()
        if not finite:
            raise WeightsError(f"These weights can't be used: {name} has NaN or infinite numbers.")


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
