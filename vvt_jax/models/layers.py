"""The layers of a Vicinity Vision Transformer, on maps `[batch, height, width, channels]`."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax.typing import Dtype

from vvt_jax import attention
from vvt_jax.models import forms
from vvt_jax.models.convolution import convolve, row_groups
from vvt_jax.models.depthwise import depthwise_conv

# Published: a normal with standard deviation 0.02, truncated at ±2. The bounds are absolute values,
# so this amounts to a plain normal.
linear_init = nn.initializers.normal(0.02)


def conv_init(key: jax.Array, shape: tuple[int, ...], dtype: Dtype = jnp.float32) -> jax.Array:
    """Draw a convolution kernel from a normal distribution with deviation sqrt(2 / fan_out).

    fan_out = kernel area · outputs / groups. Kernels are
    `[kernel_height, kernel_width, inputs / groups, outputs]`, either dense or, with one input per
    group, depthwise; a depthwise kernel also has one output per group.
    """
    area = shape[0] * shape[1]
    fan_out = area if shape[2] == 1 else area * shape[3]
    return nn.initializers.normal(math.sqrt(2 / fan_out))(key, shape, dtype)


@jax.custom_vjp
def gelu(x: jax.Array) -> jax.Array:
    """Compute the exact GELU, x · Φ(x) (Hendrycks & Gimpel, arXiv 1606.08415), for any shape.

    Only x is saved for the backward pass. JAX's own derivative would save four arrays, and they
    would be as large as the widest maps of the model.
    """
    wide = x.astype(jnp.float32)
    # erfc, which jax.nn.gelu uses, is slower on a CPU
    return (wide * (0.5 + 0.5 * jax.lax.erf(wide * math.sqrt(0.5)))).astype(x.dtype)


def _gelu_again(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Recompute GELU and its derivative for the backward pass, in float32."""
    wide = x.astype(jnp.float32)
    # Flip the signs, so that XLA does not recognise the forward pass's expression and keep its
    # value in memory until now.
    probability = 0.5 - 0.5 * jax.lax.erf(wide * -math.sqrt(0.5))
    density = jnp.exp(-0.5 * wide * wide) * (1 / math.sqrt(2 * math.pi))
    return wide * probability, probability + wide * density


def _gelu_forward(x):
    return gelu(x), x


def _gelu_backward(x, cotangent):
    _, slope = _gelu_again(x)
    return ((slope * cotangent.astype(jnp.float32)).astype(x.dtype),)


gelu.defvjp(_gelu_forward, _gelu_backward)


@jax.custom_vjp
def gelu_matmul(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Compute `gelu(x) @ kernel` for `[batch, height, width, inputs]` and `[inputs, outputs]`.

    The backward pass recomputes gelu(x), so that only x has to be kept and not both.
    """
    return gelu(x) @ kernel


def _gelu_matmul_forward(x, kernel):
    return gelu_matmul(x, kernel), (x, kernel)


def _gelu_matmul_backward(inputs, cotangent):
    x, kernel = inputs
    hidden, slope = _gelu_again(x)
    by_kernel = jnp.einsum("bhwi,bhwo->io", hidden.astype(x.dtype), cotangent)
    by_hidden = jnp.einsum("bhwo,io->bhwi", cotangent, kernel).astype(jnp.float32)
    return (slope * by_hidden).astype(x.dtype), by_kernel.astype(kernel.dtype)


gelu_matmul.defvjp(_gelu_matmul_forward, _gelu_matmul_backward)


def drop_path(module: nn.Module, x: jax.Array, rate: jax.Array | None) -> jax.Array:
    """Drop the whole residual branch of each example with probability `rate` (stochastic depth).

    `rate` is a scalar, or None to drop nothing. The branches that are kept are scaled by
    1/(1−rate). Random numbers come from the module's "dropout" stream.
    """
    if rate is None:
        return x
    keep = jax.random.bernoulli(module.make_rng("dropout"), 1 - rate, (x.shape[0], 1, 1, 1))
    return jnp.where(keep, x / (1 - rate).astype(x.dtype), 0)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def layer_norm(x: jax.Array, scale: jax.Array, bias: jax.Array, epsilon: float) -> jax.Array:
    """Normalise over the last axis (Ba et al., arXiv 1607.06450), in float32.

    `x` is `[..., channels]`, and `scale` and `bias` are `[channels]`. The result has the shape and
    dtype of `x`.

    Only x and two numbers per token are saved for the backward pass, whereas JAX's derivative of
    flax's LayerNorm saves four maps.
    """
    return _layer_norm_forward(x, scale, bias, epsilon)[0]


def _layer_norm_forward(x, scale, bias, epsilon):
    wide = x.astype(jnp.float32)
    mean = wide.mean(-1, keepdims=True)
    variance = jnp.maximum(0.0, (wide * wide).mean(-1, keepdims=True) - mean * mean)
    inverse = jax.lax.rsqrt(variance + epsilon)
    out = (wide - mean) * (inverse * scale) + bias
    return out.astype(x.dtype), (x, scale, mean, inverse)


def _layer_norm_backward(epsilon, residuals, cotangent):
    del epsilon
    x, scale, mean, inverse = residuals
    cotangent = cotangent.astype(jnp.float32)
    normed = (x.astype(jnp.float32) - mean) * inverse
    tokens = tuple(range(x.ndim - 1))
    scaled = cotangent * scale
    along = (scaled * normed).mean(-1, keepdims=True)
    by_x = inverse * (scaled - scaled.mean(-1, keepdims=True) - normed * along)
    return by_x.astype(x.dtype), (cotangent * normed).sum(tokens), cotangent.sum(tokens)


layer_norm.defvjp(_layer_norm_forward, _layer_norm_backward)


class LayerNorm(nn.Module):
    """A module that applies `layer_norm` and holds its parameters."""

    epsilon: float

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Normalise `[..., channels]`, keeping shape and dtype."""
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],))
        bias = self.param("bias", nn.initializers.zeros, (x.shape[-1],))
        return layer_norm(x, scale, bias, self.epsilon)


