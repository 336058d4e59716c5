"""The Vicinity Vision Transformer: four stages, each a patch embedding, blocks and LayerNorm.

Source: Sun et al., "Vicinity Vision Transformer", arXiv 2206.10552.
"""

import dataclasses
import difflib
import math
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax.typing import Dtype

from vvt_jax import attention
from vvt_jax.models.layers import (
    ConvFeedForward,
    LayerNorm,
    OverlapPatchEmbed,
    SoftmaxAttention,
    VicinityAttention,
    drop_path,
    linear_init,
)

SMALLEST_SIDE = 32  # pixels
_DTYPES = ("float32", "bfloat16")
_MOST_BANDS = 2**12  # rows of the first map of an image 16,384 pixels high
_ATTENTIONS = ("vicinity", "softmax")


class Block(nn.Module):
    """A Transformer block: x + attention(LN(x)), then x + FFN(LN(x)).

    In training, drop path is applied to each branch.
    """

    num_heads: int
    mlp_ratio: int
    feature_reduction: int
    gate_reduction: int
    locality: str
    attention: str
    clamp: bool
    dtype: Dtype
    ffn_bands: int = 1

    @nn.compact
    def __call__(self, x: jax.Array, drop_rate: jax.Array | None) -> tuple[jax.Array, None]:
        """Map `[batch, height, width, channels]` to (the same shape, None for `nn.scan`)."""
        attend = (
            SoftmaxAttention(self.num_heads, dtype=self.dtype, name="attention")
            if self.attention == "softmax"
            else VicinityAttention(
                num_heads=self.num_heads,
                feature_reduction=self.feature_reduction,
                gate_reduction=self.gate_reduction,
                locality=self.locality,
                clamp=self.clamp,
                dtype=self.dtype,
                name="attention",
            )
        )
        feed_forward = ConvFeedForward(
            x.shape[-1] * self.mlp_ratio, self.ffn_bands, dtype=self.dtype, name="feed_forward"
        )
        normed = LayerNorm(epsilon=1e-6, name="norm1")(x)
        x = x + drop_path(self, attend(normed), drop_rate)
        normed = LayerNorm(epsilon=1e-6, name="norm2")(x)
        return x + drop_path(self, feed_forward(normed), drop_rate), None


class Stage(nn.Module):
    """A stage of the pyramid: patch embedding, `depth` blocks and LayerNorm.

    The parameters of the blocks are stacked along a leading axis of length `depth`.
    `unstack_blocks` separates them for a program that runs often. The stage accepts both layouts.
    """

    features: int
    depth: int
    kernel_size: int
    stride: int
    block_fields: Mapping[str, Any]
    remat: bool
    unroll: bool
    dtype: Dtype

    @nn.compact
    def __call__(self, x: jax.Array, drop_rates: jax.Array | None) -> jax.Array:
        """Map `[batch, height, width, inputs]` to `[batch, h, w, features]`.

        `drop_rates` is `[depth]`, or None.
        """
        x = OverlapPatchEmbed(
            self.features, self.kernel_size, self.stride, dtype=self.dtype, name="patch_embed"
        )(x)
        block = nn.remat(Block, prevent_cse=self.unroll) if self.remat else Block
        if self.has_variable("params", "block0"):
            for i in range(self.depth):
                rate = None if drop_rates is None else drop_rates[i]
                x, _ = block(**self.block_fields, dtype=self.dtype, name=f"block{i}")(x, rate)
        else:
            blocks = nn.scan(
                block,
                variable_axes={"params": 0, "intermediates": 0},
                split_rngs={"params": True, "dropout": True},
                in_axes=nn.broadcast if drop_rates is None else 0,
                length=self.depth,
                unroll=self.depth if self.unroll else 1,
            )
            x, _ = blocks(**self.block_fields, dtype=self.dtype, name="blocks")(x, drop_rates)
        return LayerNorm(epsilon=1e-6, name="norm")(x)


def unstack_blocks(variables: Mapping[str, Any]) -> dict[str, Any]:
    """Return the variables with the stacked parameters of each stage split block by block.

    `model.apply` accepts them like stacked ones, and always runs them unrolled. With stacked
    parameters, a compiled program copies each block's parameters out of the stack at every call;
    this function does so once.
    """
    params = {name: dict(part) for name, part in variables["params"].items()}
    for stage in params.values():
        if "blocks" in stage:
            stacked = stage.pop("blocks")
            for i in range(jax.tree.leaves(stacked)[0].shape[0]):
                stage[f"block{i}"] = jax.tree.map(lambda leaf, i=i: leaf[i], stacked)
    return {**variables, "params": params}


