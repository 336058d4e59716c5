"""One contract for every model: sizes, shapes, dtypes, gradients, options and refusals."""

import functools
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax.traverse_util import flatten_dict, unflatten_dict

import vvt_jax
from vvt_jax.models import VVT
from vvt_jax.models.layers import LayerNorm, OverlapPatchEmbed
from vvt_jax.models.vvt import Block, Stage, unstack_blocks

_QUICK_COMPILE = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
_VARIANTS = vvt_jax.list_models()

# Counted in the published model; nano, of this package only, with 10 classes.
_PARAMETERS = {
    "vvt_nano": 233_682,
    "vvt_tiny": 12_882_440,
    "vvt_small": 25_492_264,
    "vvt_medium": 47_907_304,
    "vvt_large": 61_848_520,
}
_WIDTHS = dict.fromkeys(_VARIANTS, (96, 160, 320, 512)) | {"vvt_nano": (32, 48, 64, 64)}
_DEPTHS = {
    "vvt_nano": (1, 1, 1, 1),
    "vvt_tiny": (2, 2, 2, 2),
    "vvt_small": (3, 3, 9, 3),
    "vvt_medium": (3, 3, 27, 3),
    "vvt_large": (4, 4, 36, 4),
}

# small, medium and large are tiny with other depths, and large has other ratios as well
_TRACED = ["vvt_nano", "vvt_tiny", pytest.param("vvt_large", marks=pytest.mark.slow)]

_jit = functools.partial(jax.jit, compiler_options=_QUICK_COMPILE)


def _images(*shape):
    shape = shape or (2, 33, 40)
    return np.random.default_rng(0).standard_normal((*shape, 3)).astype(np.float32)


@functools.cache
def _abstract_variables(model):
    """Shapes and dtypes; nothing is computed."""
    return jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)))


def _shapes(model):
    """Every parameter's shape, by path."""
    params = flatten_dict(_abstract_variables(model)["params"], sep="/")
    return {path: leaf.shape for path, leaf in params.items()}


def _count(model, under=""):
    return sum(int(np.prod(s)) for path, s in _shapes(model).items() if path.startswith(under))


def _variables(model, seed=0):
    """Drawn as wide as activations need to keep their size: quicker to make than `init`'s, and the
    published clamps act on few values."""
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        name = path[-1].key
        z = rng.standard_normal(leaf.shape, np.float32)
        if name == "scale":
            return jnp.asarray(1 + 0.1 * z)
        if name == "bias":
            return jnp.asarray(0.1 * z)
        inputs = np.prod(leaf.shape[-4:-1] if "conv" in str(path) else leaf.shape[-2:-1])
        inputs = 9 if "depthwise" in str(path) else inputs
        return jnp.asarray(z / np.sqrt(inputs))

    return jax.tree.map_with_path(draw, _abstract_variables(model))


def _nano(**fields):
    return vvt_jax.create_model("vvt_nano", **{"num_classes": 10, **fields})


@functools.cache
def _runner(model):
    """A function of images to logits and maps."""

    @_jit
    def run(variables, images):
        return model.apply(variables, images), model.apply(variables, images, method="features")

    return functools.partial(run, _variables(model))


@functools.cache
def _nano_result(**fields):
    """Logits and maps of a nano with these fields, on one pair of images."""
    return _runner(_nano(**fields))(_images())


# Sizes


def test_every_variant_is_tested():
    assert list(_PARAMETERS) == list(_WIDTHS) == list(_DEPTHS) == _VARIANTS


@pytest.mark.parametrize("name", _VARIANTS)
def test_parameters(name):
    num_classes = 10 if name == "vvt_nano" else 1000
    model = vvt_jax.create_model(name, num_classes=num_classes)
    assert _count(model) == _PARAMETERS[name]


@pytest.mark.parametrize(
    ("name", "stages"),
    [
        ("vvt_tiny", (401_568, 1_193_600, 2_952_960, 7_821_312)),
        ("vvt_large", (476_736, 1_400_800, 45_292_480, 14_165_504)),
    ],
)
def test_parameters_of_stages_and_head(name, stages):
    model = vvt_jax.create_model(name, unroll=False)
    assert tuple(_count(model, f"stage{i}/") for i in (1, 2, 3, 4)) == stages
    assert _count(model, "head/") == 513_000


