"""The layers: their formulas in NumPy, their sizes, and how they begin."""

import functools
import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax.traverse_util import flatten_dict

from vvt_jax import attention
from vvt_jax.models import forms, layers
from vvt_jax.models.vvt import Stage

_QUICK_COMPILE = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


def _images(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def _shapes(module, x, *args):
    """`{path: shape}` of a layer's parameters."""
    params = jax.eval_shape(module.init, jax.random.key(0), x, *args)["params"]
    return {path: leaf.shape for path, leaf in flatten_dict(params, sep="/").items()}


def _random_variables(module, x, *args, scale=0.3):
    shapes = jax.eval_shape(module.init, jax.random.key(0), x, *args)
    rng = np.random.default_rng(1)
    return jax.tree.map(
        lambda leaf: jnp.asarray(scale * rng.standard_normal(leaf.shape), leaf.dtype), shapes
    )


def _apply(module, variables, *args):
    return jax.jit(module.apply, compiler_options=_QUICK_COMPILE)(variables, *args)


def _init(module, *args):
    params = jax.jit(module.init, compiler_options=_QUICK_COMPILE)(jax.random.key(0), *args)
    return flatten_dict(params["params"], sep="/")


def _vicinity(**fields):
    defaults = {
        "num_heads": 2,
        "feature_reduction": 2,
        "gate_reduction": 1,
        "locality": "sum",
        "clamp": False,
    }
    return layers.VicinityAttention(**{**defaults, **fields})


# Functions with a backward pass of their own


def _value_and_gradients(function, *inputs):
    """Value and, for a cotangent that differs everywhere, the gradient by each input, float32."""

    @functools.partial(jax.jit, compiler_options=_QUICK_COMPILE)
    def run(*inputs):
        out, pull_back = jax.vjp(function, *inputs)
        return out, pull_back(jnp.cos(jnp.arange(out.size)).reshape(out.shape).astype(out.dtype))

    return jax.tree.map(lambda x: np.asarray(x, np.float32), run(*inputs))


@pytest.mark.parametrize(("dtype", "bound"), [("float32", 1e-6), ("bfloat16", 2**-7)])
def test_gelu_is_jax_s_exact_one(dtype, bound):
    x = jnp.linspace(-12, 12, 999, dtype=dtype)
    value, (gradient,) = _value_and_gradients(layers.gelu, x)
    expected, (expected_gradient,) = _value_and_gradients(
        lambda x: jax.nn.gelu(x.astype(jnp.float32), approximate=False).astype(x.dtype), x
    )
    np.testing.assert_allclose(value, expected, rtol=bound, atol=bound)
    np.testing.assert_allclose(gradient, expected_gradient, rtol=bound, atol=bound)


@pytest.mark.parametrize(("dtype", "bound"), [("float32", 1e-5), ("bfloat16", 2e-2)])
def test_gelu_and_product_in_one(dtype, bound):
    x, kernel = _images(2, 3, 4, 6).astype(dtype), _images(6, 5, seed=1).astype(dtype)
    actual = _value_and_gradients(layers.gelu_matmul, x, kernel)
    expected = _value_and_gradients(lambda x, kernel: layers.gelu(x) @ kernel, x, kernel)
    for one, other in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, other, rtol=bound, atol=bound * np.abs(other).max())


@pytest.mark.parametrize("gelu", forms.GELU)
def test_forms_of_the_feed_forward_network_agree(gelu):
    x = _images(2, 5, 4, 8)
    module = layers.ConvFeedForward(hidden=16)
    variables = _random_variables(module, x)
    with forms.use(gelu="kept"):
        expected = _value_and_gradients(module.apply, variables, x)
    with forms.use(gelu=gelu):
        actual = _value_and_gradients(module.apply, variables, x)
    chex.assert_trees_all_close(actual, expected, rtol=1e-5, atol=1e-5)


def test_gelu_is_finite_everywhere():
    x = jnp.asarray([-3e38, -1e4, 0.0, 1e4, 3e38], jnp.float32)
    value, (gradient,) = _value_and_gradients(lambda x: layers.gelu(x) / 1e4, x)
    np.testing.assert_allclose(value, np.maximum(x, 0) / 1e4, rtol=1e-6)
    assert np.isfinite(gradient).all()


@pytest.mark.parametrize(("dtype", "bound"), [("float32", 2e-5), ("bfloat16", 2e-2)])
@pytest.mark.parametrize("epsilon", [1e-5, 1e-6])
def test_layer_norm_is_flax_s(dtype, bound, epsilon):
    x = (3 + 2 * _images(2, 3, 5, 24)).astype(dtype)
    scale, bias = 1 + 0.3 * _images(24, seed=1), _images(24, seed=2)

    def flax_norm(x, scale, bias):
        module = nn.LayerNorm(epsilon=epsilon, dtype=x.dtype)
        return module.apply({"params": {"scale": scale, "bias": bias}}, x)

    actual = _value_and_gradients(lambda *a: layers.layer_norm(*a, epsilon), x, scale, bias)
    expected = _value_and_gradients(flax_norm, x, scale, bias)
    for one, other in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, other, rtol=bound, atol=bound * np.abs(other).max())