class VVT(nn.Module):
    """The Vicinity Vision Transformer: a pyramid of four feature maps and a linear classifier.

    Attributes:
        embed_dims: channels of each of the four stages.
        depths: number of blocks in each stage.
        num_heads: number of attention heads in each stage.
        mlp_ratios: hidden width of each stage's feed-forward networks, as a multiple of the stage's
            channels.
        feature_reduction: attention in each stage works on channels / feature_reduction (FRA).
        gate_reduction: the hidden width of the gate (FPC) is channels / gate_reduction.
        locality: `"sum"`, as published, `"product"`, `"1d"` or `"none"`; see `vvt_jax.attention`.
        attention: `"vicinity"`, or `"softmax"`, the published ablation: full width, without query,
            key and value biases, FRA and FPC.
        clamp: whether to apply the published clamps around attention, which the published weights
            need.
        patch_strides: strides of the four patch embeddings.
        drop_path_rate: drop path rate of the last block in training. The rate rises linearly from 0
            at the first block.
        num_classes: number of classes. With 0, the model returns pooled features instead of logits.
        dtype: dtype of the computation, `"float32"` or `"bfloat16"`. Parameters and logits are
            always float32.
        remat: whether to keep only each block's input for the backward pass and recompute the rest.
            On a CPU this needs `unroll=False`, because XLA merges the original computation and the
            recomputation if the blocks are unrolled.
        ffn_bands: number of bands of rows in which the feed-forward networks of the first stage
            compute their hidden map, the widest map of the model. Later stages use just enough
            bands to keep each no larger than in the first stage. Bands save memory with large
            images, and on a CPU also time; results agree up to rounding. 1 computes the map whole.
        unroll: whether to unroll the blocks of a stage, which runs faster, instead of scanning over
            them, which compiles faster.
    """

    embed_dims: tuple[int, int, int, int] = (96, 160, 320, 512)
    depths: tuple[int, int, int, int] = (2, 2, 2, 2)
    num_heads: tuple[int, int, int, int] = (1, 2, 5, 8)
    mlp_ratios: tuple[int, int, int, int] = (8, 8, 4, 4)
    feature_reduction: tuple[int, int, int, int] = (2, 2, 2, 2)
    gate_reduction: int = 1
    locality: str = "sum"
    attention: str = "vicinity"
    clamp: bool = True
    patch_strides: tuple[int, int, int, int] = (4, 2, 2, 2)
    drop_path_rate: float = 0.0
    num_classes: int = 1000
    dtype: str = "float32"
    remat: bool = False
    ffn_bands: int = 1
    unroll: bool = True

    def __post_init__(self):
        _check_fields(self)
        super().__post_init__()

    def setup(self):
        self._make_stages()
        if self.num_classes:
            self.head = nn.Dense(self.num_classes, kernel_init=linear_init, name="head")

    def _make_stages(self) -> None:
        dtype = jnp.dtype(self.dtype)
        strides = np.cumprod(self.patch_strides)
        hidden = [self.embed_dims[i] * self.mlp_ratios[i] / strides[i] ** 2 for i in range(4)]
        for i in range(4):
            stage = Stage(
                features=self.embed_dims[i],
                depth=self.depths[i],
                kernel_size=7 if i == 0 else 3,
                stride=self.patch_strides[i],
                block_fields={
                    "num_heads": self.num_heads[i],
                    "mlp_ratio": self.mlp_ratios[i],
                    "feature_reduction": self.feature_reduction[i],
                    "gate_reduction": self.gate_reduction,
                    "locality": self.locality,
                    "attention": self.attention,
                    "clamp": self.clamp,
                    "ffn_bands": math.ceil(self.ffn_bands * hidden[i] / hidden[0]),
                },
                remat=self.remat,
                unroll=self.unroll,
                dtype=dtype,
            )
            setattr(self, f"stage{i + 1}", stage)

    def features(
        self, images: jax.Array, train: bool = False
    ) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
        """Return the feature maps of the four stages, each after its stage's LayerNorm.

        Args:
            images: normalised images, `[batch, height, width, 3]`, at least 32 pixels a side.
            train: whether to apply drop path, which needs `rngs={"dropout": key}` unless its rate
                is zero.

        Returns:
            Four maps `[batch, h, w, channels]` in `dtype`. With the default `patch_strides`, their
            strides are 4, 8, 16 and 32. h and w are rounded up at each stage.

        Raises:
            ValueError: if `images` has another shape or is too small.
        """
        check_image_shape(images.shape)
        rates: list[jax.Array | None] = [None] * 4
        if train and self.drop_path_rate > 0:
            rising = np.linspace(0, self.drop_path_rate, sum(self.depths), dtype=np.float32)
            rates = [jnp.asarray(r) for r in np.split(rising, np.cumsum(self.depths)[:-1])]
        maps = []
        x = images.astype(self.dtype)
        for i, stage_rates in enumerate(rates, 1):
            x = getattr(self, f"stage{i}")(x, stage_rates)
            maps.append(x)
        return tuple(maps)

    def __call__(self, images: jax.Array, train: bool = False) -> jax.Array:
        """Return logits `[batch, num_classes]`.

        If `num_classes` is 0, return the pooled features `[batch, channels]` instead. The arguments
        and errors are those of `features`. The result is float32, whatever the model's `dtype`.
        """
        pooled = self.features(images, train)[-1].mean((1, 2), dtype=jnp.float32)
        return self.head(pooled) if self.num_classes else pooled


