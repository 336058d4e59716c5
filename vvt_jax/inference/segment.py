"""Segmentation of whole images: at once, in sliding windows, at several sizes and mirrored.

The settings are in the model's card, see `vvt_jax.weights.inference_settings`; without them, the
whole image is processed once.

If an image has several views, their probabilities are averaged. The sides of the views are rounded
to multiples of 32 pixels, so that programs are compiled for a few sizes only; their output is
interpolated to the original size of the image.
"""

import functools
import json
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import PIL.Image

from vvt_jax.data.pixel_labels import IGNORED, view_names, whole_views
from vvt_jax.data.preprocess import normalize, to_rgb
from vvt_jax.models import VVT, forms
from vvt_jax.models.segmenter import resize_bilinear
from vvt_jax.weights.inference_settings import plain_inference

Scores = Callable[[Any, Mapping[str, jax.Array]], jax.Array]


def make_scores(
    model: VVT, preprocessing: Mapping[str, Any], inference: Mapping[str, Any]
) -> Scores:
    """Return a pure function for `jax.jit` that computes the scores of images.

    It takes the variables and the views of the images by name, uint8 `[batch, h, w, 3]`, and
    returns scores `[batch, h, w, num_classes]`, float32, at the size of the first view. The scores
    are logits if there is one view, and logarithms of averaged probabilities if there are several.
    """

    def look(variables: Any, pixels: jax.Array) -> jax.Array:
        images = normalize(pixels, preprocessing)
        if not inference["stride"]:
            return model.apply(variables, images)  # type: ignore[return-value]
        return _slide(
            functools.partial(model.apply, variables),
            images,
            inference["window"],
            inference["stride"],
            model.num_classes,
        )

    def scores(variables: Any, views: Mapping[str, jax.Array]) -> jax.Array:
        names = view_names(inference["scales"])
        size = views[names[0]].shape[1:3]
        if len(names) == 1 and not inference["flip"]:
            return look(variables, views[names[0]])
        total = jnp.zeros((), jnp.float32)
        for name in names:
            looks = [look(variables, views[name])]
            if inference["flip"]:
                looks.append(look(variables, views[name][:, :, ::-1])[:, :, ::-1])
            for logits in looks:
                total = total + jax.nn.softmax(resize_bilinear(logits, size))
        count = len(names) * (2 if inference["flip"] else 1)
        return jnp.log(jnp.maximum(total / count, jnp.finfo(jnp.float32).tiny))

    return scores


def _slide(
    apply: Callable[[jax.Array], Any],
    images: jax.Array,
    window: tuple[int, int],
    stride: int,
    num_classes: int,
) -> jax.Array:
    """Return logits averaged over all windows that contain a pixel.

    The last windows of each row and column end at the border of the image.
    """
    batch, height, width, _ = images.shape
    size = (min(window[0], height), min(window[1], width))

    def starts(length: int, side: int) -> list[int]:
        return [min(at, length - side) for at in range(0, length - side + stride, stride)]

    corners = [(y, x) for y in starts(height, size[0]) for x in starts(width, size[1])]
    shown = np.zeros((height, width, 1), np.float32)
    for y, x in corners:
        shown[y : y + size[0], x : x + size[1]] += 1

    def add(total: jax.Array, corner: jax.Array) -> tuple[jax.Array, None]:
        start = (0, corner[0], corner[1], 0)
        logits = apply(jax.lax.dynamic_slice(images, start, (batch, *size, 3)))
        before = jax.lax.dynamic_slice(total, start, logits.shape)
        return jax.lax.dynamic_update_slice(total, before + logits, start), None

    total = jnp.zeros((batch, height, width, num_classes), jnp.float32)
    total, _ = jax.lax.scan(add, total, jnp.asarray(corners, jnp.int32))
    return total / shown


def _row_at_own_size(
    scores: jax.Array, own_size: jax.Array, row: jax.Array, width: int
) -> jax.Array:
    """Interpolate one row of the scores of each image at the image's original size.

    Maps `[batch, h, w, classes]`, `[batch, 2]` and the number of the row to
    `[batch, width, classes]`. Positions to the right of the image or below it repeat its border.
    The work is done row by row, since the whole result would be by far the largest array.
    """

    def between(length: int, own: jax.Array, at: jax.Array) -> tuple[jax.Array, ...]:
        place = jnp.clip((at + 0.5) * (length / own) - 0.5, 0, length - 1)
        first = jnp.floor(place).astype(jnp.int32)
        return first, jnp.minimum(first + 1, length - 1), place - first

    def one(scores: jax.Array, own: jax.Array) -> jax.Array:
        top, bottom, share = between(scores.shape[0], own[0], row)
        line = (1 - share) * scores[top] + share * scores[bottom]
        left, right, share = between(scores.shape[1], own[1], jnp.arange(width))
        return (1 - share)[:, None] * line[left] + share[:, None] * line[right]

    return jax.vmap(one)(scores, own_size)


