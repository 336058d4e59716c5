"""The variables of a model and their shapes, found without computing them."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict

from vvt_jax.models import VVT
from vvt_jax.models.vvt import SMALLEST_SIDE


def abstract_variables(model: VVT) -> dict[str, Any]:
    """Return the variables of a model as `jax.ShapeDtypeStruct`, without computing them.

    Tracing takes most of the time it takes to load a model, so recent results are cached.
    """
    try:
        tree = _cached_variables(model)
    except TypeError:  # a field is a list, which can't be hashed
        tree = _trace_variables(model)
    return jax.tree.map(lambda leaf: leaf, tree)  # a copy, so that callers may change it


def _trace_variables(model: VVT) -> dict[str, Any]:
    return jax.eval_shape(model.init, jax.random.key(0), smallest_image())


_cached_variables = functools.lru_cache(maxsize=64)(_trace_variables)


def variable_shapes(model: VVT) -> dict[str, tuple[int, ...]]:
    """Return the shape of every variable of a model by path, e.g. `params/stage1/norm/scale`."""
    flat = flatten_dict(abstract_variables(model), sep="/")
    return {path: leaf.shape for path, leaf in flat.items()}


def smallest_image() -> jax.Array:
    """Return a black image of the smallest size that models accept: `[1, 32, 32, 3]`."""
    return jnp.zeros((1, SMALLEST_SIDE, SMALLEST_SIDE, 3))