def test_parameters_of_the_softmax_ablation():
    assert _count(vvt_jax.create_model("vvt_tiny", attention="softmax")) == 12_879_176


@pytest.mark.parametrize(
    ("name", "reduction", "millions"),
    [
        ("vvt_tiny", 1, 14.483),
        ("vvt_tiny", 2, 12.882),
        ("vvt_tiny", 4, 12.082),
        ("vvt_tiny", 8, 11.682),
        ("vvt_large", 1, 71.619),
        ("vvt_large", 2, 61.849),
        ("vvt_large", 4, 56.963),
        ("vvt_large", 8, 54.521),
    ],
)
def test_parameters_under_feature_reduction(name, reduction, millions):
    """Heads are one a stage here, as width must divide by heads times reduction; they have no
    parameters of their own."""
    model = vvt_jax.create_model(
        name, feature_reduction=[reduction] * 4, num_heads=[1] * 4, unroll=False
    )
    assert round(_count(model) / 1e6, 3) == millions


@pytest.mark.parametrize("name", _VARIANTS)
def test_blocks_of_a_stage_are_stacked(name):
    shapes = _shapes(vvt_jax.create_model(name, unroll=False))
    for i, depth in enumerate(_DEPTHS[name], 1):
        stacked = [s for path, s in shapes.items() if path.startswith(f"stage{i}/blocks/")]
        assert len(stacked) == 20
        assert all(shape[0] == depth for shape in stacked)


# Forward


def _abstract_maps(model, *shape):
    images = jax.ShapeDtypeStruct((*shape, 3), jnp.float32)
    apply = functools.partial(model.apply, method="features")
    return jax.eval_shape(apply, _abstract_variables(model), images)


def _abstract_logits(model, *shape):
    images = jax.ShapeDtypeStruct((*shape, 3), jnp.float32)
    return jax.eval_shape(model.apply, _abstract_variables(model), images)


