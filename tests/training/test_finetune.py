"""Starting weights from real folders and a real run: what is taken, anew, and said."""

import json

import chex
import jax
import numpy as np
import pytest

from tests.conftest import draw_variables
from vvt_jax import create_model, create_segmenter, save_pretrained
from vvt_jax.models.shapes import smallest_image
from vvt_jax.training.checkpoint import Best, CheckpointError, Checkpoints
from vvt_jax.training.finetune import initial_variables
from vvt_jax.training.optimizer import make_optimizer
from vvt_jax.training.step import init_state
from vvt_jax.weights.checks import WeightsError
from vvt_jax.weights.published import to_pytorch
from vvt_jax.weights.torch_files import write_file

_NAMES = tuple("abcdefghij")
_FIELDS = {
    "clip_norm": 1.0, "b1": 0.9, "b2": 0.99, "eps": 1e-8, "weight_decay": 0.05,
    "layer_decay": 1.0, "freeze": (),
}  # fmt: skip


def _model(**fields):
    return create_model("vvt_nano", **{"num_classes": 10, **fields})


@pytest.fixture(scope="module")
def variables():
    """Of two different seeds: the given ones and the fresh ones."""
    return [draw_variables(_model(), seed) for seed in (0, 1)]


@pytest.fixture(scope="module")
def folder(variables, tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    save_pretrained(path, _model(), variables[0], {"class_names": list(_NAMES)})
    return path


def test_a_folder_of_the_same_classes_is_taken_whole(folder, variables):
    taken, told = initial_variables(folder, _model(), variables[1], _NAMES)
    chex.assert_trees_all_equal(taken, variables[0])
    assert told == [f"Starts from {folder}."]


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (tuple("abc"), "there were 10 classes, here are 3."),
        ((*"abcdefghi", "z"), "there were 10 classes, here are 10, of other names."),
    ],
)
def test_other_classes_get_a_new_head_and_are_told_so(folder, variables, names, words):
    model = _model(num_classes=len(names))
    fresh = draw_variables(model, seed=1)
    taken, told = initial_variables(folder, model, fresh, names)
    assert [sentence.startswith("The head starts anew: ") for sentence in told] == [False, True]
    assert told[1].endswith(words)
    chex.assert_trees_all_equal(taken["params"].pop("head"), fresh["params"]["head"])
    body = {name: part for name, part in variables[0]["params"].items() if name != "head"}
    chex.assert_trees_all_equal(taken["params"], body)


def test_what_no_shape_tells_is_told(folder, variables):
    _, told = initial_variables(
        folder, _model(locality="none", num_heads=(1, 1, 4, 2)), variables[1], _NAMES
    )
    _, heads, locality = told
    for words in ("num_heads=[1, 1, 2, 2]", "[1, 1, 4, 2]"):
        assert words in heads
    for words in ("locality='sum'", "'none'"):
        assert words in locality


def _save_run(workdir, *, ema):
    model = _model()
    optimizer = make_optimizer(_FIELDS, lambda _: 1e-3)
    state = jax.eval_shape(lambda: init_state(model, optimizer, (1, 32, 32, 3), 3, ema=ema))
    rng = np.random.default_rng(3)
    state = jax.tree.map(lambda x: rng.integers(9, size=x.shape).astype(x.dtype), state)
    with Checkpoints(workdir / "checkpoints", keep=2) as checkpoints:
        checkpoints.save(5, state, Best())
    (workdir / "config.json").write_text(
        json.dumps({"model": {"name": "vvt_nano", "depths": None}, "data": {}, "optimizer": {}})
    )
    return state


@pytest.mark.slow
@pytest.mark.parametrize("ema", [False, True])
def test_a_run_gives_its_newest_weights_the_averaged_ones_first(tmp_path, variables, ema):
    state = _save_run(tmp_path, ema=ema)
    taken, told = initial_variables(tmp_path, _model(), variables[1], _NAMES)
    chex.assert_trees_all_equal(taken["params"], state.ema if ema else state.params)
    assert told == [f"Starts from {tmp_path}."]


def test_a_published_file_is_taken(tmp_path, variables):
    path = tmp_path / "published.pth"
    write_file(path, to_pytorch(variables[0], _model()))
    taken, told = initial_variables(path, _model(), variables[1], _NAMES)
    chex.assert_trees_all_equal(taken, variables[0])
    assert told == [f"Starts from {path}."]


def test_weights_of_another_model_are_refused(folder, variables):
    model = _model(embed_dims=(32, 48, 64, 96))
    fresh = jax.eval_shape(model.init, jax.random.key(0), smallest_image())
    with pytest.raises(WeightsError, match=r"config.init_from='.*': These weights are not the mod"):
        initial_variables(folder, model, fresh, _NAMES)


def test_nothing_to_start_from(tmp_path, variables):
    with pytest.raises(WeightsError, match=r"is not a model folder: it has no readable"):
        initial_variables(tmp_path / "none", _model(), variables[1], _NAMES)
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(WeightsError, match="has no checkpoint yet"):
        initial_variables(tmp_path, _model(), variables[1], _NAMES)


@pytest.mark.slow
def test_a_damaged_run_is_refused(tmp_path, variables):
    _save_run(tmp_path, ema=False)
    book = tmp_path / "checkpoints" / "5" / "bookkeeping" / "metadata"
    good = book.read_text()
    book.write_text(good.replace('"score": -1.0', '"score": -1.5'))
    with pytest.raises(CheckpointError, match="is damaged"):
        initial_variables(tmp_path, _model(), variables[1], _NAMES)
    book.write_text(good)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(WeightsError, match=r"config.json is not a run's: 'model'"):
        initial_variables(tmp_path, _model(), variables[1], _NAMES)
    np.testing.assert_equal(len(list((tmp_path / "checkpoints").iterdir())), 1)


@pytest.mark.slow
def test_a_segmenter_takes_a_classifiers_backbone_and_says_so(folder, variables):
    model = create_segmenter("vvt_nano", num_classes=10, head_channels=8)
    fresh = draw_variables(model, seed=2)
    taken, told = initial_variables(folder, model, fresh, _NAMES)
    for name, part in taken["params"].items():
        given = variables[0] if name.startswith("stage") else fresh
        chex.assert_trees_all_equal(part, given["params"][name])
    chex.assert_trees_all_equal(taken["batch_stats"], fresh["batch_stats"])
    assert told[1].startswith("Only the backbone is taken: ")
    assert "(fpn)" in told[1]
    with pytest.raises(WeightsError, match="holds a classifier, and this config measures a segm"):
        initial_variables(folder, model, fresh, _NAMES, keep_head=True)
