"""Which variables a model has, found without computing them."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict

from vvt_jax.models import VVT
from vvt_jax.models.vvt import SMALLEST_SIDE


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


def smallest_image() -> jax.Array:
    """A black image of the smallest size that a model takes: `[1, 32, 32, 3]`."""
    return jnp.zeros((1, SMALLEST_SIDE, SMALLEST_SIDE, 3))
