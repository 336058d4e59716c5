"""Convolutions with correct gradients when the rows of a map are split over several devices."""

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
    """Return how many devices hold different rows of a map when `devices` share an image.

    Each holds the same number of rows, rounded up, so the last devices may have none. A map with
    fewer rows than devices is kept whole on every device, which counts as one group.
    """
    return 1 if rows < devices else math.ceil(rows / math.ceil(rows / devices))


def split_rows(x: jax.Array, rows_after: int | None = None) -> jax.Array:
    """Fix how the rows of a map `[batch, height, width, channels]` are split over the devices.

    By default, XLA splits rows that do not divide evenly into fewer groups, replicates each group
    on several devices, and then counts every replica in the gradient of a convolution's kernel.
    With this function, all devices take part, and the last one is padded. The exception is a map
    with fewer rows than devices. There, XLA (jax 0.10) gets the same gradient wrong for another
    reason, so such a map is kept whole on each device, which costs little. The same applies to the
    input of a convolution whose output has fewer rows than there are devices: for such an input x,
    pass the number of the output's rows as `rows_after`.

    The function does nothing unless `forms.compiling_for` was given the layout of the rows. The
    gradient of x gets the same layout as x.
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
    """Compute `jax.lax.conv_general_dilated` with correct gradients when devices share the rows.

    It can be passed to `flax.linen.Conv` as `conv_general_dilated`. On one device, and wherever
    images are not split, it is the same operation.

    Args:
        x: the input, `[batch, height, width, inputs]`.
        kernel: the kernel, `[kernel_height, kernel_width, inputs / groups, outputs]`.
        window_strides: the strides along the height and the width.
        padding: `"SAME"`, or the number of zeros before and after the map along each axis.
        feature_group_count: 1, or the number of inputs for a depthwise convolution.
        split: whether the rows of x are split over the devices. False for windows that are cut out
            such that each is on one device.
        **options: further options from flax, which are passed on.
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
    # Keep the kernel whole even where "fsdp" splits it, or XLA would split the maps' channels too
    whole = NamedSharding(layout.mesh, PartitionSpec())
    kernel = jax.lax.with_sharding_constraint(kernel, whole)
    if not split:
        return by_windows(x, kernel)
    rows = jax.eval_shape(plain, x, kernel).shape[1]
    examples, spatial = (_devices_along(layout, axes) for axes in layout.spec)
    # If devices hold copies of each other's rows or examples, XLA may count every copy
    copies = row_groups(min(rows, x.shape[1]), spatial) == 1 or x.shape[0] % examples
    apart = _rows_apart(x.shape[1], rows, window_strides[0], spatial)
    beyond_neighbours = apart > math.ceil(x.shape[1] / spatial)
    convolution = by_windows if copies or beyond_neighbours else plain
    return split_rows(convolution(split_rows(x, rows), kernel))


def _rows_apart(rows: int, rows_after: int, stride: int, devices: int) -> int:
    """Return how far the rows that a device computes are at most from the input rows that it holds.

    The distance is in rows of the input. If it reaches beyond the rows of the neighbouring devices,
    XLA (jax 0.10) computes wrong kernel gradients.
    """
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
    """Compute a convolution whose kernel gradient is correct however XLA lays out the rows.

    This is for maps of which several devices hold copies, and for callers of `forms.compiling_for`
    that specify how many devices share an image but not the layout, which can't be fixed then. The
    gradient of the kernel is computed as one matrix product (or, for a depthwise kernel, one sum)
    for each position in the kernel, and XLA fetches the rows of neighbouring devices for each.
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
