"""Conversion between the published PyTorch names and shapes and this package's parameters.

Linear weights are `[out, in]` in PyTorch and `[in, out]` here; convolution kernels are
`[out, in/groups, k, k]` in PyTorch and `[k, k, in/groups, out]` here, where the blocks of a stage
are also stacked.
"""

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from vvt_jax.data.imagenet import class_names
from vvt_jax.models import VVT, create_model
from vvt_jax.models.shapes import smallest_image, variable_shapes
from vvt_jax.models.vvt import from_fields
from vvt_jax.weights import torch_files
from vvt_jax.weights.checks import WeightsError, check_arrays, check_finite
from vvt_jax.weights.torch_pickle import Tensor

# The published module name, our name and the kind of weight, in the order of the published files.
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

# Of the published evaluation, with which all published weights were evaluated.
_PUBLISHED_PREPROCESSING = {
    "size": [224, 224],
    "crop_fraction": 0.875,
    "interpolation": "bicubic",
    "mean": [0.485, 0.456, 0.406],
    "std": [0.229, 0.224, 0.225],
}


def from_pytorch(
    state_dict: Mapping[str, np.ndarray], model: VVT, *, skip_head: bool = False
) -> dict[str, Any]:
    """Convert tensors with the published names to the parameters of a model.

    Args:
        state_dict: `{name: array}` with the published names and shapes; the arrays are anything
            that NumPy can convert.
        model: the model that the weights are for.
        skip_head: ignore the tensors of the classifier, whatever their shape; the result then has a
            freshly initialised head (from key 0), or no head if `num_classes` is 0.

    Returns:
        The variables `{"params": ...}`, float32.

    Raises:
        WeightsError: a tensor is missing, unexpected or of another shape; the message names it.
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
        # within jit, the rest of the model is never initialised
        fresh = jax.jit(lambda key: model.init(key, smallest_image())["params"]["head"])(
            jax.random.key(0)
        )
        flat |= {f"head/{name}": value for name, value in fresh.items()}
    flat = {path: jnp.asarray(value) for path, value in flat.items()}
    return {"params": unflatten_dict(flat, sep="/")}


def to_pytorch(variables: Mapping[str, Any], model: VVT) -> dict[str, np.ndarray]:
    """Convert parameters to the published names and shapes, in the order of the published files.

    Args:
        variables: the variables `{"params": ...}` of the model.
        model: the model that they are for.

    Returns:
        `{name: array}` as in a published state dict.

    Raises:
        WeightsError: the variables are not those of the model.
    """
    shapes = _parameter_shapes(model)
    flat = flatten_dict(variables["params"], sep="/")
    check_arrays(flat, shapes)
    arrays = {path: np.asarray(value) for path, value in flat.items()}
    return {
        name: _to_published(arrays[path] if block is None else arrays[path][block], kind)
        for name, path, block, kind in _table(model, shapes)
    }


def read_published(
    path: str | os.PathLike, name: str | None = None, **fields: Any
) -> tuple[VVT, dict[str, Any], dict[str, Any]]:
    """Load a model, its variables and its card from a published `.pth`, for `load_pretrained`.

    Args:
        path: a file with a bare state dict, or with a training checkpoint that has it as `model`.
        name: the name of the model; None: inferred from the shapes.
        **fields: model fields that can't be inferred from the shapes, e.g. `num_heads` for widths
            other than the published ones.

    Returns:
        The same as `load_pretrained`. The card has the preprocessing of the published evaluation,
        and ImageNet's class names if there are 1000 classes.

    Raises:
        WeightsError: the file can't be read, holds anything but weights, or is for another model.
        ValueError: a field does not exist in the model.
    """
    content = torch_files.read_file(path)
    if isinstance(content, dict) and isinstance(content.get("model"), dict):
        content = content["model"]
    if not isinstance(content, dict) or not content:
        raise WeightsError(f"{path} holds no state dict.")
    for key, value in content.items():
        if not isinstance(value, Tensor) or not isinstance(key, str):
            raise WeightsError(f"{path} holds no state dict: {str(key)[:100]!r} is no tensor.")
    shapes = {key: value.shape for key, value in content.items()}
    try:
        if name is None:
            model = recognise(shapes, **fields)
        else:
            model = create_model(name, **{"num_classes": _classes(shapes), **fields})
        # before any tensor is read: a tensor that does not belong may be of any size
        check_arrays(content, published_shapes(model))
        arrays = {key: value.read() for key, value in content.items()}
        check_finite(arrays)
        variables = from_pytorch(arrays, model)
    except WeightsError as error:
        message = str(error)
        raise WeightsError(message if str(path) in message else f"{path}: {message}") from error
    card: dict[str, Any] = {"preprocessing": _PUBLISHED_PREPROCESSING}
    names = list(class_names().values())
    if model.num_classes == len(names):
        card["class_names"] = names
    return model, variables, card


def recognise(shapes: Mapping[str, Sequence[int]], **fields: Any) -> VVT:
    """Recognise the model from the published names and shapes of its tensors.

    Args:
        shapes: the shapes by published name, as in PyTorch.
        **fields: model fields that override the inferred ones; `num_heads` is required if the
            widths aren't the published ones. The other fields that can't be inferred from the
            shapes (locality, clamp, strides) are as published.

    Raises:
        WeightsError: the shapes are of no known model, or `num_heads` is required.
        ValueError: a field does not exist in the model.
    """

    def rows(name: str, column: int = 0) -> int:
        if name not in shapes or len(shapes[name]) <= column or not shapes[name][column]:
            raise WeightsError(f"This is no Vicinity Vision Transformer: it lacks {name}.")
        return shapes[name][column]

    stages = range(1, 5)
    widths = [rows(f"patch_embed{i}.proj.weight") for i in stages]
    blocks = [f"block{i}.0" for i in stages]
    told: dict[str, Any] = {
        "embed_dims": widths,
        "depths": [_depth(shapes, i) for i in stages],
        "mlp_ratios": [
            rows(f"{block}.mlp.fc1.weight") // rows(f"{block}.mlp.fc1.weight", 1)
            for block in blocks
        ],
        "num_classes": _classes(shapes),
    }
    if not any(".attn.se_fc." in name for name in shapes):
        told["attention"] = "softmax"  # the ablation has no gate
    else:
        told["feature_reduction"] = [
            rows(f"{block}.attn.q_proj.weight", 1) // rows(f"{block}.attn.q_proj.weight")
            for block in blocks
        ]
        told["gate_reduction"] = widths[0] // rows(f"{blocks[0]}.attn.se_fc.0.weight")
    published = VVT()
    if tuple(widths) == published.embed_dims:
        told["num_heads"] = published.num_heads
    elif "num_heads" not in fields:
        raise WeightsError(
            f"The widths {widths} are none of the published ones, and no shape tells the number "
            "of heads: give num_heads, or the model's name."
        )
    try:
        return from_fields(VVT, {**told, **fields})
    except ValueError as error:
        if fields:
            raise
        raise WeightsError(f"These are the shapes of no model: {error}") from error


def published_shapes(model: VVT) -> dict[str, tuple[int, ...]]:
    """Return the shape of every tensor of a model by published name, in the published order."""
    shapes = _parameter_shapes(model)
    return {
        name: _published_shape(shapes[path], kind) for name, path, _, kind in _table(model, shapes)
    }


def _classes(shapes: Mapping[str, Sequence[int]]) -> int:
    return next(iter(shapes.get("head.weight", ())), 0)


def _depth(shapes: Mapping[str, Sequence[int]], stage: int) -> int:
    pattern = re.compile(rf"block{stage}\.(\d+)\.")
    return len({match[1] for match in map(pattern.match, shapes) if match})


def _table(model: VVT, shapes: Mapping[str, Any]) -> Iterator[tuple[str, str, int | None, str]]:
    """Yield published name, our path, index in the stack (None: not stacked) and kind of tensor."""

    def tensors(published: str, ours: str, kind: str, block: int | None = None):
        weight = "scale" if kind == "norm" else "kernel"
        for theirs, leaf, leaf_kind in (("weight", weight, kind), ("bias", "bias", "bias")):
            # Some layers have no bias, and the softmax ablation has no gate
            if f"{ours}/{leaf}" in shapes:
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
