"""Which weights a model has, and whether given ones are those."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from vvt_jax.system.errors import UserError


class WeightsError(UserError):
    """Weights that can't be read, or are not those of the model."""


def check_arrays(given: Mapping[str, Any], expected: Mapping[str, tuple[int, ...]]) -> None:
    """Compares arrays by name with the shapes that a model has.

    Raises:
        WeightsError: an array that is missing, surplus or of another shape, each named.
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
    """Refuses weights of which a model would only make more numbers that are none.

    Raises:
        WeightsError: an array, by its name, has a NaN or an infinite number.
    """
    for name, array in arrays.items():
        if not np.isfinite(array).all():
            raise WeightsError(f"These weights can't be used: {name} has NaN or infinite numbers.")


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
