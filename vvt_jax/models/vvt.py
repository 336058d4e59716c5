"""The Vicinity Vision Transformer: four stages of patch embedding, blocks and LayerNorm.

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
_MOST_BANDS = 2**12  # a map of 16,384 pixels' height has as many rows
_ATTENTIONS = ("vicinity", "softmax")


class Block(nn.Module):
    """x + attention(LN(x)), then x + FFN(LN(x)), each branch dropped by drop path in training."""

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
        """`[batch, height, width, channels]` -> (the same shape, None); None is for `nn.scan`."""
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
    """Patch embedding, `depth` blocks, LayerNorm.

    The parameters of the blocks are stacked: each has a leading axis of `depth`. `unstack_blocks`
    takes them apart for a program that runs often; the stage takes either.
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
        """`[batch, height, width, inputs]`, `[depth]` or None -> `[batch, h, w, features]`."""
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
    """Variables with the stacked parameters of each stage's blocks taken apart, one by one.

    `model.apply` takes them as it takes the stacked ones, and always runs them unrolled. Inside a
    program, XLA copies each block's part out of the stack at every call; this does it once.
    """
    params = {name: dict(part) for name, part in variables["params"].items()}
    for stage in params.values():
        if "blocks" in stage:
            stacked = stage.pop("blocks")
            for i in range(jax.tree.leaves(stacked)[0].shape[0]):
                stage[f"block{i}"] = jax.tree.map(lambda leaf, i=i: leaf[i], stacked)
    return {**variables, "params": params}


class VVT(nn.Module):
    """Vicinity Vision Transformer: a pyramid of four maps, and a linear classifier.

    Attributes:
        embed_dims: channels of the four stages.
        depths: blocks of the four stages.
        num_heads: attention heads of the four stages.
        mlp_ratios: hidden width of the feed-forward networks, in channels of their stage.
        feature_reduction: attention works on channels / feature_reduction (FRA).
        gate_reduction: hidden width of the gate (FPC) is channels / gate_reduction.
        locality: `"sum"` as published, `"product"`, `"1d"` or `"none"`; see `vvt_jax.attention`.
        attention: `"vicinity"`, or `"softmax"`, the published ablation: full width, no query, key
            and value biases, neither FRA nor FPC.
        clamp: the published clamps around attention; published weights need them.
        patch_strides: strides of the four patch embeddings.
        drop_path_rate: of the last block in training; it rises linearly from 0 at the first.
        num_classes: 0 gives pooled features instead of logits.
        dtype: of the computation, `"float32"` or `"bfloat16"`; parameters and logits are float32.
        remat: keep only each block's input for the backward pass, and compute the rest again. On a
            CPU it needs `unroll=False`: of unrolled blocks, XLA merges the two computations.
        ffn_bands: the feed-forward networks of the first stage make their hidden map, the widest of
            the model, in so many bands of rows, and later stages in as many as keep a band's part
            as small: less memory for large images, equal to rounding, and on a CPU faster there.
            1: whole.
        unroll: lay a stage's blocks out one after the other (runs faster) instead of scanning over
            them (compiles faster).
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
        """The four maps, each after its stage's LayerNorm.

        Args:
            images: normalised, `[batch, height, width, 3]`, from 32 pixels a side up.
            train: apply drop path; needs `rngs={"dropout": key}` where its rate is not zero.

        Returns:
            Four maps `[batch, h, w, channels]` in `dtype`, at strides 4, 8, 16, 32 with the default
            `patch_strides`; h and w are rounded up at each stage.

        Raises:
            ValueError: images of another rank, or too small.
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
        """Logits `[batch, num_classes]`, or pooled features `[batch, channels]` where it is 0.

        Args and errors as for `features`; the result is float32 in any dtype.
        """
        pooled = self.features(images, train)[-1].mean((1, 2), dtype=jnp.float32)
        return self.head(pooled) if self.num_classes else pooled


def check_image_shape(shape: Sequence[Any]) -> None:
    """Raises ValueError unless a model takes images of that shape: `[batch, height, width, 3]`."""
    # each side on its own: an export's symbolic sides can't be compared with one another
    small = any(side < SMALLEST_SIDE for side in shape[1:3])
    if len(shape) != 4 or shape[-1] != 3 or small:
        raise ValueError(
            "images must be [batch, height, width, 3] with at least "
            f"{SMALLEST_SIDE} pixels a side, but are {tuple(shape)}."
        )


Model = TypeVar("Model", bound=VVT)  # the classifier, or what is built upon its stages

VARIANTS = {
    # 233,682 parameters with 10 classes; for small images, where patch_strides may differ
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
    """Names that `create_model` takes, from the smallest up."""
    return list(VARIANTS)


def create_model(name: str, **fields) -> VVT:
    """A model by its name, with any field of `VVT` overridden.

    Raises:
        ValueError: an unknown name or field, or a field's value that does not fit.
    """
    if name not in VARIANTS:
        raise ValueError(f"Unknown model '{name}'{nearest(name, VARIANTS)}")
    return from_fields(VVT, {**VARIANTS[name], **fields})


def from_fields(kind: type[Model], fields: Mapping[str, Any]) -> Model:
    """A model of that class from its fields by name, with lists for tuples as JSON has them.

    Raises:
        ValueError: an unknown field, or a value that does not fit.
    """
    known = model_fields(kind())
    for field in fields:
        if field not in known:
            raise ValueError(f"A model has no field '{field}'{nearest(field, known)}")
    values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()}
    return kind(**values)


def model_fields(model: nn.Module) -> dict:
    """The fields that a model was made with, by name; linen's own `parent` and `name` left out."""
    names = (f.name for f in dataclasses.fields(model))
    return {name: getattr(model, name) for name in names if name not in ("parent", "name")}


def nearest(name: str, known) -> str:
    """The end of a sentence about an unknown name: the one that may be meant, or all there are."""
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
