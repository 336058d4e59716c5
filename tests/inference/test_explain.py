"""Class maps against their definition, and the weights of a patch against what attention does."""

import functools
import subprocess
import sys
import textwrap

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import unflatten_dict

import vvt_jax
from vvt_jax import attention
from vvt_jax.data.sources import open_source
from vvt_jax.inference import explain
from vvt_jax.inference.predictor import Predictor
from vvt_jax.models.shapes import variable_shapes
from vvt_jax.system.errors import UserError

_QUICKLY = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
_RECORD = {
    "size": [32, 48],
    "crop_fraction": 1.0,
    "interpolation": "bilinear",
    "mean": [0.5] * 3,
    "std": [0.25] * 3,
}


@pytest.fixture(scope="module")
def images():
    digits = open_source("digits", "test")
    return [np.repeat(digits.examples[i]["image"], 3, -1) for i in range(3)]


def _predictor(scale=0.3, **fields):
    model = vvt_jax.create_model(
        "vvt_nano",
        **{"embed_dims": (8, 16, 8, 8), "num_heads": (1, 2, 1, 1), "num_classes": 3, **fields},
    )
    rng = np.random.default_rng(0)
    flat = {
        name: rng.normal(scale=scale, size=shape).astype(np.float32)
        for name, shape in variable_shapes(model).items()
    }
    card = {"preprocessing": _RECORD}
    return Predictor((model, unflatten_dict(flat, sep="/"), card), batch_size=2)


@functools.cache
def _wide():
    return _predictor(depths=(1, 2, 1, 1))


@pytest.fixture(scope="module")
def wide():
    """A model whose maps are not square, with two heads and two blocks in stage 2."""
    return _wide()


def test_class_maps_of_the_last_stage_are_the_classifier_at_each_place(wide, images):
    maps = explain.class_maps(wide, images, 1, stage=4)
    chex.assert_shape(maps, (3, 1, 2))
    kernel = np.asarray(wide.variables["params"]["head"]["kernel"])[:, 1]
    # the gradient of a mean over the places is the same at each
    expected = np.maximum(wide.features(images)[-1] @ kernel, 0) / 2
    np.testing.assert_allclose(maps, expected, atol=1e-5)
    assert maps.max() > 0


@pytest.mark.slow
def test_class_maps_of_earlier_stages_are_their_definition(wide, images):
    labels = [2, 0, 1]
    maps = explain.class_maps(wide, images, labels, stage=2)
    chex.assert_shape(maps, (3, 4, 6))
    feature_maps = wide.features(images)[1]
    model, variables = wide.model, wide.variables

    def logit(x, label):
        bound = model.bind(variables)
        for stage in (bound.stage3, bound.stage4):
            x = stage(x, None)
        return bound.head(x.mean((1, 2)))[0, label]

    slope = jax.jit(jax.grad(logit), static_argnums=1, compiler_options=_QUICKLY)
    for i, label in enumerate(labels):
        gradient = np.asarray(slope(feature_maps[i : i + 1], label))
        expected = np.maximum((feature_maps[i] * gradient[0].mean((0, 1))).sum(-1), 0)
        np.testing.assert_allclose(maps[i], expected, rtol=1e-3, atol=1e-6)


def test_the_most_probable_class_is_the_default(wide, images):
    logits, maps = wide.apply(explain.class_map_of(2), images)
    given = explain.class_maps(wide, images, logits.argmax(-1), stage=2)
    np.testing.assert_allclose(explain.class_maps(wide, images, stage=2), given, atol=1e-6)
    np.testing.assert_array_equal(explain.class_maps(wide, images, stage=2), maps)


@pytest.mark.parametrize("crop_fraction", [0.5, 0.875, 1.0])
@pytest.mark.parametrize(("size", "image"), [((32, 48), (90, 40)), ((48, 32), (40, 90))])
def test_class_maps_of_a_label_are_of_the_image_that_is_shown(crop_fraction, size, image):
    predictor = _cropping(crop_fraction)
    photos = np.random.default_rng(1).integers(256, size=(2, *image, 3), dtype=np.uint8)
    shown = predictor.pixels(list(photos), size)
    logits, expected = predictor.run(explain.class_map_of(2), shown)
    maps = explain.class_maps(predictor, list(photos), logits.argmax(-1), stage=2, size=size)
    np.testing.assert_allclose(maps, expected, atol=1e-6)
    assert expected.max() > 0
    (alone,) = explain.class_maps(predictor, photos[1], logits[1].argmax(), stage=2, size=size)
    np.testing.assert_allclose(alone, expected[1], atol=1e-6)


@functools.cache
def _cropping(crop_fraction):
    first = _wide()
    card = {"preprocessing": {**_RECORD, "crop_fraction": crop_fraction}}
    predictor = Predictor((first.model, first.variables, card), batch_size=2)
    predictor._programs = first._programs  # the same model, compiled once for all
    return predictor


def test_the_default_stage_has_places_enough(predictor):
    assert explain.default_stage(predictor) == 2  # 4 x 4 at 32 pixels
    assert explain.default_stage(predictor, (224, 224)) == 4
    assert explain.default_stage(predictor, (97, 300)) == 4
    assert explain.default_stage(predictor, (96, 300)) == 3


