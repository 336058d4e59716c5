"""The schedule and AdamW, against their formulas in plain numpy."""

import functools
import math
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import vvt_jax
from configs import common
from vvt_jax.training.optimizer import (
    decays,
    frozen,
    layer_scales,
    make_optimizer,
    make_schedule,
)


def _fields(**changes):
    return {**common.get_config().optimizer.to_dict(), **changes}


_RATES = {"learning_rate": 1.0, "warmup_learning_rate": 0.1, "final_learning_rate": 0.01}


def test_schedule_at_its_corners():
    schedule = make_schedule(_fields(**_RATES), 100, warmup_steps=20)
    cosine = 0.01 + 0.99 * (1 + np.cos(np.pi * 79 / 80)) / 2
    for step, rate in {0: 0.1, 10: 0.55, 20: 1.0, 60: 0.505, 99: cosine, 100: 0.01}.items():
        np.testing.assert_allclose(schedule(step), rate, rtol=1e-5, err_msg=f"step {step}")


def test_schedule_without_warmup_starts_at_its_peak():
    schedule = make_schedule(_fields(**_RATES), 10, warmup_steps=0)
    np.testing.assert_allclose([schedule(0), schedule(5), schedule(10)], [1.0, 0.505, 0.01], 1e-6)


@pytest.mark.parametrize("total_steps", [1, 2, 5])
def test_warmup_longer_than_the_run_reaches_the_peak_at_the_last_step(total_steps):
    schedule = make_schedule(_fields(**_RATES), total_steps, warmup_steps=90)
    np.testing.assert_allclose(schedule(total_steps - 1), 1.0, rtol=1e-6)


@settings(deadline=None, max_examples=20, derandomize=True)
@given(total_steps=st.integers(1, 60), warmup_steps=st.integers(0, 80))
def test_schedule_rises_to_the_peak_and_falls(total_steps, warmup_steps):
    schedule = make_schedule(_fields(**_RATES), total_steps, warmup_steps)
    rates = np.array([schedule(step) for step in range(total_steps)])
    peak = rates.argmax()
    np.testing.assert_allclose(rates[peak], 1.0, rtol=1e-6)
    assert (np.diff(rates[: peak + 1]) > 0).all()
    assert (np.diff(rates[peak:]) < 0).all()
    assert rates.min() >= 0.01


def test_peak_grows_with_the_batch():
    fields = _fields(**{**_RATES, "learning_rate": 0.5}, learning_rate_batch=512)
    schedule = make_schedule(fields, 10, warmup_steps=2, batch_size=1024)
    np.testing.assert_allclose([schedule(0), schedule(2)], [0.1, 1.0], rtol=1e-6)


@pytest.mark.parametrize("epoch_steps", [1251.0, 1281167 / 1024, 97.65625, 3.5])
def test_the_authors_schedule_at_both_ends_of_every_epoch(epoch_steps):
    epochs, warmup, start, peak, final = 300, 5, 1e-6, 1e-3, 1e-5
    rates = {
        "learning_rate": peak, "warmup_learning_rate": start, "final_learning_rate": final,
        "schedule": "cosine_by_epoch",
    }  # fmt: skip
    total = round(epochs * epoch_steps)
    schedule = jax.jit(
        make_schedule(_fields(**rates), total, round(warmup * epoch_steps), 64, epoch_steps)
    )
    firsts = [math.ceil(Fraction(epoch_steps) * epoch) for epoch in range(epochs)] + [total]
    for epoch in range(epochs):
        t = max(epoch - 1, 0)
        expected = final + (peak - final) * (1 + math.cos(math.pi * t / epochs)) / 2
        if t < warmup:
            expected = start + t * (peak - start) / warmup
        for step in (firsts[epoch], firsts[epoch + 1] - 1):
            assert float(schedule(step)) == np.float32(expected), (epoch, step)
    assert schedule(total + 10) == schedule(total - 1)


