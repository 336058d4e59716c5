"""Which weights a model has, and whether given ones are those."""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict

from vvt_jax.models import VVT
from vvt_jax.models.vvt import SMALLEST_SIDE
from vvt_jax.system.errors import UserError


class WeightsError(UserError):
    """Weights that can't be read, or are not those of the model."""


def abstract_variables(model: VVT) -> dict[str, Any]:
    """The variables of a model as `jax.ShapeDtypeStruct`; nothing is computed.

    Tracing takes most of the time in which a model is loaded, so recent answers are kept.
    """
    try:
        tree = _cached_variables(model)
    except TypeError:  # a field is a list, which has no hash
        tree = _trace_variables(model)
    return jax.tree.map(lambda leaf: leaf, tree)  # a copy, so that callers may change it


def _trace_variables(model: VVT) -> dict[str, Any]:
    return jax.eval_shape(model.init, jax.random.key(0), smallest_image())


_cached_variables = functools.lru_cache(maxsize=64)(_trace_variables)


def variable_shapes(model: VVT) -> dict[str, tuple[int, ...]]:
    """The shape of every variable of a model, by its path, e.g. `params/stage1/norm/scale`."""
    flat = flatten_dict(abstract_variables(model), sep="/")
    return {path: leaf.shape for path, leaf in flat.items()}


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


def smallest_image() -> jax.Array:
    """A black image of the smallest size that a model takes: `[1, 32, 32, 3]`."""
    return jnp.zeros((1, SMALLEST_SIDE, SMALLEST_SIDE, 3))
