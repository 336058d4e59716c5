"""What training does to a batch on the device: normalisation, random erasing, mixup and cutmix.

Everything has one shape whatever is drawn, and runs inside the jitted step on a sharded batch.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from vvt_jax.data.preprocess import normalize

_PROBABILITIES = ("mix_probability", "cutmix_probability", "erase")
_ERASE_AREA = (0.02, 1 / 3)  # of the image's
_ERASE_ASPECT = (0.3, 1 / 0.3)  # height / width
_ERASE_TRIES = 10


def augmentation_key(seed: jax.typing.ArrayLike, step: jax.typing.ArrayLike) -> jax.Array:
    """The key of what is random in a batch; steps count from 1. Drop path has another one."""
    return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), step), 1)


def prepare_batch(
    batch: Mapping[str, jax.Array],
    key: jax.Array,
    *,
    preprocessing: Mapping[str, Any],
    augment: Mapping[str, Any],
    label_smoothing: float,
    num_classes: int,
) -> tuple[jax.Array, jax.Array]:
    """Images and targets as the model sees them: normalised, then erased, then mixed.

    Args:
        batch: `image`, uint8 `[batch, height, width, 3]`, and `label`, int32 `[batch]`.
        key: see `augmentation_key`.
        preprocessing: the record, for mean and std.
        augment: `erase`, `mixup`, `cutmix`, `mix_probability`, `cutmix_probability`, and
            `mix_groups`, consecutive parts of the batch that are mixed by themselves, each with a
            draw of its own (1 where it is missing).
        label_smoothing: part of a label that is spread evenly over all classes.
        num_classes: of the targets.

    Returns:
        float32 `[batch, height, width, 3]` and `[batch, num_classes]`; each target sums to 1.
    """
    images = normalize(batch["image"], preprocessing)
    targets = optax.smooth_labels(jax.nn.one_hot(batch["label"], num_classes), label_smoothing)
    erase_key, mix_key = jax.random.split(key)
    if augment["erase"]:
        images = random_erase(images, erase_key, probability=augment["erase"])
    if augment["mixup"] or augment["cutmix"]:

        def mix_group(images, targets, key):
            return mix(
                images,
                targets,
                key,
                mixup=augment["mixup"],
                cutmix=augment["cutmix"],
                mix_probability=augment["mix_probability"],
                cutmix_probability=augment["cutmix_probability"],
            )

        groups = augment.get("mix_groups", 1)
        if groups == 1:
            images, targets = mix_group(images, targets, mix_key)
        else:
            grouped, theirs = (x.reshape(groups, -1, *x.shape[1:]) for x in (images, targets))
            keys = jax.random.split(mix_key, groups)
            mixed = jax.vmap(mix_group)(grouped, theirs, keys)
            images, targets = (x.reshape(-1, *x.shape[2:]) for x in mixed)
    return images, targets


def mix(
    images: jax.Array,
    targets: jax.Array,
    key: jax.Array,
    *,
    mixup: float,
    cutmix: float,
    mix_probability: float = 1.0,
    cutmix_probability: float = 0.5,
) -> tuple[jax.Array, jax.Array]:
    """Blends each image with its partner in the reversed batch, one way and one share a step.

    mixup (Zhang et al., arXiv 1710.09412) takes λ·image + (1 - λ)·partner, with λ from
    Beta(α, α). cutmix (Yun et al., arXiv 1905.04899) puts a rectangle of the partner, of about
    1 - λ of the area, around an even random centre; what reaches over the border is cut off, and λ
    becomes the share of the image's own pixels that is left. Targets are blended by λ.

    Args:
        images: `[batch, height, width, 3]`.
        targets: `[batch, classes]`.
        key: of this step.
        mixup: α of mixup, 0 for none.
        cutmix: α of cutmix, 0 for none.
        mix_probability: that a step mixes at all.
        cutmix_probability: of cutmix, where both are on.
    """
    on_key, which_key, mixup_key, cutmix_key, centre_key = jax.random.split(key, 5)
    on = jax.random.uniform(on_key) < mix_probability
    if mixup and cutmix:
        use_cutmix = jax.random.uniform(which_key) < cutmix_probability
    else:
        use_cutmix = jnp.asarray(bool(cutmix))
    height, width = images.shape[1:3]
    own = jnp.ones((height, width))  # the share of a pixel that stays
    if mixup:
        own *= jnp.where(use_cutmix, 1.0, jax.random.beta(mixup_key, mixup, mixup))
    if cutmix:
        share = jax.random.beta(cutmix_key, cutmix, cutmix)
        inside = _cut_box(centre_key, height, width, share)
        own = jnp.where(use_cutmix, 1.0 - inside, own)
    own = jnp.where(on, own, 1.0)
    kept = own.mean()
    own = own[None, :, :, None]
    return (
        own * images + (1 - own) * images[::-1],
        kept * targets + (1 - kept) * targets[::-1],
    )


def _cut_box(key: jax.Array, height: int, width: int, share: jax.Array) -> jax.Array:
    """1.0 inside a rectangle of 1 - `share` of the area before it is cut off at the border."""
    side = jnp.sqrt(1 - share)
    half_height = jnp.floor(height * side).astype(jnp.int32) // 2
    half_width = jnp.floor(width * side).astype(jnp.int32) // 2
    row_key, column_key = jax.random.split(key)
    row = jax.random.randint(row_key, (), 0, height)
    column = jax.random.randint(column_key, (), 0, width)
    rows = _between(height, row - half_height, row + half_height)
    columns = _between(width, column - half_width, column + half_width)
    return (rows[:, None] & columns[None, :]).astype(jnp.float32)


def random_erase(images: jax.Array, key: jax.Array, *, probability: float) -> jax.Array:
    """Fills one random rectangle of an image with normal noise, of its own in each pixel.

    (Zhong et al., arXiv 1708.04896.) Its area is even between 2 % and a third of the image's, its
    height / width even on a log scale between 0.3 and 1/0.3; of ten tries the first that is
    smaller than the image counts, and if none is, the image stays.

    Args:
        images: normalised, `[batch, height, width, 3]`.
        key: of this step.
        probability: of each image.
    """
    batch, height, width, _ = images.shape
    on_key, area_key, aspect_key, place_key, noise_key = jax.random.split(key, 5)
    tries = (batch, _ERASE_TRIES)
    area = jax.random.uniform(area_key, tries, minval=_ERASE_AREA[0], maxval=_ERASE_AREA[1])
    low, high = jnp.log(jnp.asarray(_ERASE_ASPECT))
    aspect = jnp.exp(jax.random.uniform(aspect_key, tries, minval=low, maxval=high))
    pixels = area * height * width
    heights = jnp.round(jnp.sqrt(pixels * aspect)).astype(jnp.int32)
    widths = jnp.round(jnp.sqrt(pixels / aspect)).astype(jnp.int32)
    fits = (heights < height) & (widths < width)
    first = jnp.argmax(fits, axis=1)[:, None]
    box_height = jnp.take_along_axis(heights, first, axis=1)[:, 0]
    box_width = jnp.take_along_axis(widths, first, axis=1)[:, 0]
    place = jax.random.uniform(place_key, (2, batch))
    top = jnp.floor(place[0] * (height - box_height + 1)).astype(jnp.int32)
    left = jnp.floor(place[1] * (width - box_width + 1)).astype(jnp.int32)
    rows = _between(height, top[:, None], (top + box_height)[:, None])
    columns = _between(width, left[:, None], (left + box_width)[:, None])
    erased = (jax.random.uniform(on_key, (batch,)) < probability) & fits.any(axis=1)
    box = erased[:, None, None] & rows[:, :, None] & columns[:, None, :]
    noise = jax.random.normal(noise_key, images.shape, images.dtype)
    return jnp.where(box[..., None], noise, images)


def _between(length: int, start: jax.Array, end: jax.Array) -> jax.Array:
    """Which of `length` positions lie from `start` up to, not including, `end`."""
    positions = jnp.arange(length)
    return (positions >= start) & (positions < end)


def check_mixing(augment: Mapping[str, Any]) -> None:
    """Checks the settings of `prepare_batch`; fields that it doesn't know are left to others.

    Raises:
        ValueError: a field is missing or out of range; one sentence says which.
    """
    missing = [f for f in ("mixup", "cutmix", *_PROBABILITIES) if f not in augment]
    if missing:
        raise ValueError(f"The augmentation settings lack {', '.join(missing)}.")
    for field in ("mixup", "cutmix"):
        if augment[field] < 0:
            raise ValueError(f"`{field}` must be 0 or more, not {augment[field]}.")
    for field in _PROBABILITIES:
        if not 0 <= augment[field] <= 1:
            raise ValueError(f"`{field}` is a probability from 0 to 1, not {augment[field]}.")
