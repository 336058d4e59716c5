"""Whole runs as a user starts them: what they leave, and how they go on; see also tests/faults."""

import math
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from tests import fork_server

pytestmark = pytest.mark.slow  # each starts processes of its own
STEPS = 12
SHORT = f"--config.total_steps={STEPS}"


def saved_state(workdir: Path, step: int = STEPS):
    # As plain arrays: the test's own devices may be others than the run's.
    handler = ocp.PyTreeCheckpointHandler()
    with ocp.Checkpointer(handler) as checkpointer:
        path = (workdir / "checkpoints" / str(step) / "state").absolute()
        tree = checkpointer.metadata(path).item_metadata.tree
        restore = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
        return checkpointer.restore(path, args=ocp.args.PyTreeRestore(restore_args=restore))


def wait_for_step(process: fork_server.Process, workdir: Path, step: int) -> None:
    """Returns once the run has reported that step, or a later one."""
    metrics = workdir / "metrics.jsonl"
    deadline = time.monotonic() + 600
    while time.monotonic() < deadline:
        assert process.poll() is None, process.communicate()
        if metrics.exists() and f'"step": {step}' in metrics.read_text():
            return
        time.sleep(0.01)
    raise TimeoutError(f"step {step} was never reported")


@pytest.fixture(scope="module")
def straight(tmp_path_factory, run):
    """A run that nothing disturbs."""
    workdir = tmp_path_factory.mktemp("straight")
    done = run(workdir, SHORT)
    assert done.returncode == 0, done.stderr
    return workdir


def test_metrics_have_every_step_once(straight, read_metrics):
    lines = read_metrics(straight)
    assert [line["step"] for line in lines] == [2, 4, 6, 8, 10, 12]
    assert all("train/loss" in line for line in lines)
    assert [line["step"] for line in lines if "eval/top1" in line] == [4, 8, 12]
    assert [line["step"] for line in lines if "test/top1" in line] == [12]
    assert lines[-1]["eval/examples"] == 144
    assert lines[-1]["test/examples"] == 360


def test_a_run_leaves_what_it_promises(straight):
    names = {path.name for path in straight.iterdir()}
    assert {"config.json", "checkpoints", "metrics.jsonl", "model"} <= names
    assert any(name.startswith("events.out.tfevents") for name in names)


def test_a_finished_run_does_nothing_more(run, straight, read_metrics):
    before = read_metrics(straight)
    done = run(straight, SHORT)
    assert done.returncode == 0
    assert f"Resumed at step {STEPS} of {STEPS}" in done.stdout
    assert read_metrics(straight) == before


def test_a_signal_after_the_last_step_is_not_swallowed(run, tmp_path):
    process = run.start(tmp_path, SHORT)
    wait_for_step(process, tmp_path, STEPS)  # the last checkpoint is still to be written
    process.terminate()
    _, err = process.communicate(timeout=300)
    assert process.returncode in (143, -signal.SIGTERM)
    assert "Traceback" not in err
    assert "Resumed at step" in run(tmp_path, SHORT).stdout


def test_workers_and_cadences_may_change_on_resume(run, tmp_path, straight, read_metrics):
    process = run.start(tmp_path, SHORT)
    wait_for_step(process, tmp_path, 6)
    process.kill()
    process.communicate()
    changed = ("--config.data.workers=1", "--config.log_every_steps=1", "--config.mesh.data=1")
    done = run(tmp_path, SHORT, *changed)
    assert done.returncode == 0, done.stderr
    assert 0 < int(re.search(r"Resumed at step (\d+) of", done.stdout)[1]) < STEPS
    jax.tree.map(np.testing.assert_array_equal, saved_state(straight), saved_state(tmp_path))
    steps = [line["step"] for line in read_metrics(tmp_path)]
    assert steps == sorted(set(steps))


