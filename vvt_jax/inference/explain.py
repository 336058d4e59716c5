"""Where a model looks: class maps (Grad-CAM), and what a patch attends to.

The functions return arrays; `overlay` and the functions whose names begin with `draw_` turn them
into pictures and need matplotlib (the extra `charts`).
"""

import dataclasses
import functools
import importlib.util
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
import PIL.Image

from vvt_jax import attention
from vvt_jax.inference.batches import ImageLike, several
from vvt_jax.inference.predictor import Function, Predictor, Size
from vvt_jax.models import VVT
from vvt_jax.system.errors import MissingPackageError, UserError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_MOST_PATCHES = 4096  # of a map, whose number of attention weights is the square of this
_LEAST_SIDE = 224  # pixels per side of an overlay; smaller images are enlarged by a whole factor
_LEAST_PLACES = 4  # per side of a class map: one with fewer says little
_OPACITY = 0.7  # of the colour at the maximum of a map


def class_maps(
    predictor: Predictor,
    images: ImageLike | Sequence[ImageLike],
    labels: int | Sequence[int] | None = None,
    *,
    stage: int | None = None,
    size: Size | None = None,
) -> np.ndarray:
    """Compute how strongly each position of a stage's feature map supports a class.

    Source: Selvaraju et al., "Grad-CAM", arXiv 1610.02391: the channels of the map are weighted by
    the spatial mean of the gradient of the class's logit and summed, and negative values are set
    to 0.

    Args:
        predictor: a predictor whose model has a classifier.
        images: one image, or several.
        labels: one class for all images, or one for each; by default each image's most probable
            class.
        stage: the stage, 1 to 4; by default `default_stage`.
        size: height and width of the model's input, in pixels; by default the card's.

    Returns:
        Maps `[images, h, w]`, float32, non-negative, in units of the logit.

    Raises:
        UserError: the model has no classifier, or does not have that stage or label.
    """
    predictor.check_classifier()
    function = class_map_of(default_stage(predictor, size) if stage is None else stage)
    if labels is None:
        return predictor.apply(function, images, size=size)[1]
    given = list(several(images))
    wanted = np.broadcast_to(np.asarray(labels, np.int32), len(given))
    classes = predictor.model.num_classes
    if wanted.min(initial=0) < 0 or wanted.max(initial=0) >= classes:
        raise UserError(f"There is no class {labels}: the model has 0 to {classes - 1}.")
    return predictor.apply(function, given, wanted, size=size)[1]