@pytest.mark.parametrize("size", [(33, 32), (45, 70), (224, 160)])
@pytest.mark.parametrize("name", _TRACED)
def test_maps_at_any_size_of_image(name, size):
    maps = _abstract_maps(vvt_jax.create_model(name, unroll=False), 2, *size)
    assert len(maps) == 4
    for stride, width, x in zip((4, 8, 16, 32), _WIDTHS[name], maps, strict=True):
        chex.assert_shape(x, (2, -(-size[0] // stride), -(-size[1] // stride), width))
        chex.assert_type(x, jnp.float32)


@pytest.mark.parametrize("name", _VARIANTS)
def test_logits_of_any_number_of_classes(name):
    model = vvt_jax.create_model(name, num_classes=7, unroll=False)
    logits = _abstract_logits(model, 3, 32, 50)
    chex.assert_shape(logits, (3, 7))
    chex.assert_type(logits, jnp.float32)


@pytest.mark.parametrize("name", _TRACED)
def test_bfloat16_has_float32_parameters_and_logits(name):
    model = vvt_jax.create_model(name, dtype="bfloat16", unroll=False)
    chex.assert_type(jax.tree.leaves(_abstract_variables(model)), jnp.float32)
    chex.assert_type(_abstract_logits(model, 1, 32, 32), jnp.float32)
    chex.assert_type(list(_abstract_maps(model, 1, 32, 32)), jnp.bfloat16)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "dtype"), [*((name, "float32") for name in _VARIANTS), ("vvt_large", "bfloat16")]
)
def test_every_variant_runs(name, dtype):
    """With all its blocks: finite, normalised maps, and images that differ in their logits."""
    model = vvt_jax.create_model(name, dtype=dtype, unroll=False)
    logits, maps = _runner(model)(_images(2, 45, 70))
    chex.assert_shape(logits, (2, 1000))
    chex.assert_tree_all_finite((logits, maps))
    assert jnp.abs(logits[0] - logits[1]).max() > 0.1
    for x in maps:
        assert 0.5 < jnp.std(x.astype(jnp.float32)) < 2


@pytest.mark.slow
def test_model_from_init_runs():
    model = _nano()
    images = _images()
    variables = _jit(model.init)(jax.random.key(0), images)
    assert set(variables) == {"params"}
    logits = _jit(model.apply)(variables, images)
    chex.assert_tree_all_finite(logits)
    assert 0.01 < jnp.std(logits) < 1


@pytest.mark.slow
def test_bfloat16_is_near_float32():
    """Measured: 6e-3 of the largest logit, 8e-3 to 1.2e-2 of the largest value of a map."""
    precise, rounded = _nano_result(), _nano_result(dtype="bfloat16")
    for x, y in zip(jax.tree.leaves(precise), jax.tree.leaves(rounded), strict=True):
        assert jnp.abs(x - y.astype(jnp.float32)).max() < 0.03 * jnp.abs(x).max()


def test_logits_are_the_head_of_the_pooled_last_map():
    model = _nano()
    head = _variables(model)["params"]["head"]
    logits, maps = _nano_result()
    expected = np.asarray(maps[-1]).mean((1, 2)) @ np.asarray(head["kernel"]) + head["bias"]
    np.testing.assert_allclose(logits, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", _TRACED)
def test_no_classes_give_pooled_features(name):
    model = vvt_jax.create_model(name, num_classes=0, unroll=False)
    assert not any(path.startswith("head") for path in _shapes(model))
    pooled = _abstract_logits(model, 2, 32, 64)
    chex.assert_shape(pooled, (2, _WIDTHS[name][-1]))
    chex.assert_type(pooled, jnp.float32)


@pytest.mark.slow
def test_pooled_features_are_the_mean_of_the_last_map():
    pooled, maps = _nano_result(num_classes=0)
    np.testing.assert_allclose(pooled, maps[-1].mean((1, 2)), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "fields",
    [
        {"attention": "softmax"},
        pytest.param({"gate_reduction": 2}, marks=pytest.mark.slow),
        pytest.param({"locality": "product"}, marks=pytest.mark.slow),
        pytest.param({"locality": "1d"}, marks=pytest.mark.slow),
        pytest.param({"locality": "none"}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_options_run_and_change_the_result(fields):
    logits, maps = _nano_result(**fields)
    published, published_maps = _nano_result()
    chex.assert_tree_all_finite((logits, maps))
    chex.assert_trees_all_equal_shapes_and_dtypes(maps, published_maps)
    assert jnp.abs(logits - published).max() > 1e-3


@pytest.mark.slow
def test_clamp_changes_the_result_where_weights_are_small():
    """It hardly acts on weights of this size, but on queries and keys of 1e-4."""
    results = []
    for clamp in (True, False):
        model = _nano(clamp=clamp)
        small = jax.tree.map_with_path(
            lambda path, p: 1e-4 * p if "query" in str(path) or "key']['" in str(path) else p,
            _variables(model),
        )
        results.append(_jit(model.apply)(small, _images()))
    chex.assert_tree_all_finite(results)
    assert jnp.abs(results[0] - results[1]).max() > 1e-2


def test_bands_are_fewer_where_hidden_maps_are_smaller():
    bands = []

    def record(call, args, kwargs, context):
        if isinstance(context.module, Block) and context.method_name == "__call__":
            bands.append(context.module.ffn_bands)
            return args[0], None
        return call(*args, **kwargs)

    model = vvt_jax.create_model("vvt_tiny", ffn_bands=16, unroll=False, depths=(1, 1, 1, 1))
    with nn.intercept_methods(record):
        jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
    # a band's hidden map is as large as 1/16 of stage 1's: 768, 1280/4, 1280/16 and 2048/64 wide
    assert list(dict.fromkeys(bands)) == [16, 7, 2, 1]


@pytest.mark.slow
def test_bands_of_a_model_give_the_same_logits_and_maps():
    whole, bands = _nano_result(), _nano_result(ffn_bands=4)
    chex.assert_trees_all_close(bands, whole, rtol=1e-5, atol=1e-5)


def test_other_strides():
    maps = _abstract_maps(_nano(patch_strides=(2, 2, 2, 1)), 2, 33, 40)
    assert [x.shape[1:3] for x in maps] == [(17, 20), (9, 10), (5, 5), (5, 5)]


def test_examples_of_a_batch_do_not_meet():
    images = _images()
    images[1] += 1
    logits, _ = _runner(_nano())(images)
    before, _ = _nano_result()
    np.testing.assert_allclose(logits[0], before[0], rtol=1e-5, atol=1e-5)
    assert jnp.abs(logits[1] - before[1]).max() > 0.01


# Blocks: stacked, unrolled, scanned, computed again

_BLOCK_FIELDS = {
    "num_heads": 2,
    "mlp_ratio": 2,
    "feature_reduction": 2,
    "gate_reduction": 1,
    "locality": "sum",
    "attention": "vicinity",
    "clamp": False,
}
_LAYOUTS = [
    {"unroll": True, "remat": False},
    {"unroll": False, "remat": False},
    {"unroll": True, "remat": True},
    {"unroll": False, "remat": True},
]


def _stage(depth=2, **layout):
    layout = layout or _LAYOUTS[0]
    return Stage(16, depth, 3, 2, _BLOCK_FIELDS, dtype=jnp.float32, **layout)


@functools.cache
def _stage_inputs():
    x = _images(2, 9, 12)
    shapes = jax.eval_shape(_stage().init, jax.random.key(0), x, None)
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: 0.3 * rng.standard_normal(leaf.shape, np.float32), shapes), x


@functools.cache
def _stage_value_and_gradients(**layout):
    variables, x = _stage_inputs()

    @_jit
    def run(variables, x):
        out, pull_back = jax.vjp(lambda *a: _stage(**layout).apply(*a, None), variables, x)
        return out, pull_back(jnp.cos(jnp.arange(out.size)).reshape(out.shape))

    return run(variables, x)


@pytest.mark.parametrize(
    "layout",
    [*(pytest.param(x, marks=pytest.mark.slow) for x in _LAYOUTS[1:3]), _LAYOUTS[3]],
    ids=str,
)
def test_layouts_of_a_stage_agree_in_value_and_gradients(layout):
    expected = _stage_value_and_gradients(**_LAYOUTS[0])
    actual = _stage_value_and_gradients(**layout)
    chex.assert_trees_all_equal_structs(actual, expected)
    chex.assert_trees_all_close(actual, expected, rtol=1e-4, atol=1e-5)


def _unstacked(variables):
    return {"params": unstack_blocks({"params": {"stage": variables["params"]}})["params"]["stage"]}


@pytest.mark.parametrize("layout", [_LAYOUTS[0], _LAYOUTS[3]], ids=str)
def test_blocks_taken_apart_give_the_same_value_and_gradients(layout):
    variables, x = _stage_inputs()

    @_jit
    def run(variables, x):
        out, pull_back = jax.vjp(lambda *a: _stage(**layout).apply(*a, None), variables, x)
        return out, pull_back(jnp.cos(jnp.arange(out.size)).reshape(out.shape))

    out, (by_variables, by_x) = run(_unstacked(variables), x)
    expected, (stacked, expected_by_x) = _stage_value_and_gradients(**_LAYOUTS[0])
    chex.assert_trees_all_close(
        (out, by_variables, by_x),
        (expected, _unstacked(stacked), expected_by_x),
        rtol=1e-4,
        atol=1e-5,
    )


def test_taking_blocks_apart_leaves_the_rest_as_it_is():
    model = _nano(depths=(1, 2, 1, 1))
    variables = {**_variables(model), "batch_stats": {"mean": np.zeros(3)}}
    apart = unstack_blocks(variables)
    assert apart["batch_stats"] is variables["batch_stats"]
    assert set(apart["params"]["stage2"]) == {"patch_embed", "block0", "block1", "norm"}
    assert "blocks" in variables["params"]["stage2"], "the stacked ones are still whole"
    sizes = [sum(np.size(x) for x in jax.tree.leaves(v["params"])) for v in (apart, variables)]
    assert sizes[0] == sizes[1]


@pytest.mark.parametrize("layout", _LAYOUTS[1:], ids=str)
def test_layouts_of_a_model_have_the_same_parameters(layout):
    model = _nano(depths=(1, 2, 3, 1))
    assert _shapes(model.clone(**layout)) == _shapes(model)


@pytest.mark.slow  # each alone is shown with a stage
@pytest.mark.parametrize("layout", _LAYOUTS[3:], ids=str)
def test_layouts_of_a_model_agree_in_value_and_gradients(layout):
    expected = _nano_gradients(depths=(1, 2, 2, 1), **_LAYOUTS[0])
    actual = _nano_gradients(depths=(1, 2, 2, 1), **layout)
    chex.assert_trees_all_equal_structs(actual, expected)
    for x, y in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(x, y, rtol=0, atol=1e-4 * np.abs(y).max())


@pytest.mark.slow
def test_init_is_the_same_in_every_layout():
    models = [_nano(depths=(1, 2, 2, 1), **layout) for layout in (_LAYOUTS[0], _LAYOUTS[3])]
    one, other = (_jit(m.init)(jax.random.key(3), _images(1, 32, 32)) for m in models)
    chex.assert_trees_all_close(one, other, rtol=1e-6)


def test_slices_of_the_stack_are_the_blocks_one_after_the_other():
    variables, x = _stage_inputs()
    params = variables["params"]

    first, second = (jax.tree.map(lambda p, i=i: p[i], params["blocks"]) for i in (0, 1))
    block = Block(**_BLOCK_FIELDS, dtype=jnp.float32)
    apply_block = _jit(lambda p, x: block.apply({"params": p}, x, None)[0])
    apply_norm = _jit(LayerNorm(epsilon=1e-6).apply)
    embedded = _jit(OverlapPatchEmbed(16, 3, 2).apply)({"params": params["patch_embed"]}, x)
    norm = {"params": params["norm"]}
    after_first = apply_block(first, embedded)
    after_second = apply_block(second, after_first)

    shallow = {**params, "blocks": jax.tree.map(lambda p: p[:1], params["blocks"])}
    out = _jit(_stage(1).apply)({"params": shallow}, x, None)
    np.testing.assert_allclose(out, apply_norm(norm, after_first), rtol=1e-5, atol=1e-5)
    out, _ = _stage_value_and_gradients(**_LAYOUTS[0])
    np.testing.assert_allclose(out, apply_norm(norm, after_second), rtol=1e-5, atol=1e-5)


def test_epsilons_of_the_norms():
    """1e-5 in patch embeddings, 1e-6 elsewhere."""
    epsilons = {}

    def record(call, args, kwargs, context):
        if isinstance(context.module, LayerNorm):
            epsilons["/".join(context.module.path)] = context.module.epsilon
        return call(*args, **kwargs)

    with nn.intercept_methods(record):
        jax.eval_shape(_nano().init, jax.random.key(0), _images())
    assert len(epsilons) == 4 * 4
    for path, epsilon in epsilons.items():
        assert epsilon == (1e-5 if "patch_embed" in path else 1e-6)


# Gradients


@functools.cache
def _nano_gradients(**fields):
    """Loss and its gradients. Without the clamp, whose gradient is zero where it acts."""
    return _gradients(_nano(clamp=False, **fields), _images())


def _gradients(model, images):
    variables = _variables(model)

    @_jit
    def run(variables, images):
        return jax.value_and_grad(lambda v: (model.apply(v, images) ** 2).mean())(variables)

    return run(variables, images)


def _assert_every_tensor_learns(gradients):
    chex.assert_tree_all_finite(gradients)
    for path, gradient in flatten_dict(gradients["params"], sep="/").items():
        blocks = gradient if "blocks/" in path else [gradient]
        for i, block in enumerate(blocks):
            assert jnp.abs(block).max() > 0, f"{path} of block {i} has no gradient"


def test_every_tensor_of_a_stage_has_a_gradient():
    _, (gradients, of_image) = _stage_value_and_gradients(**_LAYOUTS[0])
    _assert_every_tensor_learns(gradients)
    assert (of_image != 0).all()


@pytest.mark.slow
def test_every_tensor_has_a_gradient():
    loss, gradients = _nano_gradients(depths=(1, 2, 1, 1), unroll=False)
    assert jnp.isfinite(loss)
    _assert_every_tensor_learns(gradients)


@pytest.mark.slow
def test_every_tensor_of_the_largest_variant_has_a_gradient():
    model = vvt_jax.create_model("vvt_large", clamp=False, unroll=False)
    _assert_every_tensor_learns(_gradients(model, _images())[1])


@pytest.mark.slow
@pytest.mark.parametrize(
    "fields", [{"attention": "softmax"}, {"dtype": "bfloat16"}, {"gate_reduction": 4}], ids=str
)
def test_every_tensor_has_a_gradient_under_options(fields):
    _assert_every_tensor_learns(_nano_gradients(unroll=False, **fields)[1])


# Reach: through the attention, every output position feels every patch however far.


def _reach(stage, size, *, attends, **fields):
    """How much each position of a stage's map feels each 4×4 patch of the image: `[h, w, rows,
    columns]`. The gate is shut off from its input, as it sees everything too."""
    model = _nano(clamp=False, unroll=False, **fields)
    params = flatten_dict(_variables(model)["params"], sep="/")
    for path, parameter in params.items():
        if "gate_reduce" in path or (not attends and "attention/out/kernel" in path):
            params[path] = jnp.zeros_like(parameter)
    variables = {"params": unflatten_dict(params, sep="/")}
    image = _images(1, *size)

    @_jit
    def run(variables, image):
        def positions(image):
            x = model.apply(variables, image, method="features")[stage - 1][0]
            return x @ jnp.cos(jnp.arange(x.shape[-1]))

        jacobian = jax.jacrev(positions)(image)[:, :, 0]
        h, w = jacobian.shape[:2]
        return jnp.abs(jacobian).reshape(h, w, size[0] // 4, 4, size[1] // 4, 4, 3).sum((3, 5, 6))

    return run(variables, image)


@pytest.mark.parametrize(
    "fields", [{}, pytest.param({"locality": "product"}, marks=pytest.mark.slow)], ids=str
)
def test_every_position_of_the_first_map_feels_every_patch(fields):
    assert (_reach(1, (32, 64), attends=True, **fields) > 0).all()


def test_without_attention_the_first_map_is_local():
    reach = _reach(1, (32, 64), attends=False)
    assert (reach[0, 0, :, 8:] == 0).all()
    assert reach[0, 0, 0, 0] > 0


@pytest.mark.slow
def test_every_position_of_the_last_map_feels_every_patch():
    assert (_reach(4, (32, 512), attends=True) > 0).all()
    assert (_reach(4, (32, 512), attends=False)[0, 0, :, 64:] == 0).all()


# Training: drop path


def test_drop_path_rises_linearly_over_all_blocks():
    rates = []

    def record(call, args, kwargs, context):
        if isinstance(context.module, Stage) and context.method_name == "__call__":
            rates.append(np.asarray(args[1]))
            return args[0]  # the stages themselves are not wanted
        return call(*args, **kwargs)

    model = _nano(drop_path_rate=0.3, depths=(1, 2, 3, 1))
    with nn.intercept_methods(record):
        model.apply({"params": {}}, _images(1, 32, 32), train=True, method="features")
    assert [len(r) for r in rates] == [1, 2, 3, 1]
    np.testing.assert_allclose(np.concatenate(rates), np.linspace(0, 0.3, 7), rtol=1e-6)


def test_drop_path_acts_in_training_alone_and_as_its_key_says():
    model = _nano(drop_path_rate=0.9)
    assert _shapes(model) == _shapes(_nano())
    variables, images = _variables(model), _images()

    @_jit
    def train(key):
        apply = functools.partial(model.apply, variables, images, train=True, rngs={"dropout": key})
        return apply(), apply(method="features")

    still_logits, still_maps = _nano_result()
    one, same, *others = (train(jax.random.key(i)) for i in (0, 0, 1, 2, 3, 4))
    chex.assert_trees_all_equal(one, same)
    for logits, maps in (one, *others):  # the first block is never dropped
        np.testing.assert_allclose(maps[0], still_maps[0], rtol=1e-4, atol=1e-5)
        assert jnp.abs(maps[-1] - still_maps[-1]).max() > 0.1
        assert jnp.abs(logits - still_logits).max() > 0.01
    assert any((one[0] != logits).any() for logits, _ in others)


def test_training_with_drop_path_needs_a_key():
    model = _nano(drop_path_rate=0.5)
    variables = _abstract_variables(model)
    with pytest.raises(Exception, match="dropout"):
        jax.eval_shape(functools.partial(model.apply, train=True), variables, _images())


def test_training_without_drop_path_is_the_same_program():
    model = _nano()
    programs = [
        str(
            jax.make_jaxpr(functools.partial(model.apply, train=train))(
                _variables(model), _images()
            )
        )
        for train in (True, False)
    ]
    assert programs[0] == programs[1]


# Refusals, each in one sentence that names the thing


@pytest.mark.parametrize(
    "shape", [(2, 31, 64, 3), (2, 64, 31, 3), (64, 64, 3), (2, 64, 64, 1), (1, 2, 64, 64, 3)]
)
@pytest.mark.parametrize("method", ["__call__", "features"])
def test_images_that_do_not_fit_are_refused(shape, method):
    model = _nano()
    with pytest.raises(ValueError, match=re.escape(f"32 pixels a side, but are {shape}.")):
        model.apply({"params": {}}, jnp.zeros(shape), method=method)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_heads": (1, 1, 3, 2)}, "stage 3's 64 channels do not divide by 6"),
        ({"feature_reduction": (3, 1, 1, 1)}, "stage 1's 32 channels do not divide by 3"),
        ({"attention": "softmax", "num_heads": (1, 5, 1, 1)}, "stage 2's 48 channels"),
        ({"gate_reduction": 5}, "gate_reduction=5 does not fit: it does not divide"),
        ({"gate_reduction": 0}, "gate_reduction=0 does not fit: it takes a positive"),
        ({"locality": "2d"}, "Unknown locality '2d': it is one of sum, product, 1d, none"),
        ({"attention": "linear"}, "attention='linear' does not fit: it is one of vicinity, soft"),
        ({"dtype": "float16"}, "dtype='float16' does not fit: it is one of float32, bfloat16"),
        ({"depths": (1, 1, 1)}, r"depths=(1, 1, 1) does not fit: it takes four positive"),
        ({"depths": (1, 1, 0, 1)}, "depths=(1, 1, 0, 1) does not fit"),
        ({"embed_dims": (32, 48, 64, 64.0)}, "embed_dims=(32, 48, 64, 64.0) does not fit"),
        ({"mlp_ratios": 4}, "mlp_ratios=4 does not fit: it takes four"),
        ({"patch_strides": "4222"}, "patch_strides='4222' does not fit: it takes four"),
        ({"ffn_bands": 0}, "ffn_bands=0 does not fit: it takes a whole number"),
        ({"ffn_bands": 2.0}, "ffn_bands=2.0 does not fit"),
        ({"drop_path_rate": 1.0}, "drop_path_rate=1.0 does not fit: it is a probability"),
        ({"drop_path_rate": -0.1}, "drop_path_rate=-0.1 does not fit"),
        ({"drop_path_rate": "0.1"}, "drop_path_rate='0.1' does not fit"),
        ({"num_classes": -1}, "num_classes=-1 does not fit: it takes a whole number"),
        ({"num_classes": 2.5}, "num_classes=2.5 does not fit"),
        ({"drop_rate": 0.1}, "no field 'drop_rate'; did you mean 'drop_path_rate'?"),
        ({"zzz": 0.1}, "no field 'zzz': it is one of embed_dims, "),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_wrong_fields_are_refused(fields, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        vvt_jax.create_model("vvt_nano", **fields)


def test_unknown_model_is_refused_with_the_nearest_name():
    with pytest.raises(ValueError, match=r"Unknown model 'vvt_tny'; did you mean 'vvt_tiny'\?"):
        vvt_jax.create_model("vvt_tny")
    with pytest.raises(ValueError, match="'resnet': it is one of vvt_nano, vvt_tiny"):
        vvt_jax.create_model("resnet")


def test_lists_are_taken_for_tuples():
    model = vvt_jax.create_model("vvt_nano", depths=[1, 2, 1, 1])
    assert model.depths == (1, 2, 1, 1)
    assert model == VVT(**{**vvt_jax.models.VARIANTS["vvt_nano"], "depths": (1, 2, 1, 1)})
