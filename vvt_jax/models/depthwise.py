"""The 3×3 depthwise convolution of the feed-forward network, in a form for each platform."""

import jax
import jax.numpy as jnp

from vvt_jax.models import forms
from vvt_jax.models.convolution import convolve


def depthwise_conv(
    x: jax.Array, kernel: jax.Array, *, form: str | None = None, split: bool = True
) -> jax.Array:
    """Compute a 3×3 depthwise convolution with stride 1 and zero padding 1.

    Args:
        x: the input, `[batch, height, width, channels]`.
        kernel: the kernel, `[3, 3, 1, channels]`.
        form: `"shift"` or `"grouped"`, which agree up to rounding. By default,
            `vvt_jax.models.forms` chooses.
        split: as for `convolve`: False if x consists of windows of rows, each on one device.

    Returns:
        `[batch, height, width, channels]` in the dtype of x, summed in float32.

    Raises:
        ValueError: if the form is unknown.
    """
    form = form or forms.current().depthwise
    if form == "shift":
        return _shift_and_add(x, kernel)
    if form == "grouped":
        return convolve(x, kernel, (1, 1), "SAME", feature_group_count=x.shape[-1], split=split)
    raise ValueError(f"Unknown form '{form}': it is one of {', '.join(forms.DEPTHWISE)}.")


def _shifted_sum(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Sum nine shifted views of x, each times its kernel weights; XLA fuses this into one loop."""
    _, height, width, _ = x.shape
    padded = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0))).astype(jnp.float32)
    kernel = kernel.astype(jnp.float32)
    total = jnp.zeros((), jnp.float32)
    for i in range(3):
        for j in range(3):
            total += padded[:, i : i + height, j : j + width] * kernel[i, j, 0]
    return total.astype(x.dtype)


@jax.custom_vjp
def _shift_and_add(x: jax.Array, kernel: jax.Array) -> jax.Array:
    return _shifted_sum(x, kernel)


def _forward(x, kernel):
    return _shifted_sum(x, kernel), (x, kernel)


def _backward(residuals, cotangent):
    """Compute the gradients of the input and the kernel.

    The input's gradient is the same sum with the kernel rotated by 180°. The kernel's gradient is a
    scan over rows, because nine reductions over a whole map are slow on a CPU.
    """
    x, kernel = residuals
    _, height, width, _ = x.shape
    padded = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))

    def add_row(total, row):
        gradient = jax.lax.dynamic_index_in_dim(cotangent, row, 1, keepdims=False)
        window = jax.lax.dynamic_slice_in_dim(padded, row, 3, 1).astype(jnp.float32)
        gradient = gradient.astype(jnp.float32)
        products = [
            [(window[:, i, j : j + width] * gradient).sum((0, 1)) for j in range(3)]
            for i in range(3)
        ]
        return total + jnp.stack([jnp.stack(row) for row in products]), None

    zeros = jnp.zeros((3, 3, x.shape[-1]), jnp.float32)
    kernel_gradient, _ = jax.lax.scan(add_row, zeros, jnp.arange(height))
    return (
        _shifted_sum(cotangent, kernel[::-1, ::-1]),
        kernel_gradient[:, :, None].astype(kernel.dtype),
    )


_shift_and_add.defvjp(_forward, _backward)
