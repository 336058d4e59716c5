"""The segmenters: their parts against plain forms, the contract of their outputs, printed costs."""

import functools
import json
import os
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import fork_server
from tests.conftest import draw_variables
from vvt_jax.models import counting, create_model, create_segmenter
from vvt_jax.models.segmenter import HEADS, adaptive_average, resize_bilinear
from vvt_jax.models.shapes import variable_shapes

# (parameters, printed M, printed G of multiply-adds at 512²); the paper's table on ADE20K
_PRINTED = {
    ("vvt_small", "fpn"): (29_262_294, 29.2, 50.9),
    ("vvt_medium", "fpn"): (51_677_334, 51.7, 70.8),
    ("vvt_large", "fpn"): (65_618_550, 65.5, 78.1),
    ("vvt_small", "upernet"): (55_499_884, 55.5, 240),
    ("vvt_medium", "upernet"): (77_914_924, 77.9, 260),
    ("vvt_large", "upernet"): (91_856_140, 91.9, 267),
}


@functools.cache
def _made(head, **fields):
    """A small segmenter with 5 classes, its variables and compiled forward pass."""
    model = create_segmenter("vvt_nano", head=head, num_classes=5, head_channels=16, **fields)
    return model, draw_variables(model), jax.jit(model.apply)


def _images(batch, height, width):
    return jax.random.normal(jax.random.key(1), (batch, height, width, 3))


@pytest.mark.parametrize("size", [(3, 5), (12, 20), (6, 15), (7, 9)])
def test_resize_is_the_general_bilinear_form(size):
    x = _images(2, 3, 5)
    expected = jax.image.resize(x, (2, *size, 3), "bilinear", antialias=False)
    np.testing.assert_allclose(resize_bilinear(x, size), expected, atol=1e-6)


@pytest.mark.parametrize(("side", "bins"), [(6, 3), (7, 3), (5, 6), (1, 2)])
def test_adaptive_average_is_the_mean_of_each_window(side, bins):
    x = np.asarray(_images(2, side, 4))
    for q in range(bins):
        rows = slice(q * side // bins, int(np.ceil((q + 1) * side / bins)))
        for p in range(bins):
            columns = slice(p * 4 // bins, int(np.ceil((p + 1) * 4 / bins)))
            np.testing.assert_allclose(
                adaptive_average(x, bins)[:, q, p], x[:, rows, columns].mean((1, 2)), atol=1e-6
            )


@pytest.mark.parametrize(
    ("head", "size"),
    [("fpn", (50, 37)), pytest.param("upernet", (37, 50), marks=pytest.mark.slow)],
)
def test_logits_have_the_images_size(head, size):
    _, variables, apply = _made(head)
    logits = apply(variables, _images(2, *size))
    assert logits.shape == (2, *size, 5)
    assert logits.dtype == jnp.float32
    assert np.isfinite(logits).all()


@pytest.mark.slow
@pytest.mark.parametrize("head", HEADS)
def test_training_gives_auxiliary_logits_and_new_statistics(head):
    model, variables, _ = _made(head)
    before = variables["batch_stats"]
    (logits, auxiliary), changed = jax.jit(
        functools.partial(model.apply, train=True, mutable=["batch_stats"])
    )(variables, _images(2, 32, 32), rngs={"dropout": jax.random.key(2)})
    assert logits.shape == (2, 32, 32, 5)
    assert (auxiliary is None) == (head == "fpn")
    if auxiliary is not None:
        assert auxiliary.shape == logits.shape
        assert auxiliary.dtype == jnp.float32
    assert ("auxiliary" in before) == (head == "upernet")
    moved = jax.tree.map(lambda a, b: bool((a != b).any()), before, changed["batch_stats"])
    assert all(jax.tree.leaves(moved))


@pytest.mark.slow
def test_bfloat16_gives_float32_logits_near_those_of_float32():
    _, variables, apply = _made("upernet")
    model = _made("upernet")[0].clone(dtype="bfloat16")
    images = _images(1, 32, 32)
    logits = jax.jit(model.apply)(variables, images)
    assert logits.dtype == jnp.float32
    np.testing.assert_allclose(logits, apply(variables, images), atol=0.02)


def test_the_backbone_has_the_classifiers_names_and_maps():
    model, variables, _ = _made("fpn")
    classifier = create_model("vvt_nano", num_classes=0)
    backbone = {k: v for k, v in variables["params"].items() if k.startswith("stage")}
    expected = {k: s for k, s in variable_shapes(model).items() if k.startswith("params/stage")}
    assert variable_shapes(classifier) == expected
    images = _images(1, 32, 32)
    for ours, theirs in zip(
        jax.jit(functools.partial(model.apply, method="features"))(variables, images),
        jax.jit(functools.partial(classifier.apply, method="features"))(
            {"params": backbone}, images
        ),
        strict=True,
    ):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize(("name", "head"), _PRINTED)
def test_parameters_are_those_printed(name, head):
    parameters, printed, _ = _PRINTED[name, head]
    counted = counting.parameter_count(create_segmenter(name, head=head))
    assert counted == parameters
    # All agree to the printed digit but Semantic FPN's small (29.26) and large (65.62)
    assert abs(counted / 1e6 - printed) < (0.12 if head == "fpn" else 0.05)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "head"), _PRINTED)
