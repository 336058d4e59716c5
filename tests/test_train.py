"""`train_and_evaluate` in this process: what it returns, writes and refuses."""

import contextlib
import csv
import dataclasses
import json
import shutil
import subprocess
import sys
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import vvt_jax
from tests.conftest import WIDTHS
from vvt_jax.data.sources import open_source
from vvt_jax.distributed import sharding
from vvt_jax.train import NonFiniteLossError, train_and_evaluate
from vvt_jax.training.checkpoint import Best, Checkpoints
from vvt_jax.training.configuration import ConfigError
from vvt_jax.training.plan import make_plan, open_sources
from vvt_jax.training.programs import Programs
from vvt_jax.weights.pretrained import load_pretrained

_FINISHED = {}


@pytest.fixture
def finished(small_config, tmp_path_factory):
    """The small run, done once for this file: its folder, and what was returned."""
    if not _FINISHED:
        workdir = tmp_path_factory.mktemp("finished")
        _FINISHED["run"] = (workdir, train_and_evaluate(small_config, workdir))
    return _FINISHED["run"]


def _checkpoints(workdir):
    return sorted(int(path.name) for path in (workdir / "checkpoints").iterdir())


def _validate(folder, split="validation"):
    """(loss, top-1) of a model folder, as a user would measure them: image by image."""
    model, variables, card = load_pretrained(folder)
    examples = open_source("digits", split).examples
    images = [vvt_jax.preprocess(examples[i]["image"], card) for i in range(len(examples))]
    labels = np.array([examples[i]["label"] for i in range(len(examples))])
    logits = np.asarray(jax.jit(model.apply)(variables, np.concatenate(images)), np.float64)
    assert card["class_names"] == list("0123456789")
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    loss = -log_p[np.arange(len(labels)), labels].mean()
    return loss, (logits.argmax(-1) == labels).mean()


def _without_clock(lines, clocked):
    return [{k: v for k, v in line.items() if k not in clocked} for line in lines]


def test_returns_the_last_measurements(finished, read_metrics):
    workdir, metrics = finished
    last = json.loads((workdir / "metrics.jsonl").read_text().splitlines()[-1])
    assert {"step": 12, **metrics} == last
    assert {name.split("/")[0] for name in metrics} == {"train", "eval", "test"}
    np.testing.assert_allclose(metrics["train/learning_rate"], 3e-3)  # warm-up is a step longer
    assert metrics["train/grad_norm"] > 0
    assert (workdir / "config.json").exists()


def test_the_model_folder_gives_the_best_validation_top1(finished, read_metrics):
    workdir, _ = finished
    lines = [line for line in read_metrics(workdir) if "eval/top1" in line]
    best = max(lines, key=lambda line: line["eval/top1"])
    loss, top1 = _validate(workdir / "model")
    assert top1 == pytest.approx(best["eval/top1"], abs=1e-9)
    assert loss == pytest.approx(best["eval/loss"], rel=1e-4)
    assert best["step"] in _checkpoints(workdir)


def test_a_finished_run_returns_the_same_again(finished, small_config):
    workdir, metrics = finished
    assert train_and_evaluate(small_config, workdir) == metrics


def test_eval_measures_the_newest_checkpoint_and_writes_nothing(finished, small_config, capsys):
    workdir, metrics = finished
    before = {path: path.read_bytes() for path in workdir.glob("*.json*")}
    small_config.mode = "eval"
    measured = train_and_evaluate(small_config, str(workdir))
    assert measured == {k: v for k, v in metrics.items() if not k.startswith("train/")}
    assert "step 12: test top-1" in capsys.readouterr().out
    assert {path: path.read_bytes() for path in workdir.glob("*.json*")} == before
    with (workdir / "evaluation" / "test_per_class.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["name"] for row in rows] == list("0123456789")
    assert sum(int(row["examples"]) for row in rows) == 360
    hits = sum(int(row["correct"]) for row in rows)
    assert hits / 360 == pytest.approx(metrics["test/top1"])
    assert (workdir / "evaluation" / "eval_confusion.png").exists()


def test_eval_needs_no_training_split(finished, small_config, capsys):
    workdir, metrics = finished
    small_config.mode, small_config.data.train_split = "eval", ""
    measured = train_and_evaluate(small_config, str(workdir))
    assert measured == {k: v for k, v in metrics.items() if not k.startswith("train/")}
    assert "images: validation 144, test 360." in capsys.readouterr().out


def test_eval_measures_a_model_folder(finished, small_config, tmp_path, read_metrics, capsys):
    workdir, _ = finished
    best = max(
        (line for line in read_metrics(workdir) if "eval/top1" in line),
        key=lambda line: line["eval/top1"],
    )
    small_config.mode = "eval"
    small_config.init_from = str(workdir / "model")
    measured = train_and_evaluate(small_config, tmp_path / "new")
    assert measured["eval/top1"] == best["eval/top1"]
    assert measured["eval/loss"] == pytest.approx(best["eval/loss"], rel=1e-5)
    assert f"Starts from {workdir}/model." in capsys.readouterr().out
    assert (tmp_path / "new" / "evaluation" / "test_per_class.csv").exists()


def test_a_run_starts_from_another_one(finished, small_config, tmp_path, read_metrics):
    workdir, metrics = finished
    small_config.init_from = str(workdir)
    small_config.total_steps = 2
    small_config.log_every_steps = small_config.eval_every_steps = 1
    small_config.checkpoint_every_steps = small_config.keep_checkpoints = 1
    small_config.optimizer.freeze = ("stage",)
    small_config.optimizer.learning_rate = 1e-9
    train_and_evaluate(small_config, tmp_path)
    first, second = read_metrics(tmp_path)
    assert first["eval/top1"] == second["eval/top1"] == metrics["eval/top1"]
    assert _checkpoints(tmp_path) == [1, 2]  # of equals the first is the best
    assert first["eval/loss"] == pytest.approx(metrics["eval/loss"], rel=1e-4)
    assert (
        0
        <= json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[0])["train/data_wait"]
        <= 1
    )


