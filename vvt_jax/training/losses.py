"""Cross-entropy losses of whole images and of pixels, computed in float32."""

import jax
import jax.numpy as jnp
import optax


def soft_cross_entropy(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """Return the softmax cross-entropy of each example: `[batch]`, float32, in nats.

    Args:
        logits: the logits, `[batch, num_classes]`.
        targets: the class probabilities of each example, `[batch, num_classes]`.
    """
    return optax.softmax_cross_entropy(logits.astype(jnp.float32), targets)


def mean_cross_entropy(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """Return the mean of `soft_cross_entropy` over the batch, a scalar."""
    return soft_cross_entropy(logits, targets).mean()


def cross_entropy(logits: jax.Array, labels: jax.Array, smoothing: float = 0.0) -> jax.Array:
    """Return the softmax cross-entropy of each example: `[batch]`, float32, in nats.

    Args:
        logits: the logits, `[batch, num_classes]`.
        labels: the class indices, `[batch]`.
        smoothing: the fraction of the label that is spread evenly over all classes.
    """
    targets = jax.nn.one_hot(labels, logits.shape[-1])
    return soft_cross_entropy(logits, optax.smooth_labels(targets, smoothing))


def pixel_cross_entropy(logits: jax.Array, labels: jax.Array, ignored: int) -> jax.Array:
    """Return the softmax cross-entropy averaged over all pixels, float32, in nats.

    Ignored pixels have a loss of zero but count towards the mean, as in mmsegmentation. Each pixel
    thus has the same weight, whichever batch, device or part of a batch it is in.

    Args:
        logits: the logits, `[batch, height, width, num_classes]`.
        labels: the class indices, `[batch, height, width]`.
        ignored: the label of pixels to ignore.
    """
    counted = labels != ignored
    losses = optax.softmax_cross_entropy_with_integer_labels(
        logits.astype(jnp.float32), jnp.where(counted, labels, 0).astype(jnp.int32)
    )
    return jnp.where(counted, losses, 0).mean()
