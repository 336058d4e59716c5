"""Evaluation against plain numpy: every example once, padding never."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from hypothesis import given, settings
from hypothesis import strategies as st

from vvt_jax.data.loader import eval_batches
from vvt_jax.data.sources import open_source
from vvt_jax.training.eval_step import evaluate, make_eval_step, make_set_step

_RECORD = {"mean": [0.0, 0.0, 0.0], "std": [1 / 255, 1 / 255, 1 / 255]}  # leaves 0..255 alone
_PADDING = 255  # the pixel that stands for it


class Table(nn.Module):
    """Logits by the value of an image's first pixel: `[256, classes]` of them are its weights."""

    classes: int

    @nn.compact
    def __call__(self, images, train=False):
        table = self.param("table", nn.initializers.zeros, (256, self.classes))
        return table[jnp.round(images[:, 0, 0, 0]).astype(int)]


@functools.cache
def _eval_step(classes):
    return jax.jit(make_eval_step(Table(classes), _RECORD))


def _batches(labels, batch_size, dtype=jnp.int32):
    """`labels`: `[examples]`, or `[examples, classes]` of what is right."""
    for start in range(0, len(labels), batch_size):
        pixels = np.full(batch_size, _PADDING, np.uint8)
        part = labels[start : start + batch_size]
        missing = [(0, batch_size - len(part))] + [(0, 0)] * (labels.ndim - 1)
        pixels[: len(part)] = np.arange(start, start + len(part))
        yield {
            "image": jnp.asarray(
                np.broadcast_to(pixels[:, None, None, None], (batch_size, 1, 1, 3))
            ),
            "label": jnp.asarray(np.pad(part, missing), dtype),
            "mask": jnp.arange(batch_size) < len(part),
        }


def _expected(logits, labels):
    ranks = (logits > logits[np.arange(len(labels)), labels][:, None]).sum(-1)
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    return {
        "loss": -log_p[np.arange(len(labels)), labels].mean(),
        "top1": (ranks < 1).mean(),
        "top5": (ranks < 5).mean(),
        "examples": len(labels),
    }


@settings(deadline=None, max_examples=15, derandomize=True)
@given(
    count=st.integers(1, 40),
    batch_size=st.sampled_from([1, 10, 64]),
    classes=st.sampled_from([1, 3, 8]),
    seed=st.integers(0, 99),
)
def test_equals_numpy_and_ignores_padding(count, batch_size, classes, seed):
    rng = np.random.default_rng(seed)
    table = rng.normal(size=(256, classes))
    table[_PADDING] = 1e30 * (np.arange(classes) == 0)  # sure of the label that padding has
    labels = rng.integers(classes, size=count)
    variables = {"params": {"table": jnp.asarray(table, jnp.float32)}}
    got, _ = evaluate(_eval_step(classes), variables, _batches(labels, batch_size))
    expected = _expected(table[:count], labels)
    assert set(got) == set(expected)
    for name in expected:
        np.testing.assert_allclose(got[name], expected[name], rtol=1e-5, atol=1e-7, err_msg=name)
    if classes < 5:
        assert got["top5"] == 1


def test_padding_that_is_not_a_number_does_not_count():
    table = np.random.default_rng(0).normal(size=(256, 6))
    table[_PADDING] = np.nan
    labels = np.arange(5)
    variables = {"params": {"table": jnp.asarray(table, jnp.float32)}}
    got, _ = evaluate(_eval_step(6), variables, _batches(labels, 4))
    np.testing.assert_allclose(got["loss"], _expected(table[:5], labels)["loss"], rtol=1e-5)
    assert got["examples"] == 5


