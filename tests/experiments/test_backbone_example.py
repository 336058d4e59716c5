"""The documented example of another head on the backbone: short, and it works."""

import inspect

import jax
import jax.numpy as jnp

import vvt_jax
from experiments import backbone


def test_a_detectors_pyramid_takes_under_40_lines():
    source = inspect.getsource(backbone)
    body = source.partition("# example: begin")[2].partition("# example: end")[0]
    assert 10 < len(body.strip().splitlines()) < 40


def test_levels_have_their_strides_and_the_backbones_weights():
    model = backbone.DetectorPyramid(vvt_jax.create_model("vvt_nano", num_classes=0), channels=8)
    images = jax.ShapeDtypeStruct((2, 64, 96, 3), jnp.float32)
    variables = jax.eval_shape(model.init, jax.random.key(0), images)
    levels = jax.eval_shape(model.apply, variables, images)
    expected = {f"p{i}": (2, max(1, 64 >> i), 96 >> i, 8) for i in range(2, 6)}
    expected["p6"] = (2, 1, 2, 8)
    assert {name: level.shape for name, level in levels.items()} == expected
    alone = jax.eval_shape(
        vvt_jax.create_model("vvt_nano", num_classes=0).init, jax.random.key(0), images
    )
    assert jax.tree.structure(variables["params"]["backbone"]) == jax.tree.structure(
        alone["params"]
    )
