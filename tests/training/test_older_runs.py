"""A run that was stopped at step 4 of 12 before the package was divided into rooms, `older_run`."""

import hashlib
import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from configs import digits
from vvt_jax import train
from vvt_jax.training.checkpoint import Checkpoints
from vvt_jax.training.plan import make_plan, open_sources
from vvt_jax.weights.pretrained import load_pretrained

_RUN = Path(__file__).with_name("older_run")
# SHA-256 of all arrays in the order of their paths, computed by the program that wrote them.
_STATE = "bed1b1b95b14ba2593824d6064f83d2460e5e01463bf10b04e565783458d40f1"
_MODEL = "bcbc1b02678d55ff76be69eb08f6fa1d2621c7dbc850d43b587a69245676c87a"
# As that program went on with it; another machine rounds otherwise, and elements are clamped then.
_LOSSES = {6: 2.281537, 8: 2.276689, 10: 2.242282, 12: 2.191391}


@pytest.fixture
def older_run(tmp_path):
    return Path(shutil.copytree(_RUN, tmp_path / "run"))


@pytest.fixture
def config(compilation_cache):
    config = digits.get_config()
    config.total_steps = 12
    config.log_every_steps, config.eval_every_steps, config.checkpoint_every_steps = 2, 4, 3
    config.keep_checkpoints = 1
    config.model.embed_dims = (8, 8, 16, 16)
    config.optimizer.ema_decay = 0.9
    config.compilation_cache = str(compilation_cache)
    return config


def _digest(tree) -> str:
    digest = hashlib.sha256()
    for path, leaf in sorted(
        (jax.tree_util.keystr(path), leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    ):
        digest.update(f"{path} {leaf.dtype} {leaf.shape}".encode() + np.asarray(leaf).tobytes())
    return digest.hexdigest()


def test_its_checkpoint_is_restored_bit_for_bit(older_run, config):
    with Checkpoints(older_run / "checkpoints", keep=None) as checkpoints:
        state, best = checkpoints.restore(make_plan(config, open_sources(config)).abstract_state)
    assert (int(state.step), best.step) == (4, 4)
    assert _digest(state) == _STATE


def test_its_model_folder_is_loaded_bit_for_bit():
    _, variables, card = load_pretrained(_RUN / "model")
    assert _digest(flatten_dict(variables, sep="/")) == _MODEL
    assert card["class_names"] == list("0123456789")


@pytest.mark.slow
def test_it_goes_on(older_run, config, read_metrics):
    train.train_and_evaluate(config, older_run)
    losses = {line["step"]: line["train/loss"] for line in read_metrics(older_run)}
    assert losses == pytest.approx({2: losses[2], 4: losses[4], **_LOSSES}, rel=2e-2)
    before = (_RUN / "metrics.jsonl").read_text().splitlines()
    assert (older_run / "metrics.jsonl").read_text().splitlines()[: len(before)] == before
    assert (older_run / "checkpoints" / "12").is_dir()
    assert json.loads((older_run / "config.json").read_text())["total_steps"] == 12
