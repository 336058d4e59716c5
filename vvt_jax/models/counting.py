"""The cost of a model, counted from its program: multiply-adds and activations by layer."""

import dataclasses
import math
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core

from vvt_jax.attention import feature_count
from vvt_jax.models import VVT, forms
from vvt_jax.models.shapes import abstract_variables, variable_shapes

# Matches the products of two activations. Products with parameters have a layer's name appended.
_ATTENTION = re.compile(r"stage(\d)/blocks/attention")

# Floating-point operations per second of one device in bfloat16, as published by its manufacturer,
# without sparsity; by JAX's name of the kind of device.
PEAK_FLOPS = {
    "TPU v2": 22.5e12,
    "TPU v3": 61.5e12,
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5": 459e12,
    "TPU v6 lite": 918e12,
    "Tesla V100-SXM2-16GB": 125e12,
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA L4": 121e12,
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H200": 989e12,
}


@dataclasses.dataclass(frozen=True)
class LayerCost:
    """The forward cost of one layer on one image, with all blocks of a stage counted together.

    Attributes:
        path: the path of the layer's module, e.g. `stage1/blocks/attention/query`.
        published: multiply-adds by the published convention: those of convolutions, linear layers
            and the two products of attention in the concatenated form, without its denominator.
        actual: multiply-adds of all convolutions and matrix products of the forms in force.
        activations: number of elements in the outputs of convolutions and linear layers (timm's
            convention).
    """

    path: str
    published: int
    actual: int
    activations: int


def parameter_count(model: VVT) -> int:
    """Return the number of parameters of a model."""
    shapes = variable_shapes(model)
    return sum(math.prod(s) for path, s in shapes.items() if path.startswith("params/"))


def count(model: VVT, height: int, width: int) -> list[LayerCost]:
    """Return the cost of each layer on one image of that size in pixels, in forward order.

    The model is only traced, so nothing is computed.
    """
    model = model.clone(unroll=False)  # a shorter program of the same operations
    images = jax.ShapeDtypeStruct((1, height, width, 3), jnp.float32)
    variables = abstract_variables(model)
    maps = _map_sizes(model, height, width)

    def products(model: VVT) -> list[_Product]:
        with forms.use(depthwise="grouped"):  # both forms have the same multiply-adds
            return list(_walk(jax.make_jaxpr(model.apply)(variables, images).jaxpr, "", 1))

    done = products(model)
    whole = products(model.clone(ffn_bands=1)) if model.ffn_bands > 1 else done
    published: dict[str, int] = {}
    actual: Counter[str] = Counter()
    activations: Counter[str] = Counter()
    for product in whole:
        path = product.path
        if path not in published:  # dicts keep the order of the forward pass
            published[path] = _attention_products(model, maps, path)
        if not _ATTENTION.fullmatch(path):
            published[path] += product.multiply_adds
            activations[path] += product.outputs
    for product in done:
        actual[product.path] += product.multiply_adds
    return [LayerCost(path, published[path], actual[path], activations[path]) for path in published]


def _map_sizes(model: VVT, height: int, width: int) -> list[tuple[int, int]]:
    """Return the sizes of the four maps, which each patch embedding divides, rounding up."""
    sizes = []
    for stride in model.patch_strides:
        height, width = math.ceil(height / stride), math.ceil(width / stride)
        sizes.append((height, width))
    return sizes


def _attention_products(model: VVT, maps: Sequence[tuple[int, int]], path: str) -> int:
    """Count the multiply-adds of φ(K)ᵀV and φ(Q)·KV, or of softmax(QKᵀ)V, in a stage's blocks."""
    if not (found := _ATTENTION.fullmatch(path)):
        return 0
    stage = int(found[1]) - 1
    height, width = maps[stage]
    channels = model.embed_dims[stage]
    tokens = height * width
    if model.attention == "softmax":
        each = 2 * tokens * tokens * channels
    else:
        reduced = channels // model.feature_reduction[stage]
        features = feature_count(model.locality) * reduced // model.num_heads[stage]
        each = 2 * tokens * features * reduced
    return model.depths[stage] * each


@dataclasses.dataclass(frozen=True)
class _Product:
    path: str
    multiply_adds: int
    outputs: int


def _walk(jaxpr: core.Jaxpr, prefix: str, times: int) -> Iterator[_Product]:
    for equation in jaxpr.eqns:
        path = f"{prefix}/{equation.source_info.name_stack}"
        kind = equation.primitive.name
        if kind == "conv_general_dilated":
            yield _convolution(equation, _layer(path), times)
        elif kind == "dot_general":
            yield _matrix_product(equation, _layer(path), times)
        else:
            inner = times * (equation.params["length"] if kind == "scan" else 1)
            for sub in core.jaxprs_in_params(equation.params):
                yield from _walk(sub, path, inner)


def _convolution(equation: Any, path: str, times: int) -> _Product:
    kernel = equation.invars[1].aval.shape
    spec = equation.params["dimension_numbers"].rhs_spec  # outputs, inputs, height, width
    outputs = times * equation.outvars[0].aval.size
    each = math.prod(kernel[axis] for axis in spec[1:])
    return _Product(path, each * outputs, outputs)


def _matrix_product(equation: Any, path: str, times: int) -> _Product:
    left = equation.invars[0].aval
    (summed, _), _ = equation.params["dimension_numbers"]
    outputs = times * equation.outvars[0].aval.size
    each = math.prod(left.shape[axis] for axis in summed)
    return _Product(path, each * outputs, outputs)


def _layer(path: str) -> str:
    """Return a layer's path, such as `stage1/blocks/attention`, from a path in the program.

    That would be `/VVT/VVT.features/stage1/blocks/attention/btnf,btne->bnfe` in this example.
    """
    return "/".join(part for part in path.split("/") if re.fullmatch(r"[a-z]\w*", part))