def classes_at_own_size(
    scores: jax.Array, own_size: jax.Array, height: int, width: int
) -> jax.Array:
    """Return the class of each pixel, with every image at its original size.

    Args:
        scores: scores `[batch, h, w, num_classes]`.
        own_size: original heights and widths of the images, int32 `[batch, 2]`.
        height: height of the result, in pixels.
        width: width of the result, in pixels.

    Returns:
        Class indices, uint8 `[batch, height, width]`; beyond an image's original size they have no
        meaning.
    """

    def classes(row: jax.Array) -> jax.Array:
        return _row_at_own_size(scores, own_size, row, width).argmax(-1).astype(jnp.uint8)

    return jax.lax.map(classes, jnp.arange(height)).swapaxes(0, 1)


def pixel_sums(
    scores: jax.Array, segmentation: jax.Array, own_size: jax.Array
) -> dict[str, jax.Array]:
    """Sum the loss and the confusion matrix over labelled pixels, at the images' original sizes.

    Args:
        scores: scores `[batch, h, w, num_classes]`.
        segmentation: true classes, uint8 `[batch, height, width]`; pixels with `IGNORED` do not
            count.
        own_size: original heights and widths of the images, int32 `[batch, 2]`.

    Returns:
        `loss`, the cross-entropy in nats, float32; and `confusion`, int32
        `[num_classes, num_classes]`, the number of pixels by true class (row) and predicted class
        (column).
    """
    classes = scores.shape[-1]

    def add(sums: tuple[jax.Array, jax.Array], row: jax.Array) -> tuple[Any, None]:
        loss, confusion = sums
        line = _row_at_own_size(scores, own_size, row, segmentation.shape[2])
        truth = jax.lax.dynamic_index_in_dim(segmentation, row, 1, keepdims=False)
        counted = truth != IGNORED
        label = jnp.where(counted, truth, 0).astype(jnp.int32)
        chosen = jnp.take_along_axis(jax.nn.log_softmax(line), label[..., None], -1)[..., 0]
        loss = loss - jnp.where(counted, chosen, 0).sum()
        place = label * classes + line.argmax(-1)
        confusion = confusion.at[place].add(counted.astype(jnp.int32))
        return (loss, confusion), None

    start = (jnp.zeros(()), jnp.zeros(classes * classes, jnp.int32))
    (loss, confusion), _ = jax.lax.scan(add, start, jnp.arange(segmentation.shape[1]))
    return {"loss": loss, "confusion": confusion.reshape(classes, classes)}


def segmentation_metrics(loss: float, confusion: np.ndarray) -> dict[str, float]:
    """Compute the metrics of a whole data set from its sums.

    Args:
        loss: the loss summed over the pixels that count, in nats.
        confusion: the confusion matrix, int `[classes, classes]`; rows are the true classes.

    Returns:
        `loss`, the mean per pixel; `pixel_accuracy`; and `miou`, the mean intersection over union
        of the classes that occur in the labels or the predictions.
    """
    pixels = int(confusion.sum())
    iou = intersection_over_union(confusion)
    return {
        "loss": loss / max(1, pixels),
        "pixel_accuracy": float(np.trace(confusion)) / max(1, pixels),
        "miou": float(np.nanmean(iou)) if np.isfinite(iou).any() else 0.0,
    }


def intersection_over_union(confusion: np.ndarray) -> np.ndarray:
    """Return the IoU of each class, `[classes]`; NaN for one in neither labels nor predictions."""
    hits = np.diagonal(confusion).astype(np.float64)
    union = confusion.sum(0) + confusion.sum(1) - hits
    return np.where(union > 0, hits / np.maximum(union, 1), np.nan)


@functools.lru_cache(maxsize=8)
def _programs(model: VVT, record: str, inference: str) -> tuple[Any, Any]:
    options = forms.compiler_options("forward")
    scores = make_scores(model, json.loads(record), json.loads(inference))
    return (
        jax.jit(scores, compiler_options=options),
        jax.jit(classes_at_own_size, static_argnums=(2, 3)),
    )


def segment_image(
    model: VVT,
    variables: Any,
    card: Mapping[str, Any],
    image: PIL.Image.Image | np.ndarray,
) -> np.ndarray:
    """Return the class of each pixel of an image.

    Args:
        model: a segmenter, as returned by `load_pretrained`.
        variables: the variables of the model.
        card: the card of the model, with the preprocessing and the settings for whole images.
        image: the image, as for `preprocess.to_rgb`.

    Returns:
        Class indices, uint8 `[height, width]`, at the original size of the image.
    """
    rgb = to_rgb(image)
    record = card["preprocessing"]
    inference = card.get("inference") or plain_inference(record)
    views = whole_views(rgb, record, inference)
    scores, classes = _programs(model, json.dumps(record), json.dumps(inference))
    found = scores(variables, {name: view[np.newaxis] for name, view in views.items()})
    own_size = jnp.asarray([[rgb.height, rgb.width]], jnp.int32)
    return np.asarray(classes(found, own_size, rgb.height, rgb.width)[0])