# Two stacked blocks, whose biases and scales have two dimensions, and a head.
_SHAPES = {
    "blocks": {
        "fc1": {"kernel": (2, 3, 4), "bias": (2, 4)},
        "norm": {"scale": (2, 4), "bias": (2, 4)},
    },
    "head": {"kernel": (4, 2), "bias": (2,)},
}


def _random_tree(seed, scale=1.0):
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda shape: rng.normal(scale=scale, size=shape),
        _SHAPES,
        is_leaf=lambda node: isinstance(node, tuple),
    )


def _adamw(params, gradients, rates, fields):
    """Loshchilov & Hutter's algorithm 2 in float64, over leaves by path."""
    params = {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree.leaves_with_path(params)}
    first = dict.fromkeys(params, 0.0)
    second = dict.fromkeys(params, 0.0)
    for t, (gradient, rate) in enumerate(zip(gradients, rates, strict=True), 1):
        flat = dict(zip(params, jax.tree.leaves(gradient), strict=True))
        if fields["clip_norm"]:
            norm = np.sqrt(sum((g**2).sum() for g in flat.values()))
            flat = {name: g * min(1, fields["clip_norm"] / norm) for name, g in flat.items()}
        for name, g in flat.items():
            first[name] = fields["b1"] * first[name] + (1 - fields["b1"]) * g
            second[name] = fields["b2"] * second[name] + (1 - fields["b2"]) * g**2
            mean, square = (
                first[name] / (1 - fields["b1"] ** t),
                second[name] / (1 - fields["b2"] ** t),
            )
            decay = fields["weight_decay"] * params[name] if "kernel" in name else 0
            params[name] = params[name] - rate * (mean / (np.sqrt(square) + fields["eps"]) + decay)
    return params


