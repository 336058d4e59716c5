"""Convolutions whose gradients are right when the rows of a map lie over several devices."""

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from vvt_jax.models import forms

_Padding = tuple[tuple[int, int], tuple[int, int]]
_LAYOUT = ("NHWC", "HWIO", "NHWC")


def row_groups(rows: int, devices: int) -> int:
    """The number of devices that hold different rows of a map when `devices` share an image.

    Each takes the same number of rows, rounded up, so the last devices may have none. A map with
    fewer rows than devices is whole on every device, which counts as one group.
    """
    return 1 if rows < devices else math.ceil(rows / math.ceil(rows / devices))


def split_rows(x: jax.Array, rows_after: int | None = None) -> jax.Array:
    """Fixes how the rows of a map `[batch, height, width, channels]` lie over the devices.

    Left to itself, XLA splits rows that do not divide evenly into fewer groups, each repeated on
    several devices, and then counts each repetition in the gradient of a convolution's kernel.
    Here all devices take part, and the last one is padded. The exception is a map with fewer rows
    than devices: there XLA (jax 0.10) gets the same gradient wrong for another reason, so such a
    map is kept whole on each device, which costs little. So is the input of a convolution whose
    output has so few rows: `rows_after`, where x is such an input.

    This does nothing unless `forms.compiling_for` was given the layout of the rows. The gradient of
    x gets the same layout as x.
    """
    layout = forms.row_layout()
    if layout is None:
        return x
    examples, rows = layout.spec
    if x.shape[0] % _devices_along(layout, examples):
        examples = PartitionSpec.UNCONSTRAINED  # a part of a batch, for example
    if row_groups(min(x.shape[1], rows_after or x.shape[1]), _devices_along(layout, rows)) == 1:
        rows = None
    spec = PartitionSpec(examples, rows, None, None)
    return jax.lax.with_sharding_constraint(x, NamedSharding(layout.mesh, spec))


def convolve(
    x: jax.Array,
    kernel: jax.Array,
    window_strides: Sequence[int],
    padding: str | Sequence[tuple[int, int]],
    *,
    feature_group_count: int = 1,
    split: bool = True,
    **options: Any,
) -> jax.Array:
    """`jax.lax.conv_general_dilated`, with the right gradients when devices share the rows.

    It can be given to `flax.linen.Conv` as `conv_general_dilated`. On one device, and wherever
    images are not split, it is the same operation.

    Args:
        x: `[batch, height, width, inputs]`.
        kernel: `[kernel_height, kernel_width, inputs / groups, outputs]`.
        window_strides: along the height and the width.
        padding: `"SAME"`, or the numbers of zeros before and after each side.
        feature_group_count: 1, or the number of inputs (a depthwise convolution).
        split: whether the rows of x lie over the devices; False for windows that are cut out so
            that each lies on one device.
        **options: passed on, as flax gives them.
    """
    options = {"dimension_numbers": _LAYOUT, "feature_group_count": feature_group_count, **options}

    def plain(x: jax.Array, kernel: jax.Array) -> jax.Array:
        return jax.lax.conv_general_dilated(x, kernel, window_strides, padding, **options)

    if forms.spatial_devices() == 1:
        return plain(x, kernel)
    pads = padding
    if isinstance(pads, str):
        pads = jax.lax.padtype_to_pads(x.shape[1:3], kernel.shape[:2], window_strides, pads)
    top_bottom, left_right = (tuple(side) for side in pads)

    def by_windows(x: jax.Array, kernel: jax.Array) -> jax.Array:
        return _convolve_by_windows(
            x, kernel, tuple(window_strides), (top_bottom, left_right), feature_group_count
        )

    if (layout := forms.row_layout()) is None:
        return by_windows(x, kernel)
    # Whole, also where "fsdp" spreads it: XLA would spread the channels of maps the same way
    whole = NamedSharding(layout.mesh, PartitionSpec())
    kernel = jax.lax.with_sharding_constraint(kernel, whole)
    if not split:
        return by_windows(x, kernel)
    rows = jax.eval_shape(plain, x, kernel).shape[1]
    examples, spatial = (_devices_along(layout, axes) for axes in layout.spec)
    # Where devices hold copies of one another's rows or examples, XLA may count each of them
    copies = row_groups(min(rows, x.shape[1]), spatial) == 1 or x.shape[0] % examples
    apart = _rows_apart(x.shape[1], rows, window_strides[0], spatial)
    beyond_neighbours = apart > math.ceil(x.shape[1] / spatial)
    convolution = by_windows if copies or beyond_neighbours else plain
    return split_rows(convolution(split_rows(x, rows), kernel))


def _rows_apart(rows: int, rows_after: int, stride: int, devices: int) -> int:
    """How far the rows that a device computes lie at most from those of the input that it holds, in
    rows of the input. Beyond its neighbours' rows, XLA (jax 0.10) makes wrong kernel gradients."""
    given, made = math.ceil(rows / devices), math.ceil(rows_after / devices)
    last = math.ceil(rows_after / made) - 1
    return last * abs(made * stride - given)


def _devices_along(layout: NamedSharding, axes: str | tuple[str, ...]) -> int:
    names = (axes,) if isinstance(axes, str) else axes
    return math.prod(layout.mesh.shape[name] for name in names)


def _plain(x, kernel, strides, padding, groups):
    return jax.lax.conv_general_dilated(
        x, kernel, strides, padding, feature_group_count=groups, dimension_numbers=_LAYOUT
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def _convolve_by_windows(
    x: jax.Array, kernel: jax.Array, strides: tuple[int, int], padding: _Padding, groups: int
) -> jax.Array:
    """A convolution whose kernel gradient is right however XLA lays the rows out.

    For maps of which several devices hold copies, and for callers of `forms.compiling_for` who say
    how many devices share an image but not which, so that the layout can't be fixed. The gradient
    of the kernel is made of one product (of a depthwise kernel: one sum) for each of its places;
    XLA fetches the rows of neighbours for each.
    """
    return _plain(x, kernel, strides, padding, groups)


def _forward(x, kernel, strides, padding, groups):
    return _plain(x, kernel, strides, padding, groups), (x, kernel)


def _backward(strides, padding, groups, residuals, cotangent):
    x, kernel = residuals
    _, pull_back = jax.vjp(lambda x: _plain(x, kernel, strides, padding, groups), x)
    padded = jnp.pad(x, ((0, 0), *padding, (0, 0)))
    extents = [
        (n - 1) * stride + 1 for n, stride in zip(cotangent.shape[1:3], strides, strict=True)
    ]

    def at(i: int, j: int) -> jax.Array:
        window = padded[:, i : i + extents[0] : strides[0], j : j + extents[1] : strides[1]]
        if groups == 1:
            return jnp.einsum(
                "bhwi,bhwo->io", window, cotangent, preferred_element_type=jnp.float32
            )
        products = window.astype(jnp.float32) * cotangent.astype(jnp.float32)
        return products.sum((0, 1, 2))[None]

    height, width = kernel.shape[:2]
    by_kernel = jnp.stack([jnp.stack([at(i, j) for j in range(width)]) for i in range(height)])
    return *pull_back(cotangent), by_kernel.astype(kernel.dtype)


_convolve_by_windows.defvjp(_forward, _backward)