def test_eval_without_a_checkpoint_is_refused(small_config, tmp_path):
    small_config.mode = "eval"
    with pytest.raises(ConfigError, match=r"has no checkpoint to evaluate"):
        train_and_evaluate(small_config, tmp_path / "mistyped")
    assert not (tmp_path / "mistyped").exists()


@pytest.mark.slow
def test_the_same_config_gives_the_same_in_another_thread(
    finished, small_config, tmp_path, read_metrics, clocked
):
    """Threads take no signals, and need none."""
    workdir, metrics = finished
    done = []
    thread = threading.Thread(
        target=lambda: done.append(train_and_evaluate(small_config, tmp_path))
    )
    thread.start()
    thread.join()
    assert _without_clock(done, clocked) == _without_clock([metrics], clocked)
    assert read_metrics(tmp_path) == read_metrics(workdir)
    for name in ("model.safetensors", "config.json"):
        ours, theirs = (folder / "model" / name for folder in (tmp_path, workdir))
        assert ours.read_bytes() == theirs.read_bytes()


@pytest.mark.slow
def test_another_seed_and_no_test_split(finished, small_config, tmp_path, read_metrics):
    small_config.seed = 1
    small_config.data.test_split = ""
    metrics = train_and_evaluate(small_config, tmp_path)
    assert {name.split("/")[0] for name in metrics} == {"train", "eval"}
    ours, others = read_metrics(tmp_path), read_metrics(finished[0])
    assert all(a["train/loss"] != b["train/loss"] for a, b in zip(ours, others, strict=True))


@pytest.mark.slow
def test_without_validation_the_last_weights_are_the_model(small_config, tmp_path, read_metrics):
    small_config.data.validation_split = ""
    metrics = train_and_evaluate(small_config, tmp_path)
    assert not any("eval/" in name for line in read_metrics(tmp_path) for name in line)
    loss, top1 = _validate(tmp_path / "model", "test")
    assert top1 == pytest.approx(metrics["test/top1"], abs=1e-9)
    assert loss == pytest.approx(metrics["test/loss"], rel=1e-4)
    assert _checkpoints(tmp_path) == [9, 12]


@pytest.mark.slow
def test_the_moving_average_is_measured_and_is_the_model(small_config, tmp_path, read_metrics):
    small_config.optimizer.ema_decay = 0.5
    metrics = train_and_evaluate(small_config, tmp_path)
    assert {"eval/top1", "eval_ema/top1", "test/top1", "test_ema/top1"} <= set(metrics)
    lines = [line for line in read_metrics(tmp_path) if "eval/top1" in line]
    best = max(lines, key=lambda line: line["eval_ema/top1"])
    loss, top1 = _validate(tmp_path / "model")
    assert top1 == pytest.approx(best["eval_ema/top1"], abs=1e-9)
    assert loss == pytest.approx(best["eval_ema/loss"], rel=1e-4)
    assert abs(loss - best["eval/loss"]) > 1e-3


@pytest.fixture
def make_small_plan(small_config):
    return lambda: make_plan(small_config, open_sources(small_config))