@pytest.mark.parametrize("clip_norm", [0.0, 1.0, 3.0])
def test_steps_equal_the_formula(clip_norm):
    fields = _fields(b1=0.8, b2=0.95, eps=1e-3, weight_decay=0.3, clip_norm=clip_norm)
    params = _random_tree(0)
    # Their norms lie around 7, 2 and 0.7: clipped always, sometimes, never.
    gradients = [_random_tree(seed, scale) for seed, scale in ((1, 1.0), (2, 0.3), (3, 0.1))]
    rates = [0.1, 0.05, 0.2]
    expected = _adamw(params, gradients, rates, fields)

    optimizer = make_optimizer(fields, lambda step: jnp.asarray(rates)[step])
    params = jax.tree.map(jnp.float32, params)
    state = optimizer.init(params)
    for gradient in gradients:
        updates, state = optimizer.update(jax.tree.map(jnp.float32, gradient), state, params)
        params = jax.tree.map(jnp.add, params, updates)
    for path, leaf in jax.tree.leaves_with_path(params):
        name = jax.tree_util.keystr(path)
        np.testing.assert_allclose(leaf, expected[name], rtol=1e-5, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("attention", ["vicinity", "softmax"])
def test_decay_acts_on_the_kernels_of_a_model_only(attention):
    model = vvt_jax.create_model("vvt_nano", attention=attention)
    variables = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
    leaves = jax.tree.leaves_with_path(decays(variables["params"]))
    assert {path[-1].key for path, decayed in leaves if decayed} == {"kernel"}
    assert {path[-1].key for path, decayed in leaves if not decayed} == {"bias", "scale"}


def _parameters(**fields):
    model = vvt_jax.create_model("vvt_nano", **fields)
    variables = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
    return jax.tree.map(lambda x: jnp.ones(x.shape), variables["params"])


def test_learning_rates_fall_with_the_depth():
    params = _parameters(depths=(1, 2, 3, 1))  # layers 1, 2 to 3, 4 to 6, 7; the head is 8
    scales = layer_scales(params, 0.5)
    assert scales["stage1"]["patch_embed"]["conv"]["kernel"] == 0.5**8
    assert scales["stage2"]["patch_embed"]["conv"]["kernel"] == 0.5**6
    assert scales["stage2"]["norm"]["scale"] == 0.5**5
    query = scales["stage3"]["blocks"]["attention"]["query"]
    np.testing.assert_array_equal(query["kernel"].ravel(), [0.5**4, 0.5**3, 0.5**2])
    np.testing.assert_array_equal(query["bias"].ravel(), [0.5**4, 0.5**3, 0.5**2])
    assert scales["head"]["kernel"] == 1
    for scale, leaf in zip(jax.tree.leaves(scales), jax.tree.leaves(params), strict=True):
        assert jnp.broadcast_shapes(np.shape(scale), leaf.shape) == leaf.shape


@pytest.mark.slow
def test_updates_are_scaled_by_depth_after_adamw():
    params = _parameters(depths=(1, 2, 1, 1))
    gradients = jax.tree.map(lambda p: p * 1e-3, params)
    updates = {}
    for decay in (1.0, 0.7):
        optimizer = make_optimizer(_fields(layer_decay=decay), lambda _: 0.1)
        state = optimizer.init(params)
        updates[decay], _ = jax.jit(optimizer.update)(gradients, state, params)
    jax.tree.map(
        lambda scaled, update, scale: np.testing.assert_allclose(scaled, update * scale, rtol=1e-6),
        updates[0.7],
        updates[1.0],
        layer_scales(params, 0.7),
    )


def test_frozen_parameters_have_neither_updates_nor_state():
    params = _parameters()
    optimizer = make_optimizer(_fields(freeze=("stage[12]/", "norm/scale$")), lambda _: 0.1)
    state = optimizer.init(params)
    gradients = jax.tree.map(jnp.ones_like, params)
    updates, _ = jax.jit(optimizer.update)(gradients, state, params)
    fixed = frozen(params, ("stage[12]/", "norm/scale$"))
    assert fixed["stage1"]["norm"]["bias"]
    assert fixed["stage4"]["norm"]["scale"]
    assert not fixed["head"]["bias"]
    for update, still in zip(jax.tree.leaves(updates), jax.tree.leaves(fixed), strict=True):
        assert bool((update == 0).all()) == still
    moving = sum(
        leaf.size
        for leaf, still in zip(jax.tree.leaves(params), jax.tree.leaves(fixed), strict=True)
        if not still
    )
    held = sum(leaf.size for leaf in jax.tree.leaves(state) if leaf.ndim)
    assert held == 2 * moving


@pytest.mark.parametrize(
    ("patterns", "words"),
    [
        (("stage5",), "No parameter's path has 'stage5' in it."),
        (("(",), "'(' is no regular expression: "),
        (("stage", "head"), "['stage', 'head'] leave nothing to train."),
    ],
)
def test_patterns_that_freeze_nothing_or_all_are_refused(patterns, words):
    with pytest.raises(ValueError) as refused:  # noqa: PT011 - compared whole
        frozen(_parameters(), patterns)
    assert str(refused.value).startswith(words)


@pytest.mark.parametrize("patterns", [("stage1/",), ("blocks",), ("stage2/norm", "head")])
def test_what_is_frozen_counts_in_the_depth_of_the_rest(patterns):
    shapes = {
        "patch_embed": {"kernel": (3, 2)},
        "blocks": {"fc1": {"kernel": (2, 2, 2)}},
        "norm": {"scale": (2,)},
    }
    tree = {"stage1": shapes, "stage2": shapes, "head": {"kernel": (2, 2)}}
    ones = jax.tree.map(jnp.ones, tree, is_leaf=lambda node: isinstance(node, tuple))
    updates = []
    for freeze in ((), patterns):
        optimizer = make_optimizer(_fields(layer_decay=0.5, freeze=freeze), lambda _: 1.0)
        updates.append(optimizer.update(ones, optimizer.init(ones), ones)[0])
    for path, stays in jax.tree.leaves_with_path(frozen(ones, patterns)):
        whole, part = (functools.reduce(lambda t, k: t[k.key], path, tree) for tree in updates)
        np.testing.assert_allclose(part, 0 * whole if stays else whole, rtol=1e-6)