@pytest.mark.parametrize("batch_size", [25, 48])
def test_counts_the_examples_of_a_source_once(batch_size):
    source = open_source("digits", "validation")
    record = {"size": [8, 8], "crop_fraction": 1.0, "interpolation": "nearest", **_RECORD}
    table = np.eye(10, dtype=np.float32)[np.zeros(256, int)]  # always says 0
    batches = list(eval_batches(source, record=record, batch_size=batch_size))
    step = jax.jit(make_eval_step(Table(10), record))
    got, _ = evaluate(step, {"params": {"table": jnp.asarray(table)}}, batches)
    labels = [source.examples[i]["label"] for i in range(len(source.examples))]
    assert got["examples"] == 144
    np.testing.assert_allclose(got["top1"], np.mean(np.equal(labels, 0)), rtol=1e-6)


def test_few_batches_wait_to_be_evaluated():
    """Each program that waits holds a batch, and simulated devices deadlock on many of them."""
    waiting = set()

    class Sum:
        def __init__(self):
            waiting.add(self)

        def block_until_ready(self):
            waiting.discard(self)

        def __array__(self, *_, **__):
            return np.ones((), np.int32)

    most = 0

    def step(variables, batch):
        nonlocal most
        sums = {name: Sum() for name in ("loss", "top1", "top5", "examples")}
        most = max(most, len(waiting) // len(sums))
        return sums

    got, _ = evaluate(step, {}, [{}] * 10)
    assert got["examples"] == 10
    assert most <= 3


def test_nothing_to_evaluate():
    with pytest.raises(ValueError, match="nothing to evaluate"):
        evaluate(_eval_step(3), {}, [])


@pytest.mark.parametrize("batch_size", [3, 8, 40])
def test_confusion_counts_each_example_once(batch_size):
    rng = np.random.default_rng(0)
    table, labels = rng.normal(size=(256, 6)), rng.integers(6, size=40)
    step = jax.jit(make_eval_step(Table(6), _RECORD, confusion=True))
    variables = {"params": {"table": jnp.asarray(table, jnp.float32)}}
    metrics, confusion = evaluate(step, variables, _batches(labels, batch_size))
    expected = np.zeros((6, 6), int)
    np.add.at(expected, (labels, table[:40].argmax(-1)), 1)
    np.testing.assert_array_equal(confusion, expected)
    assert confusion.dtype == np.int32
    assert np.trace(confusion) / 40 == pytest.approx(metrics["top1"])


def test_without_confusion_there_is_none():
    variables = {"params": {"table": jnp.zeros((256, 3))}}
    assert evaluate(_eval_step(3), variables, _batches(np.arange(3), 4))[1] is None


@functools.cache
def _set_step(classes):
    return jax.jit(make_set_step(Table(classes), _RECORD))


@settings(deadline=None, max_examples=15, derandomize=True)
@given(
    count=st.integers(1, 40),
    batch_size=st.sampled_from([1, 10, 64]),
    classes=st.sampled_from([3, 12]),
    seed=st.integers(0, 99),
)
def test_sets_with_several_right_classes_or_fewer_to_choose_from(count, batch_size, classes, seed):
    rng = np.random.default_rng(seed)
    table = rng.normal(size=(256, classes))
    table[_PADDING] = np.nan
    allowed = rng.uniform(size=classes) < 0.7
    right = (rng.uniform(size=(count, classes)) < 0.2) & allowed
    labels = np.where(allowed, right.astype(int), -1)
    variables = {"params": {"table": jnp.asarray(table, jnp.float32)}}
    got, confusion = evaluate(
        _set_step(classes), variables, _batches(labels, batch_size, dtype=jnp.int8)
    )
    assert confusion is None
    counted = np.flatnonzero(right.any(1))
    assert got["examples"] == len(counted)
    if not len(counted):
        assert np.isnan([got["loss"], got["top1"], got["top5"]]).all()
        return
    losses, top1, top5 = [], [], []
    for i in counted:
        best = sorted(np.flatnonzero(allowed), key=lambda c: -table[i, c])
        p = np.exp(table[i]) / np.exp(table[i][allowed]).sum()
        losses.append(-np.log(p[right[i]].sum()))
        top1.append(right[i, best[0]])
        top5.append(right[i, best[:5]].any())
    np.testing.assert_allclose(got["loss"], np.mean(losses), rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose([got["top1"], got["top5"]], [np.mean(top1), np.mean(top5)])
