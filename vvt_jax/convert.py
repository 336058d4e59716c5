"""Between the published PyTorch names and shapes and this package's parameters.

Linear weights are `[out, in]` there and `[in, out]` here, convolutions `[out, in/groups, k, k]`
there and `[k, k, in/groups, out]` here, and the blocks of a stage are stacked here.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from vvt_jax.models import VVT
from vvt_jax.weights import check_arrays, smallest_image, variable_shapes

# Published module name, ours, and the kind of its weight, in the order of the published files.
_EMBEDDING = (("proj", "conv", "conv"), ("norm", "norm", "norm"))
_BLOCK = (
    ("norm1", "norm1", "norm"),
    ("attn.k_proj", "attention/key", "linear"),
    ("attn.v_proj", "attention/value", "linear"),
    ("attn.q_proj", "attention/query", "linear"),
    ("attn.out_proj", "attention/out", "linear"),
    ("attn.se_fc.0", "attention/gate_reduce", "linear"),
    ("attn.se_fc.2", "attention/gate_expand", "linear"),
    ("norm2", "norm2", "norm"),
    ("mlp.fc1", "feed_forward/fc1", "linear"),
    ("mlp.dwconv.dwconv", "feed_forward/depthwise", "conv"),
    ("mlp.fc2", "feed_forward/fc2", "linear"),
)


def from_pytorch(
    state_dict: Mapping[str, np.ndarray], model: VVT, *, skip_head: bool = False
) -> dict[str, Any]:
    """Parameters of `model` from tensors of the published names.

    Args:
        state_dict: `{name: array}` of the published names and shapes; anything that NumPy makes an
            array of.
        model: the model that the weights are for.
        skip_head: leave the tensors of the classifier out, whatever their size; the result then has
            a freshly initialised head (key 0), or none where `num_classes` is 0.

    Returns:
        `{"params": ...}`, float32.

    Raises:
        WeightsError: a tensor that is missing, surplus or of another shape, each named.
    """
    shapes = _parameter_shapes(model)
    given = {k: v for k, v in state_dict.items() if not (skip_head and k.startswith("head."))}
    table = [row for row in _table(model, shapes) if not (skip_head and row[0].startswith("head."))]
    check_arrays(
        given, {name: _published_shape(shapes[path], kind) for name, path, _, kind in table}
    )

    flat: dict[str, Any] = {}
    for name, path, block, kind in table:
        array = _to_ours(np.asarray(given[name], np.float32), kind)
        if block is None:
            flat[path] = array
        else:
            flat.setdefault(path, np.empty(shapes[path], np.float32))[block] = array
    if skip_head and model.num_classes:
        # within jit the rest of the model is never made
        fresh = jax.jit(lambda key: model.init(key, smallest_image())["params"]["head"])(
            jax.random.key(0)
        )
        flat |= {f"head/{name}": value for name, value in fresh.items()}
    flat = {path: jnp.asarray(value) for path, value in flat.items()}
    return {"params": unflatten_dict(flat, sep="/")}


def to_pytorch(variables: Mapping[str, Any], model: VVT) -> dict[str, np.ndarray]:
    """Tensors under their published names and shapes, in the order of the published files.

    Raises:
        WeightsError: variables that are not those of the model.
    """
    shapes = _parameter_shapes(model)
    flat = flatten_dict(variables["params"], sep="/")
    check_arrays(flat, shapes)
    arrays = {path: np.asarray(value) for path, value in flat.items()}
    return {
        name: _to_published(arrays[path] if block is None else arrays[path][block], kind)
        for name, path, block, kind in _table(model, shapes)
    }


def _table(model: VVT, shapes: Mapping[str, Any]) -> Iterator[tuple[str, str, int | None, str]]:
    """Published name, our path, index in the stack (None where not stacked), kind of tensor."""

    def tensors(published: str, ours: str, kind: str, block: int | None = None):
        weight = "scale" if kind == "norm" else "kernel"
        for theirs, leaf, leaf_kind in (("weight", weight, kind), ("bias", "bias", "bias")):
            if f"{ours}/{leaf}" in shapes:  # some have no bias, the softmax ablation no gate
                yield f"{published}.{theirs}", f"{ours}/{leaf}", block, leaf_kind

    for i, depth in enumerate(model.depths, 1):
        for theirs, ours, kind in _EMBEDDING:
            yield from tensors(f"patch_embed{i}.{theirs}", f"stage{i}/patch_embed/{ours}", kind)
        for block in range(depth):
            for theirs, ours, kind in _BLOCK:
                yield from tensors(
                    f"block{i}.{block}.{theirs}", f"stage{i}/blocks/{ours}", kind, block
                )
        yield from tensors(f"norm{i}", f"stage{i}/norm", "norm")
    yield from tensors("head", "head", "linear")


def _to_ours(array: np.ndarray, kind: str) -> np.ndarray:
    return array.transpose({"linear": (1, 0), "conv": (2, 3, 1, 0)}.get(kind, range(array.ndim)))


def _to_published(array: np.ndarray, kind: str) -> np.ndarray:
    axes = {"linear": (1, 0), "conv": (3, 2, 0, 1)}.get(kind, range(array.ndim))
    return np.ascontiguousarray(array.transpose(axes))


def _published_shape(shape: tuple[int, ...], kind: str) -> tuple[int, ...]:
    rank = {"linear": 2, "conv": 4}.get(kind, 1)
    return _to_published(np.broadcast_to(np.empty(()), shape[-rank:]), kind).shape


def _parameter_shapes(model: VVT) -> dict[str, tuple[int, ...]]:
    return {path.removeprefix("params/"): shape for path, shape in variable_shapes(model).items()}
