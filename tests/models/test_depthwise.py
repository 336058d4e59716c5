"""The depthwise convolution: its definition in NumPy, and its two forms against each other."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from vvt_jax.models import forms
from vvt_jax.models.depthwise import depthwise_conv

_GRIDS = [(1, 1), (1, 7), (6, 1), (5, 4), (9, 7)]


def _random(grid, channels=5, dtype=np.float32):
    """Input, kernel and a cotangent of the output."""
    rng = np.random.default_rng(0)
    shapes = ((2, *grid, channels), (3, 3, 1, channels), (2, *grid, channels))
    return [jnp.asarray(rng.standard_normal(shape), dtype) for shape in shapes]


def _definition(x, kernel):
    x, kernel = np.asarray(x, np.float64), np.asarray(kernel, np.float64)
    _, height, width, _ = x.shape
    out = np.zeros_like(x)
    for row in range(height):
        for column in range(width):
            for i in (-1, 0, 1):
                for j in (-1, 0, 1):
                    if 0 <= row + i < height and 0 <= column + j < width:
                        weight = kernel[i + 1, j + 1, 0]
                        out[:, row, column] += x[:, row + i, column + j] * weight
    return out


@functools.partial(jax.jit, static_argnames="form")
def _value_and_gradients(x, kernel, cotangent, *, form):
    out, pull_back = jax.vjp(functools.partial(depthwise_conv, form=form), x, kernel)
    return out, *pull_back(cotangent)


@pytest.mark.parametrize("grid", _GRIDS)
@pytest.mark.parametrize("form", forms.DEPTHWISE)
def test_value_is_the_definition(form, grid):
    x, kernel, _ = _random(grid)
    out = depthwise_conv(x, kernel, form=form)
    chex.assert_equal_shape([out, x])
    np.testing.assert_allclose(out, _definition(x, kernel), atol=5e-6)


@pytest.mark.parametrize("grid", _GRIDS)
def test_forms_agree_in_value_and_gradients(grid):
    inputs = _random(grid)
    shift, grouped = (_value_and_gradients(*inputs, form=form) for form in forms.DEPTHWISE)
    chex.assert_trees_all_equal_shapes_and_dtypes(shift, grouped)
    for ours, theirs in zip(shift, grouped, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("form", forms.DEPTHWISE)
def test_gradients_are_those_of_finite_differences(form):
    x, kernel, _ = _random((3, 4), channels=2)
    convolve = jax.jit(functools.partial(depthwise_conv, form=form))
    check_grads(convolve, (x, kernel), order=1, modes=["rev"], atol=1e-2, rtol=1e-2)


@pytest.mark.parametrize("form", forms.DEPTHWISE)
@pytest.mark.parametrize(("dtype", "rounding"), [("bfloat16", 2**-8), ("float16", 2**-11)])
def test_half_precision_rounds_once(dtype, rounding, form):
    """Sums are float32: measured 3.1e-3 of the largest output in bfloat16, 4.0e-4 in float16."""
    inputs = _random((9, 7), dtype=dtype)
    out, *gradients = _value_and_gradients(*inputs, form=form)
    chex.assert_type([out, *gradients], dtype)
    expected = _definition(*inputs[:2])
    assert np.abs(np.asarray(out, np.float64) - expected).max() <= rounding * np.abs(expected).max()
    exact = _value_and_gradients(*(x.astype(jnp.float32) for x in inputs), form="grouped")
    for gradient, of_float32 in zip(gradients, exact[1:], strict=True):
        error = jnp.abs(gradient.astype(jnp.float32) - of_float32).max()
        assert error <= rounding * jnp.abs(of_float32).max()


def test_form_is_the_chosen_one_unless_given():
    x, kernel, _ = _random((4, 4))

    def trace(form=None):
        return str(jax.make_jaxpr(functools.partial(depthwise_conv, form=form))(x, kernel))

    for form in forms.DEPTHWISE:
        with forms.use(depthwise=form):
            assert trace() == trace(form)
    assert "conv_general_dilated" in trace("grouped")
    assert "conv_general_dilated" not in trace("shift")


def test_unknown_form_is_refused():
    x, kernel, _ = _random((4, 4))
    with pytest.raises(ValueError, match="'dense': it is one of shift, grouped"):
        depthwise_conv(x, kernel, form="dense")
