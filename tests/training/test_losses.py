"""Cross-entropy against plain numpy."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vvt_jax.training.losses import cross_entropy, pixel_cross_entropy


def _reference(logits, labels, smoothing):
    logits = np.asarray(logits, np.float64)
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    own = -log_p[np.arange(len(labels)), labels]
    return (1 - smoothing) * own + smoothing * -log_p.mean(-1)


@settings(deadline=None, max_examples=8, derandomize=True)
@given(
    batch=st.integers(1, 5),
    classes=st.integers(1, 7),
    smoothing=st.floats(0, 0.9),
    seed=st.integers(0, 99),
)
def test_equals_numpy(batch, classes, smoothing, seed):
    rng = np.random.default_rng(seed)
    logits = rng.normal(scale=3, size=(batch, classes)).astype(np.float32)
    labels = rng.integers(classes, size=batch).astype(np.int32)
    losses = cross_entropy(jnp.asarray(logits), jnp.asarray(labels), smoothing)
    chex.assert_shape(losses, (batch,))
    np.testing.assert_allclose(losses, _reference(logits, labels, smoothing), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_is_float32_and_finite_for_large_logits(dtype):
    logits = jnp.asarray([[1e4, -1e4, 0.0]], dtype)
    for label, loss in enumerate([0, 2e4, 1e4]):
        got = cross_entropy(logits, jnp.asarray([label]))
        assert got.dtype == jnp.float32
        np.testing.assert_allclose(got, [loss], rtol=1e-2)


def test_gradient_is_softmax_minus_target():
    logits = jnp.asarray([[1.0, 2.0, -1.0]])
    gradient = jax.grad(lambda x: cross_entropy(x, jnp.asarray([1]), 0.3).sum())(logits)
    target = np.array([[0.1, 0.8, 0.1]])
    np.testing.assert_allclose(gradient, jax.nn.softmax(logits) - target, rtol=1e-5, atol=1e-7)


def test_ignored_pixels_add_nothing_and_count_in_the_mean():
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(2, 3, 4, 5)).astype(np.float32)
    labels = rng.choice([0, 2, 4, 255], (2, 3, 4)).astype(np.uint8)
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    total = sum(log_p[(*at, labels[at])] for at in np.ndindex(2, 3, 4) if labels[at] != 255)
    np.testing.assert_allclose(pixel_cross_entropy(logits, labels, 255), -total / 24, rtol=1e-5)
    logits[labels == 255] = np.inf
    assert np.isfinite(pixel_cross_entropy(logits, labels, 255))