def test_a_patchs_weights_give_what_its_attention_gives(wide, images):
    patch = (3, 1)
    shown = explain.patch_attention(wide, images[0], patch, stage=2)
    chex.assert_shape((shown.weights, shown.without_locality), (2, 4, 6))
    assert shown.patch == patch
    captured = _captured(wide, images[0], "block1")
    expected = attention.vicinity_attention_quadratic(*captured, return_weights=True)[1]
    np.testing.assert_allclose(shown.weights, expected[0, :, 3 * 6 + 1].reshape(2, 4, 6), atol=1e-5)
    # by hand, for one pair of places
    query, key, _ = (np.maximum(np.asarray(x)[0], 0) for x in captured)
    similarity = np.einsum("hd,ijhd->hij", query[3, 1], key)
    rows, columns = np.arange(4)[:, None], np.arange(6)[None, :]
    locality = np.cos(np.pi / 2 * (3 - rows) / 4) + np.cos(np.pi / 2 * (1 - columns) / 6)
    for weights, product in (
        (shown.weights, similarity * locality),
        (shown.without_locality, similarity),
    ):
        shares = product / (product.sum((1, 2), keepdims=True) + 1e-4)
        np.testing.assert_allclose(weights, shares, atol=1e-5)
    assert np.abs(shown.weights - shown.without_locality).max() > 1e-3
    assert shown.clamp_error < 1e-2


def _captured(predictor, image, block):
    """Query, key and value as the model makes them, by its own parameters."""
    images = (predictor.pixels(image) / 255 - 0.5) / 0.25
    model = predictor.model
    _, seen = jax.jit(
        lambda v, x: model.apply(
            v, x, method="features", capture_intermediates=True, mutable=["intermediates"]
        ),
        compiler_options=_QUICKLY,
    )(predictor.variables, images.astype(np.float32))
    inside = seen["intermediates"]["stage2"][block]["attention"]
    made = (inside[name]["__call__"][0] for name in ("query", "key", "value"))
    return [jnp.reshape(x, (*x.shape[:-1], 2, -1)) for x in made]


def test_softmax_attention_has_weights_and_no_locality(images):
    predictor = _predictor(attention="softmax", embed_dims=(8, 8, 8, 8), num_heads=(2, 2, 2, 2))
    shown = explain.patch_attention(predictor, images[0], (0, 1), stage=3)
    chex.assert_shape(shown.weights, (2, 2, 3))
    np.testing.assert_allclose(shown.weights.sum((1, 2)), 1, atol=1e-5)
    assert np.ptp(shown.weights) > 0
    assert shown.without_locality is None
    assert shown.clamp_error < 1e-5  # the weights are those of the model's own function
    figure = explain.draw_patch_attention(predictor.pixels(images[0])[0], shown)
    assert len(figure.axes) == 3  # image, map, scale


def test_the_clamps_share_is_told(images):
    # everything is smaller than what the clamp lets through
    shown = explain.patch_attention(_predictor(scale=1e-3), images[0], (0, 0), stage=2)
    assert shown.clamp_error > 0.1


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"stage": 5}, "There is no stage 5: a model has 1 to 4."),
        ({"stage": 2, "block": 2}, "Stage 2 has no block 2: it has 0 to 1."),
        ({"patch": (4, 0), "stage": 2}, "There is no patch 4, 0: the map of stage 2 is 4x6."),
        ({"patch": (0, -1), "stage": 2}, "There is no patch 0, -1"),
        ({"stage": 1, "size": (512, 512)}, "128x128 patches, and more than 4096 have too many"),
    ],
)
def test_what_is_not_there_is_told(wide, images, options, words):
    with pytest.raises(UserError, match=words):
        explain.patch_attention(wide, images[0], **{"patch": (0, 0), **options})


def test_classes_and_stages_that_are_not_there_are_told(wide, images):
    with pytest.raises(UserError, match="There is no class 3: the model has 0 to 2"):
        explain.class_maps(wide, images, 3)
    with pytest.raises(UserError, match="There is no stage 0"):
        explain.class_maps(wide, images, stage=0)


def test_an_overlay_is_hot_where_the_map_is():
    image = np.full((32, 64, 3), 100, np.uint8)
    heat = np.zeros((4, 8), np.float32)
    heat[0, 7] = 5.0
    picture = np.asarray(explain.overlay(image, heat)).astype(int)
    assert picture.shape == (32 * 7, 64 * 7, 3)
    assert np.all(picture[-50:, :50] == 100)  # untouched where it is cold
    assert np.abs(picture[5, -5] - 100).max() > 80
    np.testing.assert_array_equal(explain.overlay(image, 0 * heat), np.full_like(picture, 100))
    large = explain.overlay(np.zeros((300, 400, 3), np.uint8), heat)
    assert large.size == (400, 300)


def test_figures_are_drawn(wide, images):
    pixels = wide.pixels(images)
    maps = explain.class_maps(wide, images, stage=2)
    figure = explain.draw_class_maps(pixels, maps, ["a", "b", "c"])
    assert [axes.get_title() for axes in figure.axes] == ["a", "", "b", "", "c", ""]
    figure.canvas.draw()
    shown = explain.patch_attention(wide, images[0], (1, 2), stage=2)
    figure = explain.draw_patch_attention(pixels[0], shown)
    figure.canvas.draw()
    titles = [axes.get_title() for axes in figure.axes]
    assert [title for title in titles if title] == [
        "the patch", "attends to", "without its locality", "what its locality changes",
    ]  # fmt: skip
    drawn = figure.axes[1].images[0].get_array()
    np.testing.assert_allclose(drawn, shown.weights.mean(0) * 24, rtol=1e-5)


@pytest.mark.slow
def test_without_matplotlib_it_says_what_to_install():
    code = """
        import sys
        sys.modules["matplotlib"] = None  # as if it were not installed
        import numpy as np
        from vvt_jax.inference import explain
        from vvt_jax.system.errors import UserError

        try:
            explain.overlay(np.zeros((2, 2, 3), np.uint8), np.zeros((1, 1)))
        except UserError as error:
            print(error)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True
    )
    assert "pip install 'vvt_jax[charts]'" in done.stdout, done.stderr
    assert done.stdout.count("\n") == 1
