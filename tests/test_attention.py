"""Attention against its definition, written out here once more in NumPy and float64."""

import functools
import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vvt_jax import attention
from vvt_jax.models import forms

_GRIDS = [(1, 1), (1, 7), (7, 1), (3, 5)]
_QUICK_COMPILE = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


def _locality(locality, height, width):
    """w_ij of two tokens at a time, `[n, n]`."""
    n = height * width
    weights = np.empty((n, n))
    for i in range(n):
        for j in range(n):
            by_row = math.cos(math.pi / 2 * (i // width - j // width) / height)
            by_column = math.cos(math.pi / 2 * (i % width - j % width) / width)
            weights[i, j] = {
                "sum": by_row + by_column,
                "product": by_row * by_column,
                "1d": math.cos(math.pi / 2 * (i - j) / n),
                "none": 1.0,
            }[locality]
    return weights


def _flat(x):
    """`[batch, height, width, heads, dim]` -> float64 `[batch, heads, n, dim]`."""
    batch, height, width, heads, dim = x.shape
    return np.asarray(x, np.float64).reshape(batch, height * width, heads, dim).swapaxes(1, 2)


def _definition(query, key, value, locality):
    """Output as `value`, and weights `[batch, heads, n, n]`."""
    q, k = np.maximum(_flat(query), 0), np.maximum(_flat(key), 0)
    scores = q @ k.swapaxes(-1, -2) * _locality(locality, *query.shape[1:3])
    weights = scores / (scores.sum(-1, keepdims=True) + 1e-4)
    return (weights @ _flat(value)).swapaxes(1, 2).reshape(value.shape), weights


def _clamp(x):
    return np.sign(x) * np.clip(np.abs(x), 1e-4, 1e4)


def _definition_with_clamps(query, key, value, locality):
    """The published order: features times positions, KV and what follows clamped."""
    height, width = query.shape[1:3]
    token = np.arange(height * width)
    a, b = np.pi / 2 * (token // width) / height, np.pi / 2 * (token % width) / width
    n = np.pi / 2 * token / token.size
    positions = {
        "sum": [np.cos(a), np.sin(a), np.cos(b), np.sin(b)],
        "product": [f(a) * g(b) for f in (np.cos, np.sin) for g in (np.cos, np.sin)],
        "1d": [np.cos(n), np.sin(n)],
        "none": [np.ones_like(n)],
    }[locality]
    q, k = (
        np.concatenate([np.maximum(_flat(x), 0) * p[:, None] for p in positions], -1)
        for x in (query, key)
    )
    kv = _clamp(k.swapaxes(-1, -2) @ _flat(value))
    scale = _clamp(1 / (q @ k.sum(-2)[..., None] + 1e-4))
    out = _clamp(_clamp(q @ kv) * scale)
    return out.swapaxes(1, 2).reshape(value.shape)


def _random(shape, value_dim=None, *, seed=0, scale=1.0, dtype=np.float32):
    """Query, key and value."""
    rng = np.random.default_rng(seed)
    shapes = [shape, shape, (*shape[:-1], value_dim or shape[-1])]
    return [jnp.asarray(scale * rng.standard_normal(s), dtype) for s in shapes]


def _apart(query, key, value):
    """Moved away from zero: half of query and key is dead, the rest is not small."""
    query, key = (x + jnp.where(x > 0, 0.5, -0.5) for x in (query, key))
    return query, key, value


def _of_one_sign(query, key, value):
    """Each channel of value with one sign, so that nothing jumps from one clamp to the other."""
    signs = jnp.where(jnp.arange(value.shape[-1]) % 2 == 0, 1, -1).astype(value.dtype)
    return query, key, (jnp.abs(value) + jnp.abs(value).mean()) * signs


@functools.partial(
    jax.jit, static_argnames=("locality", "clamp", "form"), compiler_options=_QUICK_COMPILE
)
def _linear(query, key, value, *, locality, clamp, form):
    return attention.vicinity_attention(
        query, key, value, locality=locality, clamp=clamp, form=form
    )


@functools.partial(
    jax.jit, static_argnames=("locality", "clamp", "form"), compiler_options=_QUICK_COMPILE
)
def _value_and_gradients(query, key, value, cotangent, *, locality, clamp, form):
    """The output, and the gradients of its product with the cotangent; form: also quadratic."""

    def attend(query, key, value):
        if form == "quadratic":
            return attention.vicinity_attention_quadratic(query, key, value, locality=locality)
        return attention.vicinity_attention(
            query, key, value, locality=locality, clamp=clamp, form=form
        )

    out, pull_back = jax.vjp(attend, query, key, value)
    return out, pull_back(cotangent)


def _assert_close(actual, expected, relative, absolute=0.0):
    """Within `relative` times the largest magnitude that is expected."""
    expected = np.asarray(expected, np.float64)
    bound = relative * np.abs(expected).max() + absolute
    np.testing.assert_allclose(np.asarray(actual, np.float64), expected, rtol=0, atol=bound)


@functools.partial(jax.jit, static_argnames="locality", compiler_options=_QUICK_COMPILE)
def _quadratic(query, key, value, *, locality):
    """Output and weights."""
    return attention.vicinity_attention_quadratic(
        query, key, value, locality=locality, return_weights=True
    )


# The definition


@pytest.mark.parametrize("grid", _GRIDS)
@pytest.mark.parametrize("locality", attention.LOCALITIES)
def test_quadratic_is_the_definition(locality, grid):
    query, key, value = _random((2, *grid, 3, 4), value_dim=5)
    expected, expected_weights = _definition(query, key, value, locality)
    out, weights = _quadratic(query, key, value, locality=locality)
    n = grid[0] * grid[1]
    chex.assert_shape(weights, (2, 3, n, n))
    chex.assert_type([out, weights], jnp.float32)
    chex.assert_equal_shape([out, value])
    _assert_close(weights, expected_weights, 1e-6)
    _assert_close(out, expected, 2e-6)


@pytest.mark.parametrize("grid", _GRIDS)
@pytest.mark.parametrize("locality", attention.LOCALITIES)
def test_locality_weights_are_the_definition(locality, grid):
    weights = attention.locality_weights(locality, *grid)
    np.testing.assert_allclose(weights, _locality(locality, *grid), atol=1e-6)


def test_published_locality_by_hand():
    # 2 rows, 3 columns; tokens 0 = (0, 0) and 5 = (1, 2): cos(π/4) + cos(π/3)
    weights = attention.locality_weights("sum", 2, 3)
    assert weights[0, 5] == pytest.approx(math.sqrt(0.5) + 0.5)
    assert weights[0, 0] == 2
    assert attention.locality_weights("product", 2, 3)[0, 5] == pytest.approx(math.sqrt(0.5) / 2)
    assert attention.locality_weights("1d", 2, 3)[0, 5] == pytest.approx(
        math.cos(math.pi / 2 * 5 / 6)
    )


@settings(deadline=None, derandomize=True, max_examples=30)
@given(
    height=st.integers(1, 12),
    width=st.integers(1, 12),
    locality=st.sampled_from(["sum", "product"]),
)
def test_locality_is_symmetric_and_falls_with_distance_along_rows_and_columns(
    height, width, locality
):
    weights = attention.locality_weights(locality, height, width)
    np.testing.assert_array_equal(weights, weights.T)
    assert (weights > 0).all()
    of_first = weights[0].reshape(height, width)
    assert (np.diff(of_first, axis=0) < 0).all()
    assert (np.diff(of_first, axis=1) < 0).all()


@settings(deadline=None, derandomize=True, max_examples=15)
@given(
    grid=st.sampled_from(_GRIDS),
    locality=st.sampled_from(attention.LOCALITIES),
    scale=st.sampled_from([1e-3, 1.0, 1e3]),
    seed=st.integers(0, 2**32 - 1),
)
def test_weights_are_not_negative_and_sum_to_at_most_one(grid, locality, scale, seed):
    inputs = _random((2, *grid, 3, 4), value_dim=5, seed=seed, scale=scale)
    _, weights = _quadratic(*inputs, locality=locality)
    assert (weights >= 0).all()
    assert weights.sum(-1).max() <= 1 + 1e-6


@pytest.mark.parametrize("locality", attention.LOCALITIES)
def test_every_token_attends_to_every_other(locality):
    inputs = (jnp.abs(x) for x in _random((2, 3, 5, 3, 4), value_dim=5))
    _, weights = _quadratic(*inputs, locality=locality)
    assert (weights > 0).all()


# The linear forms


@settings(deadline=None, derandomize=True, max_examples=6)
@given(
    height=st.integers(1, 6),
    width=st.integers(1, 6),
    heads=st.integers(1, 3),
    dim=st.integers(1, 5),
    value_dim=st.integers(1, 4),
    locality=st.sampled_from(attention.LOCALITIES),
    form=st.sampled_from(forms.ATTENTION),
    seed=st.integers(0, 2**32 - 1),
)
def test_linear_is_quadratic(height, width, heads, dim, value_dim, locality, form, seed):
    _assert_linear_is_quadratic((height, width), heads, dim, value_dim, locality, form, seed)


@pytest.mark.parametrize("grid", [(1, 6), (6, 1)])
@pytest.mark.parametrize("form", forms.ATTENTION)
@pytest.mark.parametrize("locality", ["sum", "1d"])
def test_linear_is_quadratic_on_a_single_row_or_column(locality, form, grid):
    _assert_linear_is_quadratic(grid, 2, 3, 3, locality, form, seed=0)


def _assert_linear_is_quadratic(grid, heads, dim, value_dim, locality, form, seed):
    inputs = _apart(*_random((2, *grid, heads, dim), value_dim, seed=seed))
    cotangent = _random((2, *grid, heads, value_dim), seed=seed + 1)[0]
    expected, expected_gradients = _value_and_gradients(
        *inputs, cotangent, locality=locality, clamp=False, form="quadratic"
    )
    out, gradients = _value_and_gradients(
        *inputs, cotangent, locality=locality, clamp=False, form=form
    )
    _assert_close(out, expected, 1e-5)
    for gradient, expected_gradient in zip(gradients, expected_gradients, strict=True):
        _assert_close(gradient, expected_gradient, 1e-5, absolute=1e-5)


@pytest.mark.parametrize(
    ("query_scale", "scale"),
    [(1e-3, 1e-3), (1e3, 1e-3), (1, 1), (1e-4, 50), (50, 50)],
    ids=["all small", "KV small", "none", "KV large", "all large"],
)
@pytest.mark.parametrize("form", forms.ATTENTION)
@pytest.mark.parametrize("locality", attention.LOCALITIES)
def test_clamps_act_as_published(locality, form, query_scale, scale):
    """Values only: where an element flips at the clamp, gradients of two right programs differ."""
    query, key, value = _of_one_sign(*_random((2, 5, 6, 2, 4), scale=scale))
    query *= query_scale / scale
    expected = _definition_with_clamps(query, key, value, locality)
    out = _linear(query, key, value, locality=locality, clamp=True, form=form)
    _assert_close(out, expected, 2e-6)


def test_form_is_the_chosen_one_unless_given():
    inputs = _random((1, 4, 6, 2, 3))

    def trace(**kwargs):
        return str(
            jax.make_jaxpr(functools.partial(attention.vicinity_attention, **kwargs))(*inputs)
        )

    for form in forms.ATTENTION:
        with forms.use(attention=form):
            assert trace() == trace(form=form)
    assert trace(form="separable") != trace(form="concatenated")


def test_separable_form_makes_nothing_wider_than_its_inputs():
    """...for the published locality: no tensor of all tokens has the 4 copies of the features."""
    inputs = _random((1, 16, 16, 1, 8))
    for form, widest in (("separable", 8), ("concatenated", 32)):
        attend = functools.partial(attention.vicinity_attention, form=form)
        equations = jax.make_jaxpr(attend)(*inputs).eqns
        sizes = [variable.aval.size for e in equations for variable in e.outvars]
        assert max(sizes) == 16 * 16 * widest


# The clamp


@pytest.mark.parametrize(
    ("given", "kept", "slope"),
    [
        (0.0, 0.0, 0),
        (1e-9, 1e-4, 0),
        (-1e-9, -1e-4, 0),
        (2e-4, 2e-4, 1),
        (-3.0, -3.0, 1),
        (9e3, 9e3, 1),
        (2e4, 1e4, 0),
        (-np.inf, -1e4, 0),
    ],
)
def test_clamp_bounds_the_magnitude_and_keeps_zero_and_sign(given, kept, slope):
    value, gradient = jax.value_and_grad(attention.clamp_magnitude)(jnp.float32(given))
    assert value == jnp.float32(kept)
    assert gradient == slope


@pytest.mark.parametrize("form", forms.ATTENTION)
def test_clamp_changes_the_result_only_where_it_acts(form):
    def difference(scale):
        inputs = [jnp.abs(x) + scale for x in _random((1, 5, 7, 2, 8), scale=scale)]
        kept, free = (
            _linear(*inputs, locality="sum", clamp=clamp, form=form) for clamp in (True, False)
        )
        return jnp.abs(kept - free).max() / jnp.abs(free).max()

    assert difference(1.0) < 1e-5  # everything is between 1e-4 and 1e4
    assert difference(1e-3) > 0.1  # KV and numerator are small
    assert difference(100.0) > 0.1  # KV is large, the scale small


@pytest.mark.parametrize("clamp", [True, False])
@pytest.mark.parametrize("form", forms.ATTENTION)
def test_query_without_any_match_gives_zero_and_finite_gradients(form, clamp):
    query, key, value = _random((1, 3, 4, 2, 5))
    query = query.at[0, 1, 2].set(-1.0)
    out, gradients = _value_and_gradients(
        query, key, value, jnp.ones_like(value), locality="sum", clamp=clamp, form=form
    )
    assert (out[0, 1, 2] == 0).all()
    chex.assert_tree_all_finite((out, gradients))
    nothing = -jnp.abs(key)
    out, gradients = _value_and_gradients(
        query, nothing, value, jnp.ones_like(value), locality="sum", clamp=clamp, form=form
    )
    assert (out == 0).all()
    chex.assert_tree_all_finite((out, gradients))


# Numerics: the largest error over the largest output. The bounds are 1.5 to 3 times what was
# measured: 4.3e-7, 3.8e-3 (2⁻⁸: the result's own rounding) and 4.8e-4 (2⁻¹¹).

_BOUNDS = {"float32": 1e-6, "bfloat16": 1.5 * 2**-8, "float16": 1.5 * 2**-11}
_DEFAULT_NUMERICS = [("bfloat16", "sum"), ("float16", "product")]


@pytest.mark.parametrize("clamp", [True, False])
@pytest.mark.parametrize("form", forms.ATTENTION)
@pytest.mark.parametrize(
    ("dtype", "locality"),
    [
        pytest.param(d, x, marks=() if (d, x) in _DEFAULT_NUMERICS else pytest.mark.slow)
        for d in _BOUNDS
        for x in attention.LOCALITIES
    ],
)
def test_numerics_at_every_scale_of_activations(dtype, locality, form, clamp):
    for scale in (1e-2, 0.1, 1.0, 30.0, 1e3):
        inputs = _of_one_sign(*_random((1, 6, 9, 2, 16), scale=scale, dtype=dtype))
        cotangent = _random((1, 6, 9, 2, 16), seed=1, dtype=dtype)[0]
        out, gradients = _value_and_gradients(
            *inputs, cotangent, locality=locality, clamp=clamp, form=form
        )
        chex.assert_type([out, *gradients], dtype)
        chex.assert_tree_all_finite((out, gradients))
        expected = (
            _definition_with_clamps(*inputs, locality)
            if clamp
            else _definition(*inputs, locality)[0]
        )
        _assert_close(out, expected, _BOUNDS[dtype])


@pytest.mark.parametrize("form", forms.ATTENTION)
@pytest.mark.parametrize(
    ("dtype", "bound"), [("float32", 4e-6), ("bfloat16", 2**-8), ("float16", 2**-11)]
)
def test_sums_over_many_tokens_keep_their_precision(dtype, bound, form):
    """A sum of 4096 terms would stall in bfloat16 at 256 times a term, in float16 overflow."""
    inputs = [jnp.abs(x) + 1 for x in _random((1, 64, 64, 1, 4), dtype=dtype)]
    inputs[1] *= 1000
    out = _linear(*inputs, locality="none", clamp=False, form=form)
    q, k, v = (np.asarray(x, np.float64).reshape(4096, 4) for x in inputs)
    expected = q @ (k.T @ v) / (q @ k.sum(0) + 1e-4)[:, None]
    _assert_close(out, expected.reshape(out.shape), bound)


# The softmax ablation


def _softmax_definition(query, key, value):
    q, k, v = _flat(query), _flat(key), _flat(value)
    scores = q @ k.swapaxes(-1, -2) / math.sqrt(query.shape[-1])
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    return (weights @ v).swapaxes(1, 2).reshape(value.shape)


@pytest.mark.parametrize("grid", _GRIDS)
def test_softmax_is_the_definition(grid):
    inputs = _random((2, *grid, 3, 4), scale=2.0)
    out = jax.jit(attention.softmax_attention)(*inputs)
    chex.assert_equal_shape([out, inputs[2]])
    _assert_close(out, _softmax_definition(*inputs), 2e-6)


def test_softmax_is_float32_in_bfloat16():
    """Measured: 3.4e-3 of the largest output; with scores (up to 79) in bfloat16 it is 3.5e-2."""
    inputs = _random((1, 8, 8, 2, 16), scale=4.0, dtype=jnp.bfloat16)
    out = jax.jit(attention.softmax_attention)(*inputs)
    assert out.dtype == jnp.bfloat16
    _assert_close(out, _softmax_definition(*inputs), 1.5 * 2**-8)


# Refusals


def _shapes(query=(1, 4, 4, 2, 3), key=(1, 4, 4, 2, 3), value=(1, 4, 4, 2, 3)):
    return [jnp.zeros(shape) for shape in (query, key, value)]


@pytest.mark.parametrize(
    "attend",
    [
        attention.vicinity_attention,
        attention.vicinity_attention_quadratic,
        attention.softmax_attention,
    ],
)
@pytest.mark.parametrize(
    "shapes",
    [
        {"query": (1, 16, 2, 3), "key": (1, 16, 2, 3), "value": (1, 16, 2, 3)},
        {"key": (1, 4, 5, 2, 3)},
        {"key": (1, 4, 4, 2, 4)},
        {"value": (1, 4, 4, 1, 3)},
    ],
)
def test_shapes_that_do_not_fit_are_refused(attend, shapes):
    with pytest.raises(ValueError, match=r"must be \[batch, height, width, heads, dim\]"):
        attend(*_shapes(**shapes))


@pytest.mark.parametrize(
    "attend", [attention.vicinity_attention, attention.vicinity_attention_quadratic]
)
def test_unknown_locality_is_refused(attend):
    with pytest.raises(ValueError, match="'2d': it is one of sum, product, 1d, none"):
        attend(*_shapes(), locality="2d")


def test_unknown_form_is_refused():
    with pytest.raises(ValueError, match="'dense': it is one of concatenated, separable"):
        attention.vicinity_attention(*_shapes(), form="dense")
