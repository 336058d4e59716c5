"""Losses: one float32 number an example."""

import jax
import jax.numpy as jnp
import optax


def soft_cross_entropy(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """Softmax cross-entropy of each example: `[batch]`, float32, in nats.

    Args:
        logits: `[batch, num_classes]`.
        targets: `[batch, num_classes]`, each example's shares of the classes.
    """
    return optax.softmax_cross_entropy(logits.astype(jnp.float32), targets)


def mean_cross_entropy(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """The mean of `soft_cross_entropy` over the batch, a number."""
    return soft_cross_entropy(logits, targets).mean()


def cross_entropy(logits: jax.Array, labels: jax.Array, smoothing: float = 0.0) -> jax.Array:
    """Softmax cross-entropy of each example: `[batch]`, float32, in nats.

    Args:
        logits: `[batch, num_classes]`.
        labels: `[batch]`, class numbers.
        smoothing: part of the label that is spread evenly over all classes.
    """
    targets = jax.nn.one_hot(labels, logits.shape[-1])
    return soft_cross_entropy(logits, optax.smooth_labels(targets, smoothing))


def pixel_cross_entropy(logits: jax.Array, labels: jax.Array, ignored: int) -> jax.Array:
    """The mean over all pixels of their softmax cross-entropy, float32, in nats.

    Ignored pixels add nothing, but count in the mean, as in mmsegmentation: so each pixel has the
    same weight in whatever batch, device or part of a batch it comes.

    Args:
        logits: `[batch, height, width, num_classes]`.
        labels: `[batch, height, width]`, class numbers.
        ignored: the number of pixels that don't count.
    """
    counted = labels != ignored
    losses = optax.softmax_cross_entropy_with_integer_labels(
        logits.astype(jnp.float32), jnp.where(counted, labels, 0).astype(jnp.int32)
    )
    return jnp.where(counted, losses, 0).mean()