def check_image_shape(shape: Sequence[Any]) -> None:
    """Raise ValueError unless models accept images of this shape: `[batch, height, width, 3]`."""
    # Check each side on its own: an export's symbolic sides can't be compared with one another.
    small = any(side < SMALLEST_SIDE for side in shape[1:3])
    if len(shape) != 4 or shape[-1] != 3 or small:
        raise ValueError(
            "images must be [batch, height, width, 3] with at least "
            f"{SMALLEST_SIDE} pixels a side, but are {tuple(shape)}."
        )


Model = TypeVar("Model", bound=VVT)  # the classifier, or a model built on its stages

VARIANTS = {
    # For small images, which may need other patch_strides; 233,682 parameters with 10 classes
    "vvt_nano": {
        "embed_dims": (32, 48, 64, 64),
        "depths": (1, 1, 1, 1),
        "num_heads": (1, 1, 2, 2),
        "mlp_ratios": (4, 4, 4, 4),
    },
    "vvt_tiny": {"depths": (2, 2, 2, 2), "mlp_ratios": (8, 8, 4, 4)},
    "vvt_small": {"depths": (3, 3, 9, 3), "mlp_ratios": (8, 8, 4, 4)},
    "vvt_medium": {"depths": (3, 3, 27, 3), "mlp_ratios": (8, 8, 4, 4)},
    "vvt_large": {"depths": (4, 4, 36, 4), "mlp_ratios": (4, 4, 4, 4)},
}


def list_models() -> list[str]:
    """Return the names that `create_model` accepts, from the smallest model to the largest."""
    return list(VARIANTS)


def create_model(name: str, **fields) -> VVT:
    """Create a model by name, overriding any fields of `VVT`.

    Raises:
        ValueError: if the name or a field is unknown, or the value of a field is invalid.
    """
    if name not in VARIANTS:
        raise ValueError(f"Unknown model '{name}'{nearest(name, VARIANTS)}")
    return from_fields(VVT, {**VARIANTS[name], **fields})


def from_fields(kind: type[Model], fields: Mapping[str, Any]) -> Model:
    """Create a model of class `kind` from a mapping of field names to values.

    Tuples may be given as lists, as they are after a round trip through JSON.

    Raises:
        ValueError: if a field is unknown or its value is invalid.
    """
    known = model_fields(kind())
    for field in fields:
        if field not in known:
            raise ValueError(f"A model has no field '{field}'{nearest(field, known)}")
    values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()}
    return kind(**values)


def model_fields(model: nn.Module) -> dict:
    """Return the fields of a model by name, except linen's own `parent` and `name`."""
    names = (f.name for f in dataclasses.fields(model))
    return {name: getattr(model, name) for name in names if name not in ("parent", "name")}


def nearest(name: str, known) -> str:
    """Return the end of an error message about an unknown name.

    It suggests the closest known name, or lists all of them if none is close.
    """
    near = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean '{near[0]}'?" if near else f": it is one of {', '.join(known)}."


def _is_positive(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _check_fields(model: VVT) -> None:
    def refuse(field: str, why: str):
        raise ValueError(f"{field}={getattr(model, field)!r} does not fit: {why}.")

    for field in (
        "embed_dims",
        "depths",
        "num_heads",
        "mlp_ratios",
        "feature_reduction",
        "patch_strides",
    ):
        values = getattr(model, field)
        four = isinstance(values, list | tuple) and len(values) == 4
        if not four or not all(map(_is_positive, values)):
            refuse(field, "it takes four positive whole numbers, one a stage")
    if not _is_positive(model.gate_reduction):
        refuse("gate_reduction", "it takes a positive whole number")
    if not _is_positive(model.ffn_bands) or model.ffn_bands > _MOST_BANDS:
        refuse("ffn_bands", f"it takes a whole number from 1, for whole maps, to {_MOST_BANDS}")
    for field in ("clamp", "remat", "unroll"):
        if not isinstance(getattr(model, field), bool):
            refuse(field, "it is True or False")
    attention.check_locality(model.locality)
    if not isinstance(model.attention, str) or model.attention not in _ATTENTIONS:
        refuse("attention", f"it is one of {', '.join(_ATTENTIONS)}")
    if not isinstance(model.dtype, str) or model.dtype not in _DTYPES:
        refuse("dtype", f"it is one of {', '.join(_DTYPES)}")
    if not isinstance(model.drop_path_rate, int | float) or not 0 <= model.drop_path_rate < 1:
        refuse("drop_path_rate", "it is a probability from 0 up to, not including, 1")
    if isinstance(model.num_classes, bool) or (
        model.num_classes != 0 and not _is_positive(model.num_classes)
    ):
        refuse("num_classes", "it takes a whole number, 0 for none")
    for stage, (width, heads, reduction) in enumerate(
        zip(model.embed_dims, model.num_heads, model.feature_reduction, strict=True), 1
    ):
        parts = heads if model.attention == "softmax" else heads * reduction
        if width % parts:
            what = f"{parts}, heads" + ("" if parts == heads else " times feature reduction")
            refuse("embed_dims", f"stage {stage}'s {width} channels do not divide by {what}")
        if width % model.gate_reduction:
            refuse("gate_reduction", f"it does not divide stage {stage}'s {width} channels")
