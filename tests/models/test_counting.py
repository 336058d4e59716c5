"""Counts of multiply-adds and activations, against the published ones and by hand."""

import pytest

import vvt_jax
from vvt_jax.models import counting, forms

_GIGA = 1e9


def _published(model, size):
    return sum(layer.published for layer in counting.count(model, size, size))


@pytest.mark.parametrize(
    ("name", "size", "expected"),
    [
        ("vvt_tiny", 224, 2.985),
        pytest.param("vvt_tiny", 384, 8.77, marks=pytest.mark.slow),
        ("vvt_small", 224, 5.586),
        ("vvt_medium", 224, 9.388),
        ("vvt_large", 224, 10.783),
        ("vvt_large", 512, 56.29),
    ],
)
def test_published_multiply_adds(name, size, expected):
    digits = len(str(expected).partition(".")[2])
    assert round(_published(vvt_jax.create_model(name), size) / _GIGA, digits) == expected


@pytest.mark.parametrize(("reduction", "expected"), [(1, 3.847), (4, 2.687), (8, 2.572)])
def test_published_multiply_adds_under_feature_reduction(reduction, expected):
    model = vvt_jax.create_model("vvt_tiny", feature_reduction=(reduction,) * 4)
    assert round(_published(model, 224) / _GIGA, 3) == expected


def test_published_multiply_adds_of_the_softmax_ablation():
    model = vvt_jax.create_model("vvt_tiny", attention="softmax")
    assert round(_published(model, 224) / _GIGA, 3) == 7.356


@pytest.mark.slow
@pytest.mark.parametrize("layout", [{"unroll": False}, {"remat": True}, {"dtype": "bfloat16"}])
def test_layouts_cost_the_same(layout):
    model = vvt_jax.create_model("vvt_tiny")
    assert counting.count(model.clone(**layout), 64, 96) == counting.count(model, 64, 96)


def test_forms_differ_in_what_is_done_alone():
    model = vvt_jax.create_model("vvt_nano")
    with forms.use(attention="concatenated"):
        concatenated = counting.count(model, 64, 96)
    with forms.use(attention="separable"):
        separable = counting.count(model, 64, 96)
    assert [x.published for x in concatenated] == [x.published for x in separable]
    for one, other in zip(concatenated, separable, strict=True):
        if one.path.endswith("/attention"):
            assert other.actual < one.actual
        else:
            assert other.actual == one.actual == one.published


@pytest.mark.slow
def test_bands_cost_the_same_but_for_the_rows_that_two_of_them_make():
    model = vvt_jax.create_model("vvt_nano")
    whole = counting.count(model, 64, 96)
    bands = counting.count(model.clone(ffn_bands=4), 64, 96)  # of 4 rows and 2 more in stage 1
    assert [(x.path, x.published, x.activations) for x in bands] == [
        (x.path, x.published, x.activations) for x in whole
    ]
    actual = {x.path: x.actual for x in bands}
    for x in whole:
        more = {"stage1/blocks/feed_forward/fc1": 1.5, "stage1/blocks/feed_forward/depthwise": 1.5}
        if x.path.startswith("stage1") or "feed_forward" not in x.path:
            assert actual[x.path] == more.get(x.path, 1) * x.actual


def test_a_small_model_by_hand():
    model = vvt_jax.create_model("vvt_nano", num_classes=10)
    layers = {layer.path: layer for layer in counting.count(model, 32, 64)}
    tokens, width = 8 * 16, 32  # of the first stage
    assert layers["stage1/patch_embed/conv"].published == tokens * width * 3 * 49
    assert layers["stage1/patch_embed/conv"].activations == tokens * width
    assert layers["stage1/blocks/attention/query"].published == tokens * width * 16
    assert layers["stage1/blocks/attention/query"].activations == tokens * 16
    assert layers["stage1/blocks/attention"].published == 2 * tokens * (4 * 16) * 16
    assert layers["stage1/blocks/attention"].activations == 0
    assert layers["stage1/blocks/attention/gate_reduce"].published == width * width
    assert layers["stage1/blocks/feed_forward/fc1"].published == tokens * width * 128
    assert layers["stage1/blocks/feed_forward/depthwise"].published == tokens * 128 * 9
    assert layers["stage1/blocks/feed_forward/depthwise"].activations == tokens * 128
    assert layers["head"].published == 64 * 10
    assert next(iter(layers)) == "stage1/patch_embed/conv"
    assert list(layers)[-1] == "head"
