"""Segmentation through the trainer: a small run on real files, and what is refused."""

import csv
import json

import numpy as np
import pytest

from configs import digits, folder_segmentation
from vvt_jax.data.sources import open_source
from vvt_jax.inference.segment import segment_image
from vvt_jax.show import training_batch
from vvt_jax.train import train_and_evaluate
from vvt_jax.training.checkpoint import Checkpoints
from vvt_jax.training.configuration import ConfigError
from vvt_jax.training.tasks import make_task
from vvt_jax.weights.pretrained import load_pretrained


@pytest.fixture
def config(scenes, compilation_cache):
    config = folder_segmentation.get_config("vvt_nano,upernet")
    config.total_steps = 4
    config.log_every_steps = 2
    config.eval_every_steps = 2
    config.checkpoint_every_steps = 2
    config.batch_size = 4
    config.compilation_cache = str(compilation_cache)
    config.model.embed_dims = (8, 8, 8, 8)
    config.model.num_heads = (1, 1, 1, 1)
    config.model.head_channels = 8
    config.data.data_dir = str(scenes)
    config.data.train_split = "train"
    config.data.validation_split = "val"
    config.data.size = (32, 32)
    config.data.threads = 1
    config.optimizer.learning_rate = 3e-3
    return config


_DONE = {}


@pytest.fixture
def finished(config, tmp_path_factory):
    """The small run, done once for this file: its folder, and what was returned."""
    if not _DONE:
        workdir = tmp_path_factory.mktemp("finished")
        _DONE["run"] = (workdir, train_and_evaluate(config, workdir))
    return _DONE["run"]


def _measure(folder, scenes):
    """(mIoU, pixel accuracy) of a model folder, as a user would measure them: image by image."""
    model, variables, card = load_pretrained(folder)
    assert type(model).__name__ == "Segmenter"
    examples = open_source("folder_segmentation", "val", data_dir=str(scenes)).examples
    confusion = np.zeros((3, 3), int)
    for i in range(len(examples)):
        found = segment_image(model, variables, card, examples[i]["image"])
        counted = examples[i]["label"] != 255
        np.add.at(confusion, (examples[i]["label"][counted], found[counted]), 1)
    hits = np.diag(confusion)
    union = confusion.sum(0) + confusion.sum(1) - hits
    return np.mean(hits[union > 0] / union[union > 0]), hits.sum() / confusion.sum()


@pytest.mark.slow  # a run of its own
def test_a_run_measures_what_its_model_folder_gives(finished, scenes):
    workdir, metrics = finished
    assert metrics["eval/examples"] == 5
    assert metrics["train/loss"] > 0
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    best = max((x for x in lines if "eval/miou" in x), key=lambda x: x["eval/miou"])
    miou, accuracy = _measure(workdir / "model", scenes)
    assert miou == pytest.approx(best["eval/miou"], abs=2e-3)  # ties may fall otherwise in a batch
    assert accuracy == pytest.approx(best["eval/pixel_accuracy"], abs=2e-3)
    steps = sorted(path.name for path in (workdir / "pictures").iterdir())
    assert steps == ["eval_00000002.png", "eval_00000004.png"]


@pytest.mark.slow  # a run of its own
def test_batch_statistics_are_kept_in_checkpoints_and_folders(finished):
    workdir, _ = finished
    _, variables, _ = load_pretrained(workdir / "model")
    mean = variables["batch_stats"]["decoder"]["fuse"]["norm"]["mean"]
    assert np.abs(mean).max() > 0
    with Checkpoints(workdir / "checkpoints", keep=None) as checkpoints:
        assert "batch_stats" in checkpoints.restore_variables()


@pytest.mark.slow  # a run of its own
def test_eval_writes_each_class_and_equals_the_run(finished, config):
    workdir, metrics = finished
    config.mode = "eval"
    measured = train_and_evaluate(config, workdir)
    assert measured == {k: v for k, v in metrics.items() if not k.startswith("train/")}
    with (workdir / "evaluation" / "eval_per_class_iou.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["name"] for row in rows] == ["noise", "red", "green"]
    ious = [float(row["iou"]) for row in rows if row["iou"]]
    assert np.mean(ious) == pytest.approx(metrics["eval/miou"], abs=1e-4)


@pytest.mark.slow  # a run of its own
def test_what_the_model_sees_is_a_picture(config):
    images, masks, names = training_batch(config, 1)
    assert images.shape == (4, 32, 32, 3)
    assert masks.shape == (4, 32, 32)
    assert set(np.unique(masks)) <= {0, 1, 2, 255}
    assert names == ("noise", "red", "green")


@pytest.mark.slow  # a run of its own
def test_settings_of_the_other_task_are_refused(config, tmp_path):
    def refused(told):
        with pytest.raises(ConfigError, match=told):
            train_and_evaluate(config, tmp_path / "refused")

    config.augment.mixup = 0.5
    refused(r"config\.augment: `mixup` is for classification")
    config.augment.mixup = 0.0
    config.optimizer.label_smoothing = 0.1
    refused("label_smoothing is for classification")
    config.optimizer.label_smoothing = 0.0
    config.optimizer.accumulate = 2
    refused("batch normalisation, which needs the whole batch")
    config.optimizer.accumulate = 1
    config.inference.stride = 100
    refused(r"config\.inference: `window` must be")
    config.model.head = None
    refused("labels pixels: config.model.head has to be")
    config = digits.get_config()
    config.model.head = "fpn"
    refused("labels whole images")


def test_the_auxiliary_loss_has_its_weight(config):
    source = open_source("folder_segmentation", "train", data_dir=config.data.data_dir)
    rng = np.random.default_rng(0)
    logits, auxiliary = rng.standard_normal((2, 1, 4, 4, 3), np.float32)
    targets = rng.integers(3, size=(1, 4, 4)).astype(np.uint8)

    def loss(outputs, weight):
        config.optimizer.auxiliary_weight = weight
        return float(make_task(config, source).loss(outputs, targets))

    both, main, other = (
        loss(outputs, 0.25) for outputs in ((logits, auxiliary), (logits, None), (auxiliary, None))
    )
    assert both == pytest.approx(main + 0.25 * other, rel=1e-5)
    assert loss((logits, auxiliary), 0.0) == pytest.approx(main, rel=1e-6)