def default_stage(predictor: Predictor, size: Size | None = None) -> int:
    """Return the last stage whose map has 4 or more positions per side.

    With the published strides, that is the fourth stage from 97 pixels up.
    """
    side, stages = min(predictor.size if size is None else size), 1
    for stage, stride in enumerate(predictor.model.patch_strides, 1):
        side = -(-side // stride)
        if side >= _LEAST_PLACES:
            stages = stage
    return stages


@functools.cache  # programs are cached by function, so each stage needs a single one
def class_map_of(stage: int) -> Function:
    """Return a function for `Predictor.apply` and `run` that computes the class maps of a stage.

    It returns logits `[batch, num_classes]` and class maps `[batch, h, w]`, either for given labels
    `[batch]` or for the most probable classes.
    """
    _check_stage(stage)

    def logits_and_maps(model, variables, images, labels=None):
        feature_map = model.apply(variables, images, stage, method=_until)
        logits, pull_back = jax.vjp(
            lambda x: model.apply(variables, x, stage, method=_onward), feature_map
        )
        if labels is None:
            labels = logits.argmax(-1)
        (gradient,) = pull_back(jax.nn.one_hot(labels, logits.shape[-1], dtype=logits.dtype))
        weights = gradient.mean((1, 2), dtype=jnp.float32)
        maps = jnp.einsum("bhwc,bc->bhw", feature_map.astype(jnp.float32), weights)
        return logits, jax.nn.relu(maps)

    return logits_and_maps


def _until(model: VVT, images: jax.Array, stage: int) -> jax.Array:
    """Return the feature map of a stage, as `VVT.features` does."""
    x = images.astype(model.dtype)
    for i in range(1, stage + 1):
        x = getattr(model, f"stage{i}")(x, None)
    return x


def _onward(model: VVT, x: jax.Array, stage: int) -> jax.Array:
    """Return the logits, given the feature map of a stage."""
    for i in range(stage + 1, 5):
        x = getattr(model, f"stage{i}")(x, None)
    return model.head(x.mean((1, 2), dtype=jnp.float32))


@dataclasses.dataclass(frozen=True)
class PatchAttention:
    """What one patch attends to in one block.

    Attributes:
        patch: row and column of the patch in the stage's map.
        weights: `[heads, h, w]`, float32: the share of each patch's value in the output of this
            patch. They sum to 1, up to the 1e-4 in the denominator (or to 0 where nothing matches).
        without_locality: the weights for the same queries and keys if every locality were 1; None
            for softmax attention, which has no locality.
        clamp_error: distance between the output computed with these weights and the model's,
            relative to the norm of the latter. The published clamps act on sums over patches, so
            the weights can't represent them.
    """

    patch: tuple[int, int]
    weights: np.ndarray
    without_locality: np.ndarray | None
    clamp_error: float


def patch_attention(
    predictor: Predictor,
    image: ImageLike,
    patch: tuple[int, int],
    *,
    stage: int = 3,
    block: int = -1,
    size: Size | None = None,
) -> PatchAttention:
    """Compute a patch's attention weights in a block, which linear attention never makes explicit.

    Args:
        predictor: any predictor, with vicinity or softmax attention.
        image: a single image.
        patch: row and column in the stage's map, which may have at most 4,096 patches.
        stage: the stage, 1 to 4.
        block: the block of the stage, counted from 0; negative numbers count from the last.
        size: height and width of the model's input, in pixels; by default the card's.

    Raises:
        UserError: the stage, block or patch does not exist, or the map has too many patches.
    """
    _check_stage(stage)
    model = predictor.model
    depth = model.depths[stage - 1]
    if not -depth <= block < depth:
        raise UserError(f"Stage {stage} has no block {block}: it has 0 to {depth - 1}.")
    height, width = predictor.size if size is None else size
    for stride in model.patch_strides[:stage]:
        height, width = -(-height // stride), -(-width // stride)
    if height * width > _MOST_PATCHES:
        raise UserError(
            f"Stage {stage}'s map has {height}x{width} patches, and more than {_MOST_PATCHES} have "
            "too many weights: take a later stage, or smaller images."
        )
    row, column = patch
    if not (0 <= row < height and 0 <= column < width):
        raise UserError(
            f"There is no patch {row}, {column}: the map of stage {stage} is {height}x{width}."
        )
    # The patch is an argument, since otherwise a program would be compiled for each patch.
    index = np.array([row * width + column], np.int32)
    weights, plain, by_weights, by_model = predictor.apply(
        _patch_weights(stage, block % depth), [image], index, size=size
    )
    norm = float(np.linalg.norm(by_model))
    return PatchAttention(
        patch=(row, column),
        weights=weights[0].reshape(-1, height, width),
        without_locality=(
            None if model.attention == "softmax" else plain[0].reshape(-1, height, width)
        ),
        clamp_error=float(np.linalg.norm(by_weights - by_model)) / norm if norm else 0.0,
    )


@functools.cache
def _patch_weights(stage: int, block: int) -> Function:
    def weights_of(model, variables, images, index):
        # Only the first image is real; each padded one would take just as much memory.
        images, index = images[:1], index[0]
        names = ("query", "key", "value")
        place = (f"stage{stage}", f"block{block}", "attention")
        _, captured = model.apply(
            variables,
            images,
            method="features",
            capture_intermediates=lambda module, _: module.path in [(*place, n) for n in names],
            mutable=["intermediates"],
        )
        found = captured["intermediates"]
        for part in place:
            found = found[part]
        heads = model.num_heads[stage - 1]
        query, key, value = (
            (x := found[name]["__call__"][0]).reshape(*x.shape[:-1], heads, -1) for name in names
        )
        if model.attention == "softmax":
            by_model = attention.softmax_attention(query, key, value)
            weights = plain = _softmax_weights(query, key)
            flat = value.reshape(1, -1, *value.shape[3:])
            by_weights = jnp.einsum("bnij,bjnc->binc", weights, flat).reshape(value.shape)
        else:
            by_model = attention.vicinity_attention(
                query, key, value, locality=model.locality, clamp=model.clamp
            )
            by_weights, weights = attention.vicinity_attention_quadratic(
                query, key, value, locality=model.locality, return_weights=True
            )
            _, plain = attention.vicinity_attention_quadratic(
                query, key, value, locality="none", return_weights=True
            )

        def at_patch(out):
            return out.astype(jnp.float32).reshape(1, -1, *out.shape[3:])[:, index]

        return weights[:, :, index], plain[:, :, index], at_patch(by_weights), at_patch(by_model)

    return weights_of


def _softmax_weights(query: jax.Array, key: jax.Array) -> jax.Array:
    """Return softmax attention weights `[batch, heads, n, n]`, float32."""
    q, k = (x.astype(jnp.float32).reshape(x.shape[0], -1, *x.shape[3:]) for x in (query, key))
    return jax.nn.softmax(jnp.einsum("binc,bjnc->bnij", q, k) / np.sqrt(q.shape[-1]))


def overlay(image: np.ndarray, heat: np.ndarray) -> PIL.Image.Image:
    """Draw a map in colour over its image, with an opacity proportional to its values.

    Args:
        image: the image as the model saw it, uint8 `[height, width, 3]`; a small one is enlarged.
        heat: a non-negative map `[h, w]` of any size, which is stretched over the image.

    Raises:
        MissingPackageError: matplotlib is not installed.
    """
    check_matplotlib()
    import matplotlib

    height, width = image.shape[:2]
    scale = max(1, -(-_LEAST_SIDE // min(height, width)))
    resized = (width * scale, height * scale)
    shares = np.asarray(heat, np.float32) / max(float(np.max(heat)), 1e-12)
    smooth = PIL.Image.fromarray(shares).resize(resized, PIL.Image.Resampling.BICUBIC)
    values = np.clip(np.asarray(smooth), 0, 1)
    colours = matplotlib.colormaps["inferno"](values)[..., :3] * 255
    under = np.asarray(
        PIL.Image.fromarray(image).resize(resized, PIL.Image.Resampling.NEAREST), np.float32
    )
    opacity = _OPACITY * values[..., None]
    mixed = under * (1 - opacity) + colours * opacity
    return PIL.Image.fromarray(mixed.round().astype(np.uint8))


def draw_class_maps(
    images: np.ndarray, maps: np.ndarray, titles: Sequence[str] | None = None
) -> "Figure":
    """Draw images above their overlays.

    Args:
        images: the images as the model saw them, uint8 `[images, height, width, 3]` (see
            `Predictor.pixels`).
        maps: the maps that `class_maps` returns.
        titles: a title for each image.

    Raises:
        MissingPackageError: matplotlib is not installed.
    """
    figure = _new_figure(2.0 * len(images), 4.2)
    for i, (image, heat) in enumerate(zip(images, maps, strict=True)):
        above, below = (figure.add_subplot(2, len(images), i + 1 + j * len(images)) for j in (0, 1))
        above.imshow(image)
        below.imshow(overlay(image, heat))
        if titles is not None:
            above.set_title(titles[i], fontsize=9)
    _without_ticks(figure)
    return figure


def draw_patch_attention(image: np.ndarray, shown: PatchAttention) -> "Figure":
    """Draw the image with the patch marked, next to its attention weights averaged over the heads.

    The weights are shown with and without locality, as multiples of a uniform share, along with the
    ratio of the two.

    Args:
        image: the image as the model saw it, uint8 `[height, width, 3]`.
        shown: the attention that `patch_attention` returns.

    Raises:
        MissingPackageError: matplotlib is not installed.
    """
    height, width = shown.weights.shape[1:]
    even = 1 / (height * width)
    local = shown.weights.mean(0) / even
    panels: list[tuple[str, np.ndarray, dict[str, Any], str]] = []
    most = local.max()
    if shown.without_locality is not None:
        plain = shown.without_locality.mean(0) / even
        most = max(most, plain.max())
        ratio = np.divide(
            local, plain, out=np.full_like(local, np.nan), where=(plain > 0) & (local > 0)
        )
        spread = float(np.nanmax(np.abs(np.log2(ratio)), initial=0.1))
        scale = {"cmap": "coolwarm", "vmin": -spread, "vmax": spread}
        panels = [
            ("without its locality", plain, {"cmap": "inferno", "vmin": 0, "vmax": most}, ""),
            ("what its locality changes", np.log2(ratio), scale, "log2 of the ratio"),
        ]
    shades = {"cmap": "inferno", "vmin": 0, "vmax": most}
    panels.insert(0, ("attends to", local, shades, "weight, in even shares"))

    figure = _new_figure(3.6 * (1 + len(panels)), 3.2)
    axes = figure.add_subplot(1, 1 + len(panels), 1)
    axes.imshow(image)
    axes.set_title("the patch", fontsize=10)
    _mark(axes, shown.patch, image.shape[0] / height, image.shape[1] / width)
    for i, (title, values, shades, label) in enumerate(panels, 2):
        axes = figure.add_subplot(1, 1 + len(panels), i)
        drawn = axes.imshow(values, **shades)
        axes.set_title(title, fontsize=10)
        axes.set_facecolor("0.5")  # shows where there is no weight at all
        _mark(axes, shown.patch, 1, 1)
        figure.colorbar(drawn, ax=axes, label=label, fraction=0.046)
    _without_ticks(figure)
    return figure


def _mark(axes: Any, patch: tuple[int, int], tall: float, wide: float) -> None:
    from matplotlib.patches import Rectangle

    corner = (patch[1] * wide - 0.5, patch[0] * tall - 0.5)
    axes.add_patch(Rectangle(corner, wide, tall, fill=False, color="lime", linewidth=2))


def check_matplotlib() -> None:
    """Check that matplotlib is installed.

    Raises:
        MissingPackageError: it is not.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise MissingPackageError("Pictures need matplotlib: pip install 'vvt_jax[charts]'.")


def _new_figure(width: float, height: float) -> "Figure":
    check_matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _without_ticks(figure: "Figure") -> None:
    for axes in figure.axes:
        if axes.get_label() != "<colorbar>":
            axes.set(xticks=[], yticks=[])


def _check_stage(stage: int) -> None:
    if stage not in (1, 2, 3, 4):
        raise UserError(f"There is no stage {stage}: a model has 1 to 4.")
