"""Semantic segmentation on the four feature maps of a Vicinity Vision Transformer.

There are two heads, configured as is usual in papers that compare backbones: Semantic FPN (Kirillov
et al., arXiv 1901.02446) and UPerNet (Xiao et al., arXiv 1807.10221) with an auxiliary FCN head.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax.typing import Dtype

from vvt_jax.models.convolution import convolve
from vvt_jax.models.layers import conv_init
from vvt_jax.models.vvt import VARIANTS, VVT, create_model, from_fields, nearest

_MOST_CLASSES = 255
HEADS = {"fpn": 256, "upernet": 512}  # with the number of channels of their pyramids
_BINS = (1, 2, 3, 6)  # bins per side in pyramid pooling
_AUXILIARY_MAP = 2  # stage 3, the deepest map whose stride is still fine
_classifier_init = nn.initializers.normal(0.01)


def resize_bilinear(x: jax.Array, size: Sequence[int]) -> jax.Array:
    """Resize `[batch, h, w, channels]` to `[batch, *size, channels]`, aligning pixel centres.

    Resizing by whole factors, as pyramids do, is computed as a weighted sum of neighbours. The
    general form multiplies by a dense matrix, at a cost that grows with the cube of the side.
    """
    height, width = x.shape[1:3]
    if (height, width) == tuple(size):
        return x
    if size[0] % height or size[1] % width:
        return jax.image.resize(x, (x.shape[0], *size, x.shape[3]), "bilinear", antialias=False)
    return _multiply(_multiply(x, 1, size[0] // height), 2, size[1] // width)


def _multiply(x: jax.Array, axis: int, factor: int) -> jax.Array:
    """Interpolate linearly along an axis, to `factor` times its length."""
    if factor == 1:
        return x
    length = x.shape[axis]
    padding = [(0, 0)] * x.ndim
    padding[axis] = (1, 1)
    padded = jnp.pad(x, padding, mode="edge")
    before, here, after = (
        jax.lax.slice_in_dim(padded, start, start + length, axis=axis) for start in range(3)
    )
    phases = []
    for phase in range(factor):
        offset = (phase + 0.5) / factor - 0.5  # from the pixel's centre, in pixel widths
        other = before if offset < 0 else after
        phases.append((1 - abs(offset)) * here + abs(offset) * other)
    shape = list(x.shape)
    shape[axis] *= factor
    return jnp.stack(phases, axis + 1).reshape(shape)


def adaptive_average(x: jax.Array, bins: int) -> jax.Array:
    """Average `[batch, h, w, channels]` over windows, to `[batch, bins, bins, channels]`.

    Along the height, window i extends from floor(i·h/bins) to ceil((i+1)·h/bins), and likewise
    along the width. Windows overlap if `bins` does not divide the side, and repeat if there are
    more bins than pixels.
    """
    rows, columns = (_windows(side, bins) for side in x.shape[1:3])
    pooled = jnp.einsum("ph,bhwc,qw->bpqc", rows, x.astype(jnp.float32), columns)
    return pooled.astype(x.dtype)


def _windows(side: int, bins: int) -> np.ndarray:
    """Return the weight of each pixel in each window's mean, `[bins, side]`."""
    weights = np.zeros((bins, side), np.float32)
    for i in range(bins):
        start, end = i * side // bins, -(-(i + 1) * side // bins)
        weights[i, start:end] = 1 / (end - start)
    return weights


class ConvNormRelu(nn.Module):
    """A convolution without bias, followed by batch norm and ReLU.

    The batch is a single array, so the statistics cover the whole batch on all devices.
    """

    features: int
    kernel_size: int
    dtype: Dtype

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Map `[batch, height, width, inputs]` to `[batch, height, width, features]`."""
        x = nn.Conv(
            self.features,
            (self.kernel_size, self.kernel_size),
            padding=self.kernel_size // 2,
            use_bias=False,
            kernel_init=conv_init,
            dtype=self.dtype,
            conv_general_dilated=convolve,
            name="conv",
        )(x)
        norm = nn.BatchNorm(
            use_running_average=not train,
            momentum=0.9,
            epsilon=1e-5,
            dtype=self.dtype,
            name="norm",
        )
        return nn.relu(norm(x))


class Classifier(nn.Module):
    """Dropout of whole channels, then a linear classifier at each position.

    The classifier computes in float32, whatever the dtype of its input.
    """

    num_classes: int
    dropout: float

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Map `[batch, h, w, channels]` to logits `[batch, h, w, num_classes]`."""
        x = nn.Dropout(self.dropout, broadcast_dims=(1, 2), deterministic=not train)(x)
        return nn.Dense(self.num_classes, kernel_init=_classifier_init, name="linear")(
            x.astype(jnp.float32)
        )