class OverlapPatchEmbed(nn.Module):
    """A strided convolution with overlapping windows, followed by LayerNorm (epsilon 1e-5)."""

    features: int
    kernel_size: int
    stride: int
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Map `[batch, height, width, inputs]` to `[batch, ceil(height/stride), …, features]`."""
        x = nn.Conv(
            self.features,
            (self.kernel_size, self.kernel_size),
            strides=self.stride,
            padding=self.kernel_size // 2,
            kernel_init=conv_init,
            dtype=self.dtype,
            conv_general_dilated=convolve,
            name="conv",
        )(x)
        return LayerNorm(epsilon=1e-5, name="norm")(x)


class VicinityAttention(nn.Module):
    """Vicinity attention on reduced features (FRA), with its output gated by its input (FPC).

    Feature Reduction Attention projects the input to channels / feature_reduction before attending.
    With the Feature Preserving Connection, the output o becomes
    o + o · sigmoid(W₂ · ReLU(W₁ · mean over tokens of the input)).
    """

    num_heads: int
    feature_reduction: int
    gate_reduction: int
    locality: str
    clamp: bool
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Map `[batch, height, width, channels]` to the same shape."""
        channels = x.shape[-1]
        reduced = channels // self.feature_reduction
        keep = attention.clamp_magnitude if self.clamp else lambda t: t

        def dense(features, name, use_bias=True):
            return nn.Dense(
                features,
                use_bias=use_bias,
                kernel_init=linear_init,
                dtype=self.dtype,
                name=name,
            )

        def heads(t):
            return t.reshape(*t.shape[:-1], self.num_heads, reduced // self.num_heads)

        query, key, value = (heads(dense(reduced, name)(x)) for name in ("query", "key", "value"))
        out = attention.vicinity_attention(
            query, key, value, locality=self.locality, clamp=self.clamp
        )
        out = keep(dense(channels, "out")(out.reshape(*x.shape[:-1], reduced)))

        pooled = x.mean((1, 2), dtype=jnp.float32).astype(x.dtype)
        gate = dense(channels // self.gate_reduction, "gate_reduce", use_bias=False)(pooled)
        gate = dense(channels, "gate_expand", use_bias=False)(nn.relu(gate))
        return keep(out + out * nn.sigmoid(gate)[:, None, None, :])


class SoftmaxAttention(nn.Module):
    """Full-width softmax attention without query, key and value biases, the published ablation."""

    num_heads: int
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Map `[batch, height, width, channels]` to the same shape."""
        channels = x.shape[-1]
        heads = (self.num_heads, channels // self.num_heads)
        query, key, value = (
            nn.Dense(
                channels, use_bias=False, kernel_init=linear_init, dtype=self.dtype, name=name
            )(x).reshape(*x.shape[:-1], *heads)
            for name in ("query", "key", "value")
        )
        out = attention.softmax_attention(query, key, value).reshape(x.shape)
        return nn.Dense(channels, kernel_init=linear_init, dtype=self.dtype, name="out")(out)


class DepthwiseConv(nn.Module):
    """A 3×3 depthwise convolution with bias."""

    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, split: bool = True) -> jax.Array:
        """Convolve `[batch, height, width, channels]`, keeping its shape.

        For `split`, see `depthwise_conv`.
        """
        kernel = self.param("kernel", conv_init, (3, 3, 1, x.shape[-1]))
        bias = self.param("bias", nn.initializers.zeros, (x.shape[-1],))
        return depthwise_conv(x, kernel.astype(self.dtype), split=split) + bias.astype(self.dtype)


class GeluDense(nn.Module):
    """The exact GELU followed by a linear layer."""

    features: int
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Map `[batch, height, width, inputs]` to `[batch, height, width, features]`."""
        kernel = self.param("kernel", linear_init, (x.shape[-1], self.features))
        bias = self.param("bias", nn.initializers.zeros, (self.features,))
        kernel, bias = kernel.astype(self.dtype), bias.astype(self.dtype)
        if forms.current().gelu == "recomputed":
            return gelu_matmul(x, kernel) + bias
        return gelu(x) @ kernel + bias


class ConvFeedForward(nn.Module):
    """A feed-forward network: linear layer, 3×3 depthwise convolution, GELU, linear layer.

    Attributes:
        hidden: number of channels between the two linear layers.
        bands: largest number of bands of rows in which the hidden map is computed. The bands are
            computed one after the other, each from its own rows and one more on either side, and
            recomputed in the backward pass, so the whole hidden map is never in memory.
    """

    hidden: int
    bands: int = 1
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Map `[batch, height, width, channels]` to the same shape."""
        kind = _FeedForwardRows
        if self.bands > 1:
            kind = nn.scan(
                nn.remat(kind, prevent_cse=False),  # XLA can't merge the two passes of a scan
                variable_broadcast="params",
                variable_axes={"intermediates": 0},
                split_rngs={"params": False},
            )
        rows = kind(self.hidden, x.shape[-1], dtype=self.dtype)
        nn.share_scope(self, rows)  # so the number of bands does not affect parameter names
        if self.bands == 1:
            return rows(None, x)[1]
        devices = forms.spatial_devices()
        groups = devices if row_groups(x.shape[1], devices) > 1 else 1
        windows, inside = _cut_windows(x, groups, self.bands)
        _, out = rows(None, windows, jnp.asarray(inside))
        return _join_bands(out, x.shape[0], groups, x.shape[1])


class _FeedForwardRows(nn.Module):
    """`ConvFeedForward` on a whole map or on a window of its rows."""

    hidden: int
    features: int
    dtype: Dtype

    @nn.compact
    def __call__(
        self, _: None, x: jax.Array, inside: jax.Array | None = None
    ) -> tuple[None, jax.Array]:
        """Map `[batch, rows, width, channels]` to (None for `nn.scan`, the same shape).

        For a window, `inside` `[batch, rows, 1, 1]` marks the rows that belong to the map; the
        others are the convolution's zero padding. The first and last row of a window are not part
        of the result.
        """
        x = nn.Dense(self.hidden, kernel_init=linear_init, dtype=self.dtype, name="fc1")(x)
        if inside is not None:
            x = jnp.where(inside, x, 0)
        x = DepthwiseConv(dtype=self.dtype, name="depthwise")(x, split=inside is None)
        if inside is not None:
            x = x[:, 1:-1]
        return None, GeluDense(self.features, dtype=self.dtype, name="fc2")(x)


def _cut_windows(x: jax.Array, groups: int, bands: int) -> tuple[jax.Array, np.ndarray]:
    """Cut a map into bands of rows, each with one more row on either side.

    The rows are first divided into `groups`, one for each device that holds some of them, so that
    each device cuts its own rows and fetches two rows from its neighbours only once.

    Returns:
        The windows, `[bands, batch · groups, rows + 2, width, channels]`, and a mask of the rows
        that belong to the map, `[bands, batch · groups, rows + 2, 1, 1]`. The height need not be
        divisible: `_join_bands` cuts off the surplus rows at the end of a group. There may be fewer
        bands than requested.
    """
    batch, height, width, channels = x.shape
    own = math.ceil(height / groups)
    rows = math.ceil(own / bands)
    bands = math.ceil(own / rows)
    x = jnp.pad(x, ((0, 0), (0, groups * own - height), (0, 0), (0, 0)))
    x = x.reshape(batch, groups, own, width, channels)
    # XLA shards a roll as one exchange. Rows that wrap around from the other end are not `inside`.
    above, below = jnp.roll(x[:, :, -1:], 1, axis=1), jnp.roll(x[:, :, :1], -1, axis=1)
    x = jnp.concatenate([above, x, below], 2)
    x = jnp.pad(x, ((0, 0), (0, 0), (0, bands * rows - own), (0, 0), (0, 0)))
    first, last = x[:, :, : bands * rows : rows], x[:, :, rows + 1 :: rows]
    middle = x[:, :, 1:-1].reshape(batch, groups, bands, rows, width, channels)
    windows = jnp.concatenate([first[:, :, :, None], middle, last[:, :, :, None]], 3)
    windows = jnp.moveaxis(windows, 2, 0)

    row = (
        np.arange(bands)[:, None, None, None] * rows
        + np.arange(groups)[:, None] * own
        + np.arange(-1, rows + 1)
    )
    inside = np.broadcast_to((row >= 0) & (row < height), windows.shape[:4])
    shape = (bands, batch * groups, rows + 2)
    return windows.reshape(*shape, width, channels), inside.reshape(*shape, 1, 1)


def _join_bands(x: jax.Array, batch: int, groups: int, height: int) -> jax.Array:
    """Join `[bands, batch · groups, rows, width, channels]` to `[batch, height, width, channels]`.

    This also removes the surplus rows that `_cut_windows` added.
    """
    bands, _, rows, width, channels = x.shape
    own = math.ceil(height / groups)
    x = jnp.moveaxis(x.reshape(bands, batch, groups, rows, width, channels), 0, 2)
    x = x.reshape(batch, groups, bands * rows, width, channels)[:, :, :own]
    return x.reshape(batch, groups * own, width, channels)[:, :height]