def test_the_authors_schedule_goes_on_inside_an_epoch(run, tmp_path, read_metrics):
    """Of 1,293 images in batches of 300, so that an epoch has 4.31 updates."""
    flags = (
        SHORT,
        "--config.batch_size=300",
        "--config.optimizer.schedule=cosine_by_epoch",
        "--config.optimizer.warmup_epochs=1",
        "--config.optimizer.warmup_learning_rate=1e-6",
        "--config.optimizer.learning_rate=1e-3",
        "--config.optimizer.final_learning_rate=1e-5",
        "--config.log_every_steps=1",
        "--config.eval_every_steps=12",
    )
    process = run.start(tmp_path, *flags)
    wait_for_step(process, tmp_path, 6)
    process.terminate()
    process.communicate()
    done = run(tmp_path, *flags)
    assert re.search(r"Resumed at step ([6-9]|1[01]) of", done.stdout), done.stderr
    epochs = STEPS / (1293 / 300)
    peak, final = 1e-3, 1e-5
    for line in read_metrics(tmp_path):
        t = max((line["step"] - 1) * 300 // 1293 - 1, 0)
        expected = final + (peak - final) * (1 + math.cos(math.pi * t / epochs)) / 2
        rate = line["train/learning_rate"]
        assert rate == pytest.approx(1e-6 if t < 1 else expected, rel=1e-6), line["step"]


_EIGHT = [f"--config.mesh.{axis}=2" for axis in ("data", "fsdp", "spatial")]


def test_eight_devices_equal_one(run, straight, tmp_path, read_metrics):
    """A whole run and its evaluations; a step's loss and gradients are test_parallel's."""
    done = run(tmp_path, SHORT, *_EIGHT, devices=8)
    assert done.returncode == 0, done.stderr
    for one, eight in zip(read_metrics(straight), read_metrics(tmp_path), strict=True):
        np.testing.assert_allclose(eight["train/loss"], one["train/loss"], rtol=2e-3)
        for name in {"eval/loss", "test/loss"} & one.keys():  # clamped elements fall otherwise
            np.testing.assert_allclose(eight[name], one[name], rtol=2e-2)
    first = read_metrics(tmp_path)[0]["train/loss"], read_metrics(straight)[0]["train/loss"]
    np.testing.assert_allclose(*first, rtol=1e-5)


def test_resumes_on_another_mesh(run, tmp_path):
    process = run.start(tmp_path, SHORT)
    wait_for_step(process, tmp_path, 4)
    process.terminate()
    process.communicate()
    done = run(tmp_path, SHORT, *_EIGHT, devices=8)
    assert done.returncode == 0, done.stderr
    assert 0 < int(re.search(r"Resumed at step (\d+) of", done.stdout)[1]) < STEPS


def test_mode_eval_prints_and_changes_nothing(run, straight, read_metrics):
    before = read_metrics(straight)
    done = run(straight, SHORT, "--config.mode=eval")
    assert done.returncode == 0, done.stderr
    for part, examples in (("eval", 144), ("test", 360)):
        line = next(text for text in done.stdout.splitlines() if f": {part} " in text)
        assert line.startswith(f"step {STEPS}: {part} top-1 ")
        assert line.endswith(f"({examples} images)")
        assert f"{100 * before[-1][f'{part}/top1']:.2f} %" in line
    assert read_metrics(straight) == before


_BAD_INPUT = [
    (
        "--config.optimizer.learning_rat=1",
        "There is no field config.optimizer.learning_rat: did you mean 'learning_rate'?",
    ),
    ("--config.nothing=1", "There is no field config.nothing"),
    ("--config.batch_size=0", "config.batch_size=0 can't be run: it has to be positive."),
    ("--config.mode=test", "config.mode='test' can't be run: it is 'train' or 'eval'."),
    ("--config.model.name=vvt_tinny", "did you mean 'vvt_tiny'?"),
    ("--config.model.locality=2d", "config.model: Unknown locality '2d'"),
    ("--config.model.num_classes=5", "config.model.num_classes=5 is too small"),
    ("--config.model.embed_dims=(33,48,64,64)", "stage 1's 33 channels do not divide by 2"),
    ("--config.augment.crop=middle", "config.augment: Unknown crop 'middle'"),
    ("--config.data.source=imagenet", "Unknown data source 'imagenet'"),
    ("--config.data.source=tfds:imagenet2012", "python -m vvt_jax.prepare imagenet2012"),
    ("--config.data.test_split=tset", "'digits' has no split 'tset'"),
    ("--config.data.train_split=", "config.data.train_split is empty"),
    ("--config.data.size=(16,32)", "config.data.size: images must be"),
    ("--config.data.interpolation=cubic", "config.data: Unknown interpolation 'cubic'"),
    ("--config.mesh.data=3", "config.mesh (data=3, fsdp=1, spatial=1)"),
    ("leftover", "Not a flag: leftover"),
]


_BAD_FILES = {  # what they hold, and what is said of them
    "syntax": ("def get_config(:\n", "SyntaxError: invalid syntax (syntax.py, line 1)"),
    "absent": ("import nothing_such\n", "No module named 'nothing_such'"),
    "empty": ("", "it has no function get_config()"),
    "raises": ("def get_config(_=''):\n    return {}['x']\n", "KeyError: 'x' ("),
    "number": ("def get_config(_=''):\n    return 3\n", "returns a int, not a ConfigDict"),
    "nothing": ("def get_config(_=''):\n    pass\n", "get_config() returns a ConfigDict"),
    "lines": ("def get_config(_=''):\n    raise ValueError('first\\nsecond')\n", "first"),
    "attribute": ("def get_config(_=''):\n    return None.shape\n", "no attribute 'shape'"),
    "exits": ("raise SystemExit\n", "ends the program"),
}
_BAD_WORKDIRS = {
    "": "is empty",
    "/dev/null/x": "/dev/null/x can't hold a run (Not a directory)",
    f"/tmp/{'x' * 300}": "x can't hold a run (File name too long)",
    "~nobody_of_this_name/x": "~nobody_of_this_name/x can't be found",
}


@pytest.fixture(scope="module")
def refused(compilation_cache, tmp_path_factory):
    """How the command ends with each of the flags above, and with configs that can't be read."""
    folder = tmp_path_factory.mktemp("refused")
    mine = folder / "mine.py"
    mine.write_text(
        "from configs import digits\n"
        "def get_config(_=''):\n"
        "    config = digits.get_config()\n"
        "    config.optimizer.lerning_rate = 0.1\n"
        "    return config\n"
    )
    workdir, config = f"--workdir={folder / 'never'}", "--config=configs/digits.py"
    cases = {flags: [config, workdir, SHORT, flags] for flags, _ in _BAD_INPUT}
    cases["no config"] = ["--config=configs/nothing.py", workdir]
    cases["no config, a field"] = ["--config=configs/nothing.py", workdir, "--config.seed=1"]
    cases["a field that there isn't"] = [f"--config={mine}", workdir]
    for name, (text, _) in _BAD_FILES.items():
        (folder / f"{name}.py").write_text(text)
        cases[name] = [f"--config={folder / name}.py", workdir]
    for name in _BAD_WORKDIRS:
        cases[f"workdir {name}"] = [config, f"--workdir={name}", SHORT]
    environment = {**os.environ, "JAX_COMPILATION_CACHE_DIR": str(compilation_cache)}
    ended = [
        fork_server.run(["-m", "vvt_jax.main", *flags], environment) for flags in cases.values()
    ]
    assert not (folder / "never").exists()
    return dict(zip(cases, ended, strict=True))


@pytest.mark.parametrize("name", _BAD_FILES)
def test_a_config_file_that_can_not_be_used_is_one_sentence(refused, name):
    told = _sentence(refused[name])
    assert _BAD_FILES[name][1] in told


@pytest.mark.parametrize("name", _BAD_WORKDIRS)
def test_a_workdir_that_can_not_be_made_is_one_sentence(refused, name):
    assert _BAD_WORKDIRS[name] in _sentence(refused[f"workdir {name}"])


def _sentence(done):
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("error: ")
    return last


@pytest.mark.parametrize(("flags", "message"), _BAD_INPUT)
def test_bad_input_gets_one_sentence(refused, flags, message):
    assert message in _sentence(refused[flags])


@pytest.mark.parametrize("case", ["no config", "no config, a field"])
def test_a_missing_config_file_is_named(refused, case):
    told = _sentence(refused[case])
    assert told.startswith("error: The config file can't be read: ")
    assert "No such file or directory: 'configs/nothing.py'" in told


def test_an_unknown_field_in_a_config_file_is_named(refused):
    told = _sentence(refused["a field that there isn't"])
    assert "There is no field lerning_rate: did you mean 'learning_rate'?" in told


def test_another_config_in_the_same_workdir_is_refused(run, straight):
    done = run(straight, SHORT, "--config.seed=1", "--config.optimizer.b1=0.8")
    assert done.returncode == 1
    assert "config.optimizer.b1 (0.9 before, 0.8 now), config.seed (0 before, 1 now)" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_start_that_fails_does_not_settle_the_config(run, tmp_path, digits_folder):
    failed = run(tmp_path, SHORT, f"--config.init_from={digits_folder}")  # of another width
    assert "not the model's" in _sentence(failed)
    assert not (tmp_path / "config.json").exists()
    assert run(tmp_path, SHORT, "--config.optimizer.b1=0.8").returncode == 0


@pytest.mark.parametrize("closed", [1, 2])
def test_a_run_goes_on_when_nobody_reads_what_it_prints(
    run, straight, tmp_path, closed, read_metrics
):
    reader, writer = os.pipe()
    os.close(reader)
    with subprocess.Popen(
        [sys.executable, *run.arguments(tmp_path, SHORT)],
        stdout=writer if closed == 1 else subprocess.DEVNULL,
        stderr=writer if closed == 2 else subprocess.DEVNULL,
    ) as process:
        os.close(writer)
        assert process.wait(timeout=600) == 0
    assert read_metrics(tmp_path) == read_metrics(straight)


def test_help_says_what_there_is(run, tmp_path):
    done = run(tmp_path, "--help")
    assert "--config" in done.stdout
    assert "--workdir" in done.stdout