class SemanticFPN(nn.Module):
    """A feature pyramid whose levels are upsampled to the finest one, summed and classified.

    Each level is upsampled by a series of 3×3 convolutions with half the pyramid's channels and
    resizing by a factor of two.
    """

    num_classes: int
    dropout: float
    channels: int
    dtype: Dtype

    @nn.compact
    def __call__(self, maps: Sequence[jax.Array], train: bool) -> jax.Array:
        """Map four maps, finest first, to logits `[batch, h, w, num_classes]` at the finest."""
        conv = functools.partial(
            nn.Conv,
            self.channels,
            kernel_init=nn.initializers.xavier_uniform(),
            dtype=self.dtype,
            conv_general_dilated=convolve,
        )
        levels = [conv((1, 1), name=f"lateral{i}")(x) for i, x in enumerate(maps, 1)]
        for i in (2, 1, 0):
            size = (levels[i].shape[0], *levels[i].shape[1:3], self.channels)
            levels[i] += jax.image.resize(levels[i + 1], size, "nearest")
        total = jnp.zeros((), self.dtype)
        for i, level in enumerate(levels):
            x = conv((3, 3), name=f"smooth{i + 1}")(level)
            for finer in range(max(1, i)):
                name = f"scale{i + 1}_{finer + 1}"
                x = ConvNormRelu(self.channels // 2, 3, dtype=self.dtype, name=name)(x, train)
                if i:
                    x = resize_bilinear(x, levels[i - finer - 1].shape[1:3])
            total = total + x
        return Classifier(self.num_classes, self.dropout, name="classifier")(total, train)


class UPerNet(nn.Module):
    """Pyramid pooling on the coarsest map, and a feature pyramid fused at the finest level."""

    num_classes: int
    dropout: float
    channels: int
    dtype: Dtype

    @nn.compact
    def __call__(self, maps: Sequence[jax.Array], train: bool) -> jax.Array:
        """Map four maps, finest first, to logits `[batch, h, w, num_classes]` at the finest."""

        def conv(x, kernel_size, name):
            return ConvNormRelu(self.channels, kernel_size, dtype=self.dtype, name=name)(x, train)

        coarsest = maps[-1]
        pooled = [
            resize_bilinear(
                conv(adaptive_average(coarsest, bins), 1, f"pool{bins}"), coarsest.shape[1:3]
            )
            for bins in _BINS
        ]
        levels = [conv(x, 1, f"lateral{i}") for i, x in enumerate(maps[:-1], 1)]
        levels.append(conv(jnp.concatenate([coarsest, *pooled], -1), 3, "pyramid"))
        for i in (2, 1, 0):
            levels[i] += resize_bilinear(levels[i + 1], levels[i].shape[1:3])
        finest = levels[0].shape[1:3]
        smooth = [conv(x, 3, f"smooth{i}") for i, x in enumerate(levels[:-1], 1)]
        fused = [resize_bilinear(x, finest) for x in (*smooth, levels[-1])]
        fused = conv(jnp.concatenate(fused, -1), 3, "fuse")
        return Classifier(self.num_classes, self.dropout, name="classifier")(fused, train)


class AuxiliaryHead(nn.Module):
    """A 3×3 convolution and a classifier on one map, which train the backbone more directly."""

    num_classes: int
    dropout: float
    channels: int
    dtype: Dtype

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Map `[batch, h, w, inputs]` to logits `[batch, h, w, num_classes]`."""
        x = ConvNormRelu(self.channels, 3, dtype=self.dtype, name="conv")(x, train)
        return Classifier(self.num_classes, self.dropout, name="classifier")(x, train)


class Segmenter(VVT):
    """A Vicinity Vision Transformer that classifies every pixel.

    Its backbone has the same parameter names and fields as the classifier's, so weights can be
    transferred between the two.

    Attributes:
        head: `"fpn"` for Semantic FPN, or `"upernet"` for UPerNet with an auxiliary head on the map
            of stage 3.
        head_channels: number of channels of the head's pyramid. Semantic FPN's convolutions after
            the pyramid and the auxiliary head have half as many. None means 256 for `"fpn"` and 512
            for `"upernet"`, as published.
        dropout: fraction of the channels dropped before each classifier in training.
        num_classes: number of classes, from 1 to 255.
    """

    head: str = "fpn"  # type: ignore[assignment]  # the classifier has a layer named head
    head_channels: int | None = None
    dropout: float = 0.1
    num_classes: int = 150

    def __post_init__(self):
        if self.head not in HEADS:
            raise ValueError(f"head={self.head!r} does not fit: it is one of {', '.join(HEADS)}.")
        if isinstance(self.num_classes, int) and self.num_classes > _MOST_CLASSES:
            raise ValueError(
                f"num_classes={self.num_classes} does not fit: masks have 8 bits, of which 255 is "
                f"ignored, so that a segmenter has at most {_MOST_CLASSES} classes."
            )
        channels = self.head_channels
        if channels is not None and (not isinstance(channels, int) or channels < 2):
            raise ValueError(f"head_channels={channels!r} does not fit: it is a number from 2 up.")
        if not isinstance(self.dropout, int | float) or not 0 <= self.dropout < 1:
            raise ValueError(
                f"dropout={self.dropout!r} does not fit: it is a probability from 0 up to, "
                "not including, 1."
            )
        if self.num_classes == 0:
            raise ValueError("num_classes=0 does not fit: a segmenter has at least one class.")
        super().__post_init__()

    def setup(self):
        self._make_stages()
        dtype = jnp.dtype(self.dtype)
        channels = self.head_channels or HEADS[self.head]
        head = {"fpn": SemanticFPN, "upernet": UPerNet}[self.head]
        self.decoder = head(self.num_classes, self.dropout, channels, dtype)
        if self.head == "upernet":
            self.auxiliary = AuxiliaryHead(self.num_classes, self.dropout, channels // 2, dtype)

    def __call__(  # type: ignore[override]  # returns two arrays in training
        self, images: jax.Array, train: bool = False
    ) -> jax.Array | tuple[jax.Array, jax.Array | None]:
        """Return the logits of every pixel, `[batch, height, width, num_classes]`, float32.

        Args:
            images: normalised images, as for `features`.
            train: whether to apply drop path and dropout, and to normalise with the statistics of
                the batch. This needs `rngs={"dropout": key}` and `mutable=["batch_stats"]`.

        Returns:
            The logits. In training, a pair of the logits and those of the auxiliary head, or None
            if there is no such head.

        Raises:
            ValueError: if `images` has another shape or is too small, as in `features`.
        """
        maps = self.features(images, train)
        size = images.shape[1:3]
        logits = resize_bilinear(self.decoder(maps, train), size)
        auxiliary = None
        if self.head == "upernet" and (train or self.is_initializing()):
            auxiliary = resize_bilinear(self.auxiliary(maps[_AUXILIARY_MAP], train), size)
        return (logits, auxiliary) if train else logits


def create_segmenter(name: str, head: str = "fpn", **fields: Any) -> Segmenter:
    """Create a segmenter on the named backbone, overriding any fields of `Segmenter`.

    Raises:
        ValueError: if the name, the head or a field is unknown, or the value of a field is invalid.
    """
    if name not in VARIANTS:
        raise ValueError(f"Unknown model '{name}'{nearest(name, VARIANTS)}")
    return from_fields(Segmenter, {**VARIANTS[name], "head": head, **fields})


def create(name: str, **fields: Any) -> VVT:
    """Create a segmenter if `fields` contains `head`, or else a classifier.

    Raises:
        ValueError: for the reasons given in `create_segmenter` and `create_model`.
    """
    return create_segmenter(name, **fields) if "head" in fields else create_model(name, **fields)
