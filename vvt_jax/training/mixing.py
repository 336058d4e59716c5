"""Batch augmentation on the device: normalisation, random erasing, mixup and cutmix.

Shapes don't depend on the random draws, and everything runs inside the jitted step on a sharded
batch.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from vvt_jax.data.preprocess import normalize

_PROBABILITIES = ("mix_probability", "cutmix_probability", "erase")
_ERASE_AREA = (0.02, 1 / 3)  # as a fraction of the image's area
_ERASE_ASPECT = (0.3, 1 / 0.3)  # height / width
_ERASE_TRIES = 10


def augmentation_key(seed: jax.typing.ArrayLike, step: jax.typing.ArrayLike) -> jax.Array:
    """Return the random key for augmenting a step's batch; steps count from 1.

    Drop path uses a different key.
    """
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
    """Return images and targets for the model: normalised, then randomly erased, then mixed.

    Args:
        batch: the arrays `image`, uint8 `[batch, height, width, 3]`, and `label`, int32 `[batch]`.
        key: a random key, see `augmentation_key`.
        preprocessing: the preprocessing record, which contains mean and std.
        augment: the settings `erase`, `mixup`, `cutmix`, `mix_probability`, `cutmix_probability`
            and `mix_groups`. The latter is the number of consecutive parts of the batch that are
            mixed separately, each with its own random draws (by default 1).
        label_smoothing: the fraction of a label that is spread evenly over all classes.
        num_classes: the number of classes in the targets.

    Returns:
        Images, float32 `[batch, height, width, 3]`, and targets, float32 `[batch, num_classes]`;
        each target sums to 1.
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
    """Blend each image with its partner in the reversed batch.

    All images of a call are blended by the same method and with the same λ. mixup (Zhang et al.,
    arXiv 1710.09412) computes λ·image + (1 - λ)·partner, with λ drawn from Beta(α, α). cutmix (Yun
    et al., arXiv 1905.04899) pastes a rectangle from the partner that covers about 1 - λ of the
    area, around a uniformly random centre. The rectangle is clipped at the image border, and λ
    becomes the fraction of the image's own pixels that remains. Targets are blended by the same λ.

    Args:
        images: the images, `[batch, height, width, 3]`.
        targets: the targets, `[batch, classes]`.
        key: the random key for this step.
        mixup: the α of mixup; 0 turns it off.
        cutmix: the α of cutmix; 0 turns it off.
        mix_probability: the probability that a step mixes at all.
        cutmix_probability: the probability of cutmix, if both are turned on.
    """
    on_key, which_key, mixup_key, cutmix_key, centre_key = jax.random.split(key, 5)
    on = jax.random.uniform(on_key) < mix_probability
    if mixup and cutmix:
        use_cutmix = jax.random.uniform(which_key) < cutmix_probability
    else:
        use_cutmix = jnp.asarray(bool(cutmix))
    height, width = images.shape[1:3]
    own = jnp.ones((height, width))  # weight of each of the image's own pixels
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
    """Return a mask that is 1.0 inside a random rectangle, `[height, width]`.

    The rectangle covers 1 - `share` of the area before it is clipped at the border.
    """
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
    """Fill a random rectangle of each selected image with noise (Zhong et al., arXiv 1708.04896).

    The noise is normal and drawn independently for each pixel. The rectangle's area is uniform
    between 2 % and a third of the image's area, and its aspect ratio, height / width, is
    log-uniform between 0.3 and 1/0.3. The first of ten tries that is smaller than the image is
    used; if there is none, the image remains unchanged.

    Args:
        images: the normalised images, `[batch, height, width, 3]`.
        key: the random key for this step.
        probability: the probability that an image is selected.
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
    """Return a mask of the positions among `length` from `start` up to, not including, `end`."""
    positions = jnp.arange(length)
    return (positions >= start) & (positions < end)


def check_mixing(augment: Mapping[str, Any]) -> None:
    """Check the settings of `prepare_batch`, ignoring any other fields.

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
