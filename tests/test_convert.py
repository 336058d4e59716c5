"""Published names and shapes: there and back bit for bit, and nothing passes that does not fit.

The names of the published sizes, and figures of the published model, are in golden/.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import vvt_jax
from vvt_jax import convert
from vvt_jax.errors import UserError
from vvt_jax.weights import WeightsError

_MICRO = {"depths": (1, 2, 1, 3), "embed_dims": (8, 8, 16, 24), "num_classes": 5, "unroll": False}


def _model(**fields):
    return vvt_jax.create_model("vvt_nano", **{**_MICRO, **fields})


def _variables(model):
    """Random bits of float32: also subnormal numbers, infinities and NaN."""
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda leaf: rng.integers(2**32, size=leaf.shape, dtype=np.uint32).view(np.float32), shapes
    )


@pytest.fixture(scope="module")
def state_dict():
    model = _model()
    return convert.to_pytorch(_variables(model), model)


def _bits(tree):
    return jax.tree.map(lambda leaf: np.asarray(leaf).view(np.uint32), tree)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        pytest.param({"num_classes": 0}, marks=pytest.mark.slow),
        pytest.param(
            {"feature_reduction": (1, 2, 4, 1), "gate_reduction": 2}, marks=pytest.mark.slow
        ),
        {"attention": "softmax"},
    ],
)
def test_round_trip_bit_for_bit(fields):
    model = _model(**fields)
    variables = _variables(model)
    published = convert.to_pytorch(variables, model)
    assert all(a.flags.c_contiguous and a.dtype == np.float32 for a in published.values())
    back = convert.from_pytorch(published, model)
    assert jax.tree.structure(back) == jax.tree.structure(variables)
    jax.tree.map(np.testing.assert_array_equal, _bits(back), _bits(variables))
    again = convert.to_pytorch(back, model)
    assert list(again) == list(published)
    jax.tree.map(np.testing.assert_array_equal, _bits(again), _bits(published))


def test_axes_are_pytorchs(state_dict):
    variables = convert.from_pytorch(state_dict, _model())
    stage = variables["params"]["stage2"]
    np.testing.assert_array_equal(
        _bits(stage["blocks"]["attention"]["query"]["kernel"][1]),
        _bits(np.ascontiguousarray(state_dict["block2.1.attn.q_proj.weight"].T)),
    )
    ours, theirs = stage["patch_embed"]["conv"]["kernel"], state_dict["patch_embed2.proj.weight"]
    assert _bits(ours[0, 2, 3, 4]) == _bits(theirs[4, 3, 0, 2])
    ours = stage["blocks"]["feed_forward"]["depthwise"]["kernel"]
    theirs = state_dict["block2.1.mlp.dwconv.dwconv.weight"]
    assert _bits(ours[1, 0, 2, 0, 5]) == _bits(theirs[5, 0, 0, 2])


def test_softmax_ablation_has_neither_gate_nor_query_key_value_biases():
    model = _model(attention="softmax")
    names = set(convert.to_pytorch(_variables(model), model))
    assert names.isdisjoint({"block1.0.attn.se_fc.0.weight", "block1.0.attn.q_proj.bias"})
    assert {"block1.0.attn.q_proj.weight", "block1.0.attn.out_proj.bias"} <= names


def test_missing_tensor_is_named(state_dict):
    name = "block2.1.attn.k_proj.bias"
    with pytest.raises(WeightsError, match=f"lack {name}"):
        convert.from_pytorch({k: v for k, v in state_dict.items() if k != name}, _model())


def test_surplus_tensor_is_named(state_dict):
    with pytest.raises(WeightsError, match=r"surplus block1\.7\.norm1\.weight"):
        convert.from_pytorch({**state_dict, "block1.7.norm1.weight": np.zeros(8)}, _model())


def test_missing_and_surplus_tensors_are_named_together(state_dict):
    renamed = dict(state_dict)
    renamed["module.norm1.bias"] = renamed.pop("norm1.bias")
    with pytest.raises(
        WeightsError, match=r"lack norm1\.bias and have the surplus module\.norm1\.bias"
    ):
        convert.from_pytorch(renamed, _model())


def test_many_names_are_counted(state_dict):
    with pytest.raises(WeightsError, match=rf"and {len(state_dict) - 3} more"):
        convert.from_pytorch({}, _model())


@pytest.mark.parametrize("shape", [(8, 5), (4, 8, 1), (32,), ()])
def test_misshaped_tensor_is_named_with_both_shapes(state_dict, shape):
    name = "block1.0.attn.q_proj.weight"
    with pytest.raises(WeightsError) as error:
        convert.from_pytorch({**state_dict, name: np.zeros(shape)}, _model())
    assert f"{name} is {list(shape)} where the model has [4, 8]" in str(error.value)


def test_head_of_another_size_is_refused(state_dict):
    with pytest.raises(WeightsError, match=r"head\.weight is \[5, 24\].*\[7, 24\]"):
        convert.from_pytorch(state_dict, _model(num_classes=7))


def test_weights_error_is_the_users_to_mend():
    assert issubclass(WeightsError, UserError)


def test_skipped_head_is_fresh_in_any_number_of_classes(state_dict):
    model = _model(num_classes=7)
    params = convert.from_pytorch(state_dict, model, skip_head=True)["params"]
    head = params.pop("head")
    assert head["kernel"].shape == (24, 7)
    assert 0.01 < np.std(head["kernel"]) < 0.03
    assert (head["bias"] == 0).all()
    body = convert.from_pytorch(state_dict, _model())["params"]
    del body["head"]
    jax.tree.map(np.testing.assert_array_equal, _bits(params), _bits(body))


def test_skipped_head_without_classes(state_dict):
    params = convert.from_pytorch(state_dict, _model(num_classes=0), skip_head=True)["params"]
    assert set(params) == {"stage1", "stage2", "stage3", "stage4"}
    headless = {k: v for k, v in state_dict.items() if not k.startswith("head.")}
    assert set(convert.from_pytorch(headless, _model(), skip_head=True)["params"]) > set(params)


def test_head_is_surplus_where_there_are_no_classes(state_dict):
    with pytest.raises(WeightsError, match=r"surplus head\.weight, head\.bias"):
        convert.from_pytorch(state_dict, _model(num_classes=0))


def test_variables_of_another_model_are_refused():
    model = _model()
    with pytest.raises(WeightsError, match="stage4/blocks/"):
        convert.to_pytorch(_variables(model), _model(depths=(1, 2, 1, 2)))
