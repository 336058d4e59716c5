"""The schedule and AdamW, against their formulas in plain numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import vvt_jax
from configs import common
from vvt_jax.recipe.optimizer import decays, make_optimizer, make_schedule


def _fields(**changes):
    return {**common.get_config().optimizer.to_dict(), **changes}


_RATES = {"learning_rate": 1.0, "warmup_learning_rate": 0.1, "final_learning_rate": 0.01}


def test_schedule_at_its_corners():
    schedule = make_schedule(_fields(**_RATES, warmup_epochs=2.0), 100, steps_per_epoch=10.2)
    cosine = 0.01 + 0.99 * (1 + np.cos(np.pi * 79 / 80)) / 2
    for step, rate in {0: 0.1, 10: 0.55, 20: 1.0, 60: 0.505, 99: cosine, 100: 0.01}.items():
        np.testing.assert_allclose(schedule(step), rate, rtol=1e-5, err_msg=f"step {step}")


def test_schedule_without_warmup_starts_at_its_peak():
    schedule = make_schedule(_fields(**_RATES, warmup_epochs=0.0), 10, steps_per_epoch=5)
    np.testing.assert_allclose([schedule(0), schedule(5), schedule(10)], [1.0, 0.505, 0.01], 1e-6)


@pytest.mark.parametrize("total_steps", [1, 2, 5])
def test_warmup_longer_than_the_run_reaches_the_peak_at_the_last_step(total_steps):
    schedule = make_schedule(_fields(**_RATES, warmup_epochs=9.0), total_steps, steps_per_epoch=10)
    np.testing.assert_allclose(schedule(total_steps - 1), 1.0, rtol=1e-6)


@settings(deadline=None, max_examples=20, derandomize=True)
@given(
    total_steps=st.integers(1, 60),
    warmup_epochs=st.floats(0, 8),
    steps_per_epoch=st.floats(0.1, 20),
)
def test_schedule_rises_to_the_peak_and_falls(total_steps, warmup_epochs, steps_per_epoch):
    schedule = make_schedule(
        _fields(**_RATES, warmup_epochs=warmup_epochs), total_steps, steps_per_epoch
    )
    rates = np.array([schedule(step) for step in range(total_steps)])
    peak = rates.argmax()
    np.testing.assert_allclose(rates[peak], 1.0, rtol=1e-6)
    assert (np.diff(rates[: peak + 1]) > 0).all()
    assert (np.diff(rates[peak:]) < 0).all()
    assert rates.min() >= 0.01


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
