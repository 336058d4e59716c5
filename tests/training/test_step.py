"""The update: what it computes, carries, remembers and gives up, on a net of a few parameters."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn

from vvt_jax.training.losses import cross_entropy
from vvt_jax.training.mixing import augmentation_key, prepare_batch
from vvt_jax.training.step import init_state, make_train_step

_RECORD = {"mean": [0.4, 0.5, 0.6], "std": [0.2, 0.3, 0.25]}
_CLASSES = 4
_NO_AUGMENT = {"mixup": 0.0, "cutmix": 0.0, "erase": 0.0}
_MIXED = {"mixup": 0.8, "cutmix": 1.0, "erase": 0.5} | {
    "mix_probability": 1.0,
    "cutmix_probability": 0.5,
}


class Plain(nn.Module):
    """A linear classifier: neither dropout nor statistics."""

    @nn.compact
    def __call__(self, images, train=False):
        return nn.Dense(_CLASSES)(images.reshape(len(images), -1))


class Noisy(nn.Module):
    """Dropout and batch statistics."""

    @nn.compact
    def __call__(self, images, train=False):
        x = nn.Dense(8)(images.reshape(len(images), -1))
        x = nn.BatchNorm(use_running_average=not train, momentum=0.9)(x)
        x = nn.Dropout(0.5, deterministic=not train)(x)
        return nn.Dense(_CLASSES)(x)


class Cornered(nn.Module):
    """Finite logits whose gradient is not: the square root of zero."""

    @nn.compact
    def __call__(self, images, train=False):
        root = jnp.sqrt(self.param("root", nn.initializers.zeros, (_CLASSES,)))
        return images.mean((1, 2, 3))[:, None] + root


def _batch(seed=0, size=6):
    rng = np.random.default_rng(seed)
    return {
        "image": jnp.asarray(rng.integers(256, size=(size, 2, 2, 3), dtype=np.uint8)),
        "label": jnp.asarray(rng.integers(_CLASSES, size=size), jnp.int32),
    }


def _normalised(batch):
    return (batch["image"] / np.float32(255) - np.float32(_RECORD["mean"])) / np.float32(
        _RECORD["std"]
    )


def _prepare(batch, key, *, augment=_NO_AUGMENT, label_smoothing=0.0):
    return prepare_batch(
        batch,
        key,
        preprocessing=_RECORD,
        augment=augment,
        label_smoothing=label_smoothing,
        num_classes=_CLASSES,
    )


def _make(
    model=None,
    *,
    seed=0,
    ema_decay=0.0,
    label_smoothing=0.0,
    optimizer=None,
    augment=_NO_AUGMENT,
    prepare=_prepare,
    **options,
):
    model, optimizer = model or Plain(), optimizer or optax.sgd(0.1)
    state = init_state(model, optimizer, (1, 2, 2, 3), seed, ema=ema_decay > 0)
    if prepare is _prepare:
        prepare = functools.partial(prepare, augment=augment, label_smoothing=label_smoothing)
    step = make_train_step(model, optimizer, prepare=prepare, ema_decay=ema_decay, **options)
    return jax.jit(step), state


@pytest.mark.parametrize("label_smoothing", [0.0, 0.2])
def test_update_is_the_gradient_of_the_mean_loss(label_smoothing):
    step, state = _make(label_smoothing=label_smoothing)
    totals = []
    for seed in range(3):
        batch = _batch(seed)

        def loss(params, batch=batch):
            logits = Plain().apply({"params": params}, _normalised(batch))
            return cross_entropy(logits, batch["label"], label_smoothing).mean()

        value, gradient = jax.value_and_grad(loss)(state.params)
        expected = jax.tree.map(lambda p, g: p - 0.1 * g, state.params, gradient)
        squares = sum(float((g**2).sum()) for g in jax.tree.leaves(gradient))
        totals.append((float(value), np.sqrt(squares)))
        state = step(state, batch)
        chex.assert_trees_all_close(state.params, expected, rtol=1e-5, atol=1e-6)
        assert state.step == state.totals.steps == seed + 1
        assert state.seed == 0
        sums = (state.totals.loss, state.totals.grad_norm)
        np.testing.assert_allclose(sums, np.sum(totals, 0), rtol=1e-5)
    assert state.totals.bad_step == 0


def test_label_smoothing_reaches_the_loss():
    losses = []
    for smoothing in (0.0, 0.5):
        step, state = _make(label_smoothing=smoothing)
        losses.append(float(step(state, _batch()).totals.loss))
    assert abs(losses[0] - losses[1]) > 1e-3


@pytest.mark.parametrize("augment", [_NO_AUGMENT, _MIXED], ids=["as they are", "mixed"])
@pytest.mark.parametrize(
    "accumulate", [2, *(pytest.param(n, marks=pytest.mark.slow) for n in (3, 6))]
)
def test_parts_of_a_batch_make_the_same_update_as_all_of_it(accumulate, augment):
    optimizer = optax.adamw(1e-2)
    whole, state = _make(optimizer=optimizer, label_smoothing=0.1, augment=augment)
    parts, _ = _make(
        optimizer=optimizer, label_smoothing=0.1, augment=augment, accumulate=accumulate
    )
    expected = new = state
    for seed in range(3):
        expected, new = whole(expected, _batch(seed)), parts(new, _batch(seed))
    chex.assert_trees_all_close(new.params, expected.params, rtol=1e-5, atol=1e-6)
    chex.assert_trees_all_close(new.totals, expected.totals, rtol=1e-5)


def test_parts_carry_batch_statistics_on():
    step, state = _make(Noisy(), accumulate=3)
    batch = _batch()
    dense, mean = state.params["Dense_0"], 0.0
    inputs = _normalised(batch).reshape(6, -1) @ dense["kernel"] + dense["bias"]
    for part in range(3):
        mean = 0.9 * mean + 0.1 * inputs[part::3].mean(0)
    carried = step(state, batch).variables()["batch_stats"]["BatchNorm_0"]["mean"]
    np.testing.assert_allclose(carried, mean, rtol=1e-4, atol=1e-6)


def test_the_batch_is_prepared_by_seed_and_step():
    step, state = _make(augment=_MIXED)
    state = dataclasses.replace(state, step=jnp.asarray(4, jnp.int32))
    images, targets = prepare_batch(
        _batch(),
        augmentation_key(0, 5),
        preprocessing=_RECORD,
        augment=_MIXED,
        label_smoothing=0.0,
        num_classes=_CLASSES,
    )
    logits = Plain().apply({"params": state.params}, images)
    expected = optax.softmax_cross_entropy(logits, targets).mean()
    np.testing.assert_allclose(step(state, _batch()).totals.loss, expected, rtol=1e-5)


def test_frozen_parameters_get_no_gradient():
    frozen, state = _make(Noisy(), freeze=("Dense_0", "BatchNorm"))
    free, _ = _make(Noisy())
    new = frozen(state, _batch())
    for name in ("Dense_0", "BatchNorm_0"):
        chex.assert_trees_all_equal(new.params[name], state.params[name])
    whole = free(state, _batch())
    chex.assert_trees_all_close(new.params["Dense_1"], whole.params["Dense_1"], rtol=1e-6)
    assert new.totals.grad_norm < whole.totals.grad_norm


def test_initial_state_follows_from_the_seed():
    states = [_make(Noisy(), seed=seed)[1] for seed in (0, 0, 1)]
    chex.assert_trees_all_equal(states[0].params, states[1].params)
    kernels = [state.params["Dense_0"]["kernel"] for state in states]
    assert not np.allclose(kernels[0], kernels[2])
    assert [int(state.seed) for state in states] == [0, 0, 1]
    assert states[0].ema is None
    assert states[0].step == 0


def test_moving_average():
    step, state = _make(ema_decay=0.75)
    chex.assert_trees_all_equal(state.ema, state.params)
    expected = state.params
    for seed in range(3):
        state = step(state, _batch(seed))
        expected = jax.tree.map(lambda e, p: 0.75 * e + 0.25 * p, expected, state.params)
        chex.assert_trees_all_close(state.ema, expected, rtol=1e-6, atol=1e-7)
    assert state.variables(ema=True)["params"] is state.ema
    assert state.variables()["params"] is state.params


def test_batch_statistics_are_carried():
    step, state = _make(Noisy())
    batch, mean = _batch(), 0.0
    for _ in range(3):
        dense = state.params["Dense_0"]
        inputs = _normalised(batch).reshape(6, -1) @ dense["kernel"] + dense["bias"]
        mean = 0.9 * mean + 0.1 * inputs.mean(0)
        state = step(state, batch)
        carried = state.variables()["batch_stats"]["BatchNorm_0"]["mean"]
        np.testing.assert_allclose(carried, mean, rtol=1e-4, atol=1e-6)


def test_dropout_follows_from_seed_and_step_alone():
    batch = _batch()
    step, state = _make(Noisy())
    once, again = step(state, batch), step(state, batch)
    chex.assert_trees_all_equal(once, again)

    def loss(state):
        return float(step(state, batch).totals.loss)

    other_step = loss(dataclasses.replace(state, step=state.step + 1))
    other_seed = loss(dataclasses.replace(state, seed=state.seed + 1))
    assert len({float(once.totals.loss), other_step, other_seed}) == 3


@pytest.mark.parametrize("good_steps", [0, 2])
def test_bad_step_is_the_first_that_is_not_finite(good_steps):
    step, state = _make()
    for _ in range(good_steps):
        state = step(state, _batch())
    assert state.totals.bad_step == 0
    bad = jax.tree.map(lambda p: p.at[0].set(jnp.inf), state.params)
    state = dataclasses.replace(state, params=bad)
    for _ in range(3):
        state = step(state, _batch())
        assert state.totals.bad_step == good_steps + 1
    # It stays on record when the numbers are sound again.
    state = dataclasses.replace(state, params=_make()[1].params)
    assert step(state, _batch()).totals.bad_step == good_steps + 1


def test_a_bad_gradient_of_a_finite_loss_is_noticed():
    step, state = _make(Cornered())
    state = step(state, _batch())
    assert np.isfinite(state.totals.loss)
    assert state.totals.bad_step == 1


def _outlier():
    """A batch that no update can be made by, once `_black_is_no_number` has prepared it."""
    return {**_batch(), "image": jnp.zeros((6, 2, 2, 3), jnp.uint8)}


def _black_is_no_number(batch, key):
    images, targets = _prepare(batch, key)
    return jnp.where(batch["image"].any(), images, jnp.nan), targets


def test_steps_that_are_not_finite_are_skipped_up_to_the_limit():
    options = {"ema_decay": 0.5, "optimizer": optax.adamw(0.1), "prepare": _black_is_no_number}
    plain, clean = _make(Noisy(), **options)
    skipping, state = _make(Noisy(), skip_nonfinite=2, **options)
    for seed, batch in enumerate([_batch(0), _outlier(), _batch(2), _outlier()]):
        before, state = state, skipping(state, batch)
        if seed % 2:
            for name in ("params", "mutable", "opt_state", "ema"):
                chex.assert_trees_all_equal(getattr(state, name), getattr(before, name))
        else:
            clean = dataclasses.replace(clean, step=jnp.asarray(seed, jnp.int32))
            clean = plain(clean, batch)
            for name in ("params", "opt_state", "ema"):  # another program: to rounding
                chex.assert_trees_all_close(
                    getattr(state, name), getattr(clean, name), rtol=1e-4, atol=1e-6
                )
    assert (state.step, state.skipped) == (4, 2)
    totals = state.totals
    assert (totals.steps, totals.updates, totals.skipped, totals.bad_step) == (4, 2, 2, 0)
    np.testing.assert_allclose(totals.loss, clean.totals.loss, rtol=1e-5)
    np.testing.assert_allclose(totals.grad_norm, clean.totals.grad_norm, rtol=1e-4)
    state = skipping(state, _outlier())  # one too many
    assert (state.step, state.skipped, state.totals.bad_step) == (5, 2, 5)


def test_a_bad_gradient_of_a_finite_loss_is_skipped():
    step, state = _make(Cornered(), skip_nonfinite=1)
    new = step(state, _batch())
    chex.assert_trees_all_equal(new.params, state.params)
    assert (new.skipped, new.totals.bad_step) == (1, 0)


@pytest.mark.parametrize("model", [Plain(), Noisy()], ids=["plain", "noisy"])
def test_takes_the_memory_of_the_old_state_over(model):
    step, state = _make(model, ema_decay=0.9, optimizer=optax.adamw(1e-3))
    donating = jax.jit(step, donate_argnums=0)
    batch = _batch()
    new = donating(state, batch)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state))
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves((new, batch)))


def test_is_traced_once():
    traces = []

    class Counting(Plain):
        def __call__(self, images, train=False):
            traces.append(images.shape)
            return super().__call__(images, train)

    step, state = _make(Counting())
    traces.clear()  # of init
    for seed in range(4):
        state = step(state, _batch(seed))
    assert len(traces) == 1