def test_layer_norm_of_equal_channels_is_its_bias():
    x = jnp.full((2, 4, 8), 5.0)
    value, gradients = _value_and_gradients(
        lambda x, s, b: layers.layer_norm(x, s, b, 1e-6), x, jnp.ones(8), jnp.arange(8.0)
    )
    np.testing.assert_allclose(value, np.broadcast_to(np.arange(8), x.shape), atol=1e-5)
    assert all(np.isfinite(gradient).all() for gradient in gradients)


# Attention


@pytest.mark.parametrize("gate_reduction", [1, 4])
def test_vicinity_layer_is_reduced_attention_gated_by_the_mean_of_its_input(gate_reduction):
    module = _vicinity(gate_reduction=gate_reduction)
    x = _images(2, 3, 5, 16) + 0.5
    variables = _random_variables(module, x)
    p = jax.tree.map(np.asarray, variables["params"])

    query, key, value = (
        (x @ p[name]["kernel"] + p[name]["bias"]).reshape(2, 3, 5, 2, 4)
        for name in ("query", "key", "value")
    )
    out = attention.vicinity_attention_quadratic(query, key, value).reshape(2, 3, 5, 8)
    out = np.asarray(out) @ p["out"]["kernel"] + p["out"]["bias"]
    hidden = np.maximum(np.asarray(x).mean((1, 2)) @ p["gate_reduce"]["kernel"], 0)
    gate = 1 / (1 + np.exp(-hidden @ p["gate_expand"]["kernel"]))
    expected = out + out * gate[:, None, None]
    np.testing.assert_allclose(_apply(module, variables, x), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("feature_reduction", [1, 2, 4])
@pytest.mark.parametrize("gate_reduction", [1, 2])
def test_widths_under_feature_and_gate_reduction(feature_reduction, gate_reduction):
    module = _vicinity(feature_reduction=feature_reduction, gate_reduction=gate_reduction)
    reduced, hidden = 16 // feature_reduction, 16 // gate_reduction
    assert _shapes(module, _images(1, 4, 4, 16)) == {
        "query/kernel": (16, reduced),
        "query/bias": (reduced,),
        "key/kernel": (16, reduced),
        "key/bias": (reduced,),
        "value/kernel": (16, reduced),
        "value/bias": (reduced,),
        "out/kernel": (reduced, 16),
        "out/bias": (16,),
        "gate_reduce/kernel": (16, hidden),
        "gate_expand/kernel": (hidden, 16),
    }


def test_published_clamp_acts_on_projection_and_gated_output():
    module = _vicinity(clamp=True)
    x = _images(1, 4, 4, 16)
    tiny = jax.tree.map(lambda p: 1e-6 * p, _random_variables(module, x))
    np.testing.assert_allclose(jnp.abs(_apply(module, tiny, x)), 1.5e-4, rtol=1e-3)
    free = _apply(_vicinity(clamp=False), tiny, x)
    assert jnp.abs(free).max() < 1e-5


def test_softmax_layer_is_attention_of_full_width_without_biases():
    module = layers.SoftmaxAttention(num_heads=2)
    x = _images(2, 3, 5, 8)
    variables = _random_variables(module, x)
    p = variables["params"]
    assert set(flatten_dict(p, sep="/")) == {
        "query/kernel",
        "key/kernel",
        "value/kernel",
        "out/kernel",
        "out/bias",
    }
    projected = (
        (x @ p[name]["kernel"]).reshape(2, 3, 5, 2, 4) for name in ("query", "key", "value")
    )
    out = attention.softmax_attention(*projected).reshape(x.shape)
    expected = out @ p["out"]["kernel"] + p["out"]["bias"]
    np.testing.assert_allclose(_apply(module, variables, x), expected, rtol=1e-5, atol=1e-5)


# Feed-forward network


def test_feed_forward_is_linear_depthwise_exact_gelu_linear():
    module = layers.ConvFeedForward(hidden=12)
    x = _images(2, 4, 3, 6)
    variables = _random_variables(module, x)
    p = jax.tree.map(lambda a: np.asarray(a, np.float64), variables["params"])

    hidden = np.asarray(x, np.float64) @ p["fc1"]["kernel"] + p["fc1"]["bias"]
    padded = np.pad(hidden, ((0, 0), (1, 1), (1, 1), (0, 0)))
    kernel = p["depthwise"]["kernel"]
    hidden = p["depthwise"]["bias"] + sum(
        padded[:, i : i + 4, j : j + 3] * kernel[i, j, 0] for i in range(3) for j in range(3)
    )
    gelu = hidden * 0.5 * (1 + np.vectorize(math.erf)(hidden / math.sqrt(2)))
    expected = gelu @ p["fc2"]["kernel"] + p["fc2"]["bias"]
    np.testing.assert_allclose(_apply(module, variables, x), expected, atol=1e-5)


@pytest.mark.parametrize(
    ("height", "bands", "groups", "depthwise"),
    [
        (9, 4, 1, "shift"),
        (3, 8, 1, "shift"),
        (12, 2, 3, "grouped"),
        pytest.param(8, 4, 1, "grouped", marks=pytest.mark.slow),
        pytest.param(10, 2, 4, "grouped", marks=pytest.mark.slow),
        pytest.param(12, 3, 2, "shift", marks=pytest.mark.slow),
    ],
)
def test_bands_of_rows_give_the_same_value_and_gradients(height, bands, groups, depthwise):
    """Of any height, and cut within the rows that each of several devices would hold."""
    x = _images(2, height, 3, 4)
    whole, cut = (layers.ConvFeedForward(hidden=8, bands=n) for n in (1, bands))
    variables = _random_variables(whole, x)
    chex.assert_trees_all_equal_shapes(_random_variables(cut, x), variables)
    expected = _value_and_gradients(whole.apply, variables, x)
    with forms.compiling_for("cpu", spatial=groups), forms.use(depthwise=depthwise):
        actual = _value_and_gradients(cut.apply, variables, x)
    chex.assert_trees_all_close(actual, expected, rtol=1e-5, atol=1e-5)


def test_bands_never_make_the_whole_hidden_map():
    """In either pass: one whole map would take more than all temporaries do."""
    x = jax.ShapeDtypeStruct((1, 512, 64, 8), jnp.float32)
    temporaries = []
    for bands in (1, 64):
        module = layers.ConvFeedForward(hidden=64, bands=bands)
        variables = jax.eval_shape(module.init, jax.random.key(0), x)
        gradient = jax.grad(lambda *a, module=module: jnp.square(module.apply(*a)).sum(), (0, 1))
        compiled = jax.jit(gradient).lower(variables, x).compile()
        temporaries.append(compiled.memory_analysis().temp_size_in_bytes)
    hidden_map = 4 * 512 * 64 * 64
    assert temporaries[0] > 2 * hidden_map
    assert temporaries[1] < hidden_map


# Drop path


class _Dropping(nn.Module):
    @nn.compact
    def __call__(self, x, rate):
        return layers.drop_path(self, x, rate)


@jax.jit
def _dropped(x, rate, key):
    return _Dropping().apply({}, x, rate, rngs={"dropout": key})


def test_no_rate_is_the_identity_and_needs_no_key():
    x = _images(3, 2, 2, 4)
    assert _Dropping().apply({}, x, None) is x


def test_rate_zero_is_the_identity():
    x = _images(64, 2, 2, 4)
    np.testing.assert_array_equal(_dropped(x, jnp.float32(0), jax.random.key(0)), x)


def test_whole_examples_are_dropped_and_survivors_scaled():
    x = _images(200, 2, 3, 4)
    out = _dropped(x, jnp.float32(0.75), jax.random.key(0))
    dropped = (out == 0).all((1, 2, 3))
    assert 120 < dropped.sum() < 180  # 150 ± 6
    np.testing.assert_allclose(out[~dropped], 4 * x[~dropped], rtol=1e-6)


@pytest.mark.parametrize("rate", [0.1, 0.5])
def test_mean_is_preserved(rate):
    x = jnp.ones((20_000, 1, 1, 1))
    mean = _dropped(x, jnp.float32(rate), jax.random.key(1)).mean()
    deviation = math.sqrt(rate / (1 - rate) / 20_000)
    assert abs(mean - 1) < 4 * deviation


def test_key_decides():
    x = _images(64, 1, 1, 2)
    one, same, other = (_dropped(x, jnp.float32(0.5), jax.random.key(i)) for i in (0, 0, 1))
    np.testing.assert_array_equal(one, same)
    assert (one != other).any()


def test_rate_without_a_key_is_refused():
    with pytest.raises(Exception, match="dropout"):
        _Dropping().apply({}, _images(2, 1, 1, 2), jnp.float32(0.5))


def test_dtype_stays():
    x = _images(8, 1, 1, 2).astype(jnp.bfloat16)
    assert _dropped(x, jnp.float32(0.5), jax.random.key(0)).dtype == jnp.bfloat16


# Patch embedding


@pytest.mark.parametrize(("kernel_size", "stride"), [(7, 4), (7, 2), (3, 2), (3, 1)])
def test_patch_embedding_rounds_sizes_up(kernel_size, stride):
    module = layers.OverlapPatchEmbed(8, kernel_size, stride)
    for height in range(32, 42):
        shape = jax.eval_shape(
            lambda x: module.init_with_output(jax.random.key(0), x)[0],
            jnp.zeros((2, height, 45, 3)),
        ).shape
        # the published model's arithmetic: floor((size + 2 padding - kernel) / stride) + 1
        published = [(n + 2 * (kernel_size // 2) - kernel_size) // stride + 1 for n in (height, 45)]
        assert shape == (2, *published, 8) == (2, -(-height // stride), -(-45 // stride), 8)


def test_patch_embedding_is_a_centred_window_and_layer_norm_of_epsilon_1e_5():
    module = layers.OverlapPatchEmbed(4, 3, 2)
    x = _images(1, 6, 5, 2)
    variables = _random_variables(module, x, scale=0.01)  # variances near epsilon
    p = jax.tree.map(lambda a: np.asarray(a, np.float64), variables["params"])
    padded = np.pad(np.asarray(x, np.float64), ((0, 0), (1, 1), (1, 1), (0, 0)))
    expected = np.empty((1, 3, 3, 4))
    for row in range(3):
        for column in range(3):
            window = padded[0, 2 * row : 2 * row + 3, 2 * column : 2 * column + 3]
            expected[0, row, column] = np.einsum("ijc,ijcf->f", window, p["conv"]["kernel"])
    expected += p["conv"]["bias"]
    expected -= expected.mean(-1, keepdims=True)
    expected /= np.sqrt((expected**2).mean(-1, keepdims=True) + 1e-5)
    expected = expected * p["norm"]["scale"] + p["norm"]["bias"]
    np.testing.assert_allclose(_apply(module, variables, x), expected, atol=1e-6)


# How parameters begin


def _deviation(parameter):
    parameter = np.asarray(parameter)
    assert abs(np.mean(parameter)) < 4 * np.std(parameter) / math.sqrt(parameter.size)
    return pytest.approx(np.std(parameter), rel=0.05)


@pytest.mark.parametrize(
    ("module", "inputs", "linear"),
    [
        (
            _vicinity(),
            128,
            ["query", "key", "value", "out", "gate_reduce", "gate_expand"],
        ),
        (layers.SoftmaxAttention(2), 128, ["query", "key", "value", "out"]),
        (layers.ConvFeedForward(256), 128, ["fc1", "fc2"]),
    ],
)
def test_linear_layers_begin_normal_with_deviation_0_02(module, inputs, linear):
    params = _init(module, _images(1, 4, 4, inputs))
    for name in linear:
        kernel = np.asarray(params[f"{name}/kernel"])
        assert _deviation(kernel) == 0.02
        assert np.abs(kernel).max() > 0.06  # not cut at two deviations
    _assert_biases_zero_and_scales_one(params)


def test_convolutions_begin_with_deviation_of_their_fan_out():
    params = _init(layers.OverlapPatchEmbed(64, 7, 4), _images(1, 32, 32, 3))
    assert _deviation(params["conv/kernel"]) == math.sqrt(2 / (7 * 7 * 64))
    _assert_biases_zero_and_scales_one(params)
    params = _init(layers.DepthwiseConv(), _images(1, 4, 4, 1024))
    assert _deviation(params["kernel"]) == math.sqrt(2 / 9)
    _assert_biases_zero_and_scales_one(params)


def test_every_block_of_a_stack_begins_differently_and_alike_in_deviation():
    fields = {
        "num_heads": 2,
        "mlp_ratio": 4,
        "feature_reduction": 2,
        "gate_reduction": 1,
        "locality": "sum",
        "attention": "vicinity",
        "clamp": True,
    }
    stage = Stage(64, 3, 3, 2, fields, remat=False, unroll=False, dtype=jnp.float32)
    params = _init(stage, _images(1, 8, 8, 16), None)
    for name, deviation in (
        ("feed_forward/fc1", 0.02),
        ("attention/gate_reduce", 0.02),
        ("feed_forward/depthwise", math.sqrt(2 / 9)),
    ):
        stack = params[f"blocks/{name}/kernel"]
        for kernel in stack:
            assert _deviation(kernel) == deviation
        chex.assert_axis_dimension(stack, 0, 3)
        assert np.abs(np.corrcoef(np.reshape(stack, (3, -1))) - np.eye(3)).max() < 0.1
    _assert_biases_zero_and_scales_one(params)


def _assert_biases_zero_and_scales_one(params):
    for path, parameter in params.items():
        if path.endswith("bias"):
            assert (parameter == 0).all()
        if path.endswith("scale"):
            assert (parameter == 1).all()