def test_multiply_adds_are_those_printed_within_two_percent(name, head):
    layers = counting.count(create_segmenter(name, head=head), 512, 512)
    printed = _PRINTED[name, head][2]
    assert sum(x.published for x in layers) / 1e9 == pytest.approx(printed, rel=0.02)


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"head": "unet"}, "head='unet' does not fit"),
        ({"num_classes": 256}, "num_classes=256 does not fit"),
        ({"num_classes": 0}, "at least one class"),
        ({"dropout": 1.0}, "dropout=1.0 does not fit"),
        ({"depth": 3}, "did you mean 'depths'"),
    ],
)
def test_fields_that_do_not_fit_are_refused(fields, told):
    with pytest.raises(ValueError, match=told):
        create_segmenter("vvt_nano", **fields)


def test_an_unknown_backbone_is_refused_with_the_nearest():
    with pytest.raises(ValueError, match="did you mean 'vvt_small'"):
        create_segmenter("vvt_smal")


_STATISTICS = """
    import json, jax, numpy as np
    from vvt_jax.distributed import sharding
    from vvt_jax.models.segmenter import ConvNormRelu

    layer = ConvNormRelu(4, 3, dtype="float32")
    x = np.random.default_rng(0).normal(size=(8, 16, 4, 3)).astype(np.float32)
    x += np.arange(8)[:, None, None, None]  # no device's own statistics are those of all
    variables = jax.jit(lambda: layer.init(jax.random.key(0), x, train=True))()

    def run(data, spatial):
        mesh = sharding.make_mesh({"data": data, "fsdp": 1, "spatial": spatial}, 8,
                                  devices=jax.devices()[: data * spatial])
        (batch,) = sharding.to_devices([{"image": x}], mesh)
        step = jax.jit(lambda v, x: layer.apply(v, x, train=True, mutable=["batch_stats"]))
        out, changed = step(variables, batch["image"])
        return [np.asarray(leaf) for leaf in jax.tree.leaves((out, changed))]

    one = run(1, 1)
    told = {
        str(sizes): max(float(np.abs(a - b).max()) for a, b in zip(one, run(*sizes), strict=True))
        for sizes in ((8, 1), (4, 2))
    }
    print(json.dumps({"devices": jax.device_count(), "differ": told}))
"""


@pytest.mark.slow
def test_batch_norm_is_that_of_the_whole_batch_on_eight_devices():
    environment = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=8"}
    done = fork_server.run(
        ["-c", textwrap.dedent(_STATISTICS)], environment, warnings_are_errors=True
    )
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["devices"] == 8
    assert max(told["differ"].values()) < 1e-5, told


_SPATIAL = """
    import json, jax, jax.numpy as jnp, numpy as np
    from vvt_jax import create_segmenter
    from vvt_jax.distributed import sharding

    told = {}
    for head in ("fpn", "upernet"):
        model = create_segmenter(
            "vvt_nano", head=head, head_channels=8, num_classes=5, embed_dims=(8, 8, 8, 8),
            num_heads=(1, 1, 1, 1),
        )
        options = {"xla_backend_optimization_level": 0}
        init = jax.jit(lambda: model.init(jax.random.key(0), jnp.zeros((1, 32, 32, 3))),
                       compiler_options=options)
        variables = jax.device_get(init())
        x = np.random.default_rng(0).normal(size=(1, 256, 64, 3)).astype(np.float32)
        outs = []
        for devices in (1, 4):
            mesh = sharding.make_mesh({"data": 1, "fsdp": 1, "spatial": devices}, 1, height=256,
                                      devices=jax.devices()[:devices])
            (batch,) = sharding.to_devices([{"image": x}], mesh)
            apply = jax.jit(model.apply, compiler_options=options)
            outs.append(np.asarray(apply(variables, batch["image"])))
        told[head] = [float(np.abs(outs[0] - outs[1]).max()), float(outs[0].std())]
    print(json.dumps(told))
"""


@pytest.mark.slow
def test_devices_that_share_an_images_rows_give_the_same_logits():
    environment = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=4"}
    done = fork_server.run(["-c", textwrap.dedent(_SPATIAL)], environment, warnings_are_errors=True)
    assert done.returncode == 0, done.stderr
    for head, (differ, spread) in json.loads(done.stdout).items():
        assert differ < 1e-4 * spread, head