def test_the_compiled_step_takes_the_memory_over_and_no_other_shape(make_small_plan):
    plan = make_small_plan()
    programs = Programs(plan)
    state = programs.init_state()
    train_step = programs.compile_train_step()
    stream = plan.broken_images(print).watch(plan.train_batches(0))
    with contextlib.closing(stream) as batches:
        (batch,) = sharding.to_devices([next(batches)], plan.mesh)
        new, done = train_step(state, batch)
        assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state))
        with pytest.raises(TypeError, match=r"uint8\[64,32,32,3\]"):
            train_step(new, {name: array[:8] for name, array in batch.items()})
        train_step(new, batch)
        assert done.block_until_ready() == 1  # it outlives the state that it came with


def test_a_loss_that_is_not_finite_stops_the_run(finished, small_config, make_small_plan, tmp_path):
    """Here from weights that became infinite: the step after the checkpoint that holds them."""
    shutil.copytree(finished[0], tmp_path, dirs_exist_ok=True)
    for step in _checkpoints(tmp_path):
        shutil.rmtree(tmp_path / "checkpoints" / str(step))
    state = Programs(make_small_plan()).init_state()
    state = dataclasses.replace(
        state,
        step=jnp.asarray(4, jnp.int32),
        params=jax.tree.map(lambda p: jnp.full_like(p, jnp.inf), state.params),
    )
    with Checkpoints(tmp_path / "checkpoints", keep=2) as checkpoints:
        checkpoints.save(4, state, Best())
    with pytest.raises(NonFiniteLossError, match="not finite at step 5: the last checkpoint is"):
        train_and_evaluate(small_config, tmp_path)
    assert _checkpoints(tmp_path) == [4]
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [2, 4]


@pytest.mark.parametrize("part", ["params", "ema"])
def test_weights_that_are_not_finite_are_not_saved(make_small_plan, small_config, part):
    """A step can have a finite loss and yet make them so."""
    small_config.optimizer.ema_decay = 0.5
    plan = make_small_plan()
    programs = Programs(plan)
    state = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), plan.abstract_state)
    programs.check_finite(state)
    bad = getattr(state, part)
    bad["head"]["bias"] = bad["head"]["bias"].at[1].set(jnp.nan)
    with pytest.raises(NonFiniteLossError, match="weights after step 0 are not finite"):
        programs.check_finite(state)


@pytest.mark.slow
def test_a_learning_rate_that_is_too_high_leaves_the_last_good_checkpoint(
    small_config, make_small_plan, tmp_path
):
    small_config.optimizer.learning_rate = 1e30
    small_config.optimizer.clip_norm = 0.0
    small_config.optimizer.warmup_learning_rate = 0.0
    small_config.optimizer.warmup_epochs = 1.0
    small_config.checkpoint_every_steps = 1
    with pytest.raises(NonFiniteLossError) as refused:
        train_and_evaluate(small_config, tmp_path)
    step = int(str(refused.value).split("at step ")[1].split(":")[0])
    assert 1 < step <= 12
    kept = _checkpoints(tmp_path)
    assert kept
    assert max(kept) < step
    with Checkpoints(tmp_path / "checkpoints", keep=None) as checkpoints:
        state, _ = checkpoints.restore(make_small_plan().abstract_state)
    assert state.step == max(kept)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state.params))


def test_help_comes_without_warnings():
    done = subprocess.run(
        [sys.executable, "-W", "error", "-m", "vvt_jax.main", "--help"],
        capture_output=True,
        text=True,
    )
    assert "--workdir" in done.stdout
    assert (done.returncode, done.stderr) == (0, "")


_NOTEBOOK = [
    "from configs import digits\nimport vvt_jax",
    """config = digits.get_config()
config.total_steps = 12
config.log_every_steps = 2
config.eval_every_steps = 4
config.checkpoint_every_steps = 3
config.data.workers = 2
config.model.update({widths!r})
config.compilation_cache = {cache!r}""",
    "metrics = vvt_jax.train_and_evaluate(config, {workdir!r})\nmetrics['eval/examples']",
]


@pytest.mark.slow
def test_trains_in_a_notebook_with_worker_processes(
    finished, compilation_cache, tmp_path, read_metrics
):
    nbformat = pytest.importorskip("nbformat")
    nbclient = pytest.importorskip("nbclient")
    values = {"cache": str(compilation_cache), "workdir": str(tmp_path / "run"), "widths": WIDTHS}
    notebook = nbformat.v4.new_notebook(
        cells=[nbformat.v4.new_code_cell(cell.format(**values)) for cell in _NOTEBOOK]
    )
    client = nbclient.NotebookClient(
        notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": "."}}
    )
    client.execute()
    results = [out for out in notebook.cells[-1].outputs if out.output_type == "execute_result"]
    assert results[0].data["text/plain"] == "144"
    assert read_metrics(tmp_path / "run") == read_metrics(finished[0])
