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
