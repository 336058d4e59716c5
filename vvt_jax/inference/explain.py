"""Where a model looks: class maps (Grad-CAM), and what a patch attends to.

Functions return arrays; `overlay` and those that begin with `draw_` make pictures of them and need
matplotlib (the extra `charts`).
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
from vvt_jax.inference.predictor import Function, ImageLike, Predictor, Size, several
from vvt_jax.models import VVT
from vvt_jax.system.errors import MissingPackageError, UserError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_MOST_PATCHES = 4096  # of a map whose weights are made explicit: their number is its square
_LEAST_SIDE = 224  # pixels of an overlay; smaller images are enlarged by a whole number
_LEAST_PLACES = 4  # of a side of a class map: with fewer it says little
_OPACITY = 0.7  # of the colour where a map is highest


def class_maps(
    predictor: Predictor,
    images: ImageLike | Sequence[ImageLike],
    labels: int | Sequence[int] | None = None,
    *,
    stage: int | None = None,
    size: Size | None = None,
) -> np.ndarray:
    """How much each place of a stage's map speaks for a class.

    Source: Selvaraju et al., "Grad-CAM", arXiv 1610.02391: the map's channels, weighted by the mean
    of the class's logit's gradient, summed, and what is negative left out.

    Args:
        predictor: whose model has a classifier.
        images: one, or several.
        labels: the class, of all images or of each; by default each image's most probable one.
        stage: 1 to 4; by default `default_stage`.
        size: of the model's input, pixels; by default the card's.

    Returns:
        `[images, h, w]`, float32, 0 and more, in the logit's units.

    Raises:
        UserError: no classifier, or a stage or label that the model does not have.
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
    """The last stage whose map has 4 places a side or more: the fourth from 97 pixels up."""
    side, stages = min(predictor.size if size is None else size), 1
    for stage, stride in enumerate(predictor.model.patch_strides, 1):
        side = -(-side // stride)
        if side >= _LEAST_PLACES:
            stages = stage
    return stages


@functools.cache  # programs are known by their function, so that there is one for each stage
def class_map_of(stage: int) -> Function:
    """A function for `Predictor.apply` and `run`: logits `[batch, num_classes]` and class maps
    `[batch, h, w]` of that stage, of given labels `[batch]` or of the most probable classes."""
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
    """The map of a stage, as `VVT.features` has it."""
    x = images.astype(model.dtype)
    for i in range(1, stage + 1):
        x = getattr(model, f"stage{i}")(x, None)
    return x


def _onward(model: VVT, x: jax.Array, stage: int) -> jax.Array:
    """Logits from the map of a stage."""
    for i in range(stage + 1, 5):
        x = getattr(model, f"stage{i}")(x, None)
    return model.head(x.mean((1, 2), dtype=jnp.float32))


@dataclasses.dataclass(frozen=True)
class PatchAttention:
    """What one patch attends to in one block.

    Attributes:
        patch: its row and column in the stage's map.
        weights: `[heads, h, w]`, float32: the share that each patch's value has in its output. They
            sum to 1 up to the 1e-4 in the denominator (to 0 where nothing matches).
        without_locality: the same for the same queries and keys with every locality 1; None for
            softmax attention, which has none.
        clamp_error: the published clamps act on sums over patches and so have no weights of their
            own: how far the output by these weights is from the model's, relative to its norm.
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
    """The weights of a patch in a block's attention, which linear attention never makes.

    Args:
        predictor: any, with vicinity or softmax attention.
        image: one.
        patch: row and column in the stage's map; at most 4,096 patches.
        stage: 1 to 4.
        block: of the stage, from 0; negative ones count from the last.
        size: of the model's input, pixels; by default the card's.

    Raises:
        UserError: a stage, block or patch that is not there, or a map with too many patches.
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
    # A row of the weights is picked here: a program for each patch would be compiled otherwise.
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
        # One image is real, and the others of the batch would take as much memory each.
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
    """`[batch, heads, n, n]`, float32."""
    q, k = (x.astype(jnp.float32).reshape(x.shape[0], -1, *x.shape[3:]) for x in (query, key))
    return jax.nn.softmax(jnp.einsum("binc,bjnc->bnij", q, k) / np.sqrt(q.shape[-1]))


def overlay(image: np.ndarray, heat: np.ndarray) -> PIL.Image.Image:
    """A map in colour over its image, opaque in proportion to its values.

    Args:
        image: what the model saw, uint8 `[height, width, 3]`; a small one is enlarged.
        heat: `[h, w]`, 0 and more, of any size; it is stretched over the image.

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
    """Images above their overlays.

    Args:
        images: what the model saw, uint8 `[images, height, width, 3]` (`Predictor.pixels`).
        maps: of `class_maps`.
        titles: of the images.

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
    """The image with the patch marked, and its weights, the mean over heads: with and without
    locality in units of an even share, and the ratio of the two.

    Args:
        image: what the model saw, uint8 `[height, width, 3]`.
        shown: of `patch_attention`.

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
        axes.set_facecolor("0.5")  # places without any weight
        _mark(axes, shown.patch, 1, 1)
        figure.colorbar(drawn, ax=axes, label=label, fraction=0.046)
    _without_ticks(figure)
    return figure


def _mark(axes: Any, patch: tuple[int, int], tall: float, wide: float) -> None:
    from matplotlib.patches import Rectangle

    corner = (patch[1] * wide - 0.5, patch[0] * tall - 0.5)
    axes.add_patch(Rectangle(corner, wide, tall, fill=False, color="lime", linewidth=2))


def check_matplotlib() -> None:
    """Raises MissingPackageError where it is not installed."""
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
