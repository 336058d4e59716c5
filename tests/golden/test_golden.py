"""The whole model against figures of the published one; README.md says how they were made."""

import functools
import itertools
import json
import pathlib
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import vvt_jax
from vvt_jax import convert
from vvt_jax.models import forms

_FOLDER = pathlib.Path(__file__).parent
_GOLDEN = dict(np.load(_FOLDER / "golden.npz"))
_CASES = json.loads(bytes(_GOLDEN["meta"]))
_NAMES_AND_SHAPES = json.loads((_FOLDER / "checkpoint_names_and_shapes.json").read_text())
_PLATFORM_FORMS = [("shift", "separable"), ("grouped", "concatenated")]
_DEFAULT_MICRO = ("micro_70x45_fr4", ("shift", "separable"))
_QUICK_COMPILE = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


def _published_tensor(name, shape, gain):
    z = np.random.default_rng([0, zlib.crc32(name.encode())]).standard_normal(shape)
    is_bias = name.endswith("bias")
    if "norm" in name:
        z = 0.1 * z if is_bias else 1 + 0.1 * z
    elif is_bias:
        z *= 0.05 * gain
    else:
        z *= gain / np.sqrt(np.prod(shape[1:]))
    return z.astype(np.float32)


def _zeros(model):
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
    return jax.tree.map(lambda leaf: np.broadcast_to(np.float32(0), leaf.shape), shapes)


@functools.cache
def _case(name):
    """Model, variables and images of a golden case."""
    case = _CASES[name]
    model = vvt_jax.create_model(
        "vvt_tiny",
        embed_dims=case["dims"],
        num_heads=case["heads"],
        depths=case["depths"],
        mlp_ratios=case["mlp_ratios"],
        feature_reduction=case["fr_ratios"],
        num_classes=case["classes"],
    )
    state_dict = {
        name: _published_tensor(name, zeros.shape, case["gain"])
        for name, zeros in convert.to_pytorch(_zeros(model), model).items()
    }
    images = np.random.default_rng([0, 7]).standard_normal(case["image_shape"]).astype(np.float32)
    return model, convert.from_pytorch(state_dict, model), images


def _assert_golden(case, depthwise, attention, *, compiler_options=None, **fields):
    model, variables, images = _case(case)
    model = model.clone(**fields)

    @functools.partial(jax.jit, compiler_options=compiler_options)
    def run(variables, images):
        maps = model.apply(variables, images, method="features")
        means = [(x.mean((1, 2)), x.mean(3)) for x in maps]
        return model.apply(variables, images), means

    with forms.use(depthwise=depthwise, attention=attention):
        logits, means = run(variables, images)
    near = functools.partial(np.testing.assert_allclose, rtol=0, atol=1e-5)
    near(logits, _GOLDEN[f"{case}/logits"])
    for stage, (channel_mean, pixel_mean) in enumerate(means, 1):
        near(channel_mean, _GOLDEN[f"{case}/map{stage}_channel_mean"])
        near(pixel_mean, _GOLDEN[f"{case}/map{stage}_pixel_mean"])


def test_every_case_is_tested():
    assert set(_CASES) == {
        "micro_64",
        "micro_70x45_fr4",
        "tiny_224",
        "tiny_160x96_small_gain",
        "small_128",
    }


_MICRO = [
    pytest.param(
        case,
        *pair,
        marks=() if (case, pair) == _DEFAULT_MICRO else pytest.mark.slow,
    )
    for case in ("micro_64", "micro_70x45_fr4")
    for pair in itertools.product(forms.DEPTHWISE, forms.ATTENTION)
]


@pytest.mark.parametrize(("case", "depthwise", "attention"), _MICRO)
def test_micro_cases_in_every_form(case, depthwise, attention):
    _assert_golden(case, depthwise, attention, compiler_options=_QUICK_COMPILE)


def test_tiny_where_the_clamps_act():
    case = "tiny_160x96_small_gain"
    _assert_golden(case, "grouped", "concatenated", compiler_options=_QUICK_COMPILE, unroll=False)


@pytest.mark.slow
@pytest.mark.parametrize(("depthwise", "attention"), _PLATFORM_FORMS)
@pytest.mark.parametrize("case", ["tiny_224", "tiny_160x96_small_gain", "small_128"])
def test_published_sizes(case, depthwise, attention, request):
    options = _QUICK_COMPILE
    if case == "tiny_224":  # one as it is compiled for use
        options = None
        request.getfixturevalue("optimized")
    _assert_golden(case, depthwise, attention, compiler_options=options)


@pytest.mark.parametrize("name", _NAMES_AND_SHAPES)
def test_names_shapes_and_order_are_the_published_ones(name):
    model = vvt_jax.create_model(name, unroll=False)
    ours = [(k, list(v.shape)) for k, v in convert.to_pytorch(_zeros(model), model).items()]
    assert ours == list(_NAMES_AND_SHAPES[name].items())


def test_names_of_all_published_sizes_are_tested():
    assert set(_NAMES_AND_SHAPES) == set(vvt_jax.list_models()) - {"vvt_nano"}
