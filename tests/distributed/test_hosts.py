"""Groups of real processes on this machine: what they compute, save and read, and how they end."""

import contextlib
import itertools
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from configs import common, digits
from tests import fork_server
from vvt_jax.data import loader, sources
from vvt_jax.data.loader import BrokenImages
from vvt_jax.distributed import hosts
from vvt_jax.system.errors import UserError
from vvt_jax.system.lock import WorkdirLock
from vvt_jax.training import configuration

ROOT = Path(__file__).parents[2]
_STEPS = 8
# Without the clamp, which has no gradient where it acts: rounding would flip elements there.
_CONFIG = "configs/digits.py"
_SMALL = (
    f"--config.total_steps={_STEPS}",
    "--config.batch_size=8",
    "--config.log_every_steps=1",
    "--config.checkpoint_every_steps=2",
    "--config.eval_every_steps=100",
    "--config.data.validation_split=",
    "--config.data.test_split=",
    "--config.model.embed_dims=(8,8,8,8)",
    "--config.model.num_heads=(1,1,1,1)",
    "--config.model.clamp=False",
    "--config.model.drop_path_rate=0.2",
    "--config.distributed.heartbeat_timeout=20",
)
# What depends on an example's place in the batch, and an evaluation whose last batch is not full
_MIXED = (
    "--config.total_steps=3",
    "--config.data.validation_split=validation",
    "--config.batch_size=20",
    "--config.mesh.fsdp=2",
    "--config.augment.mixup=0.8",
    "--config.augment.cutmix=1.0",
    "--config.augment.erase=0.25",
)
# Compiling takes longest here
_QUICK = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"


@pytest.fixture(scope="module")
def launch(compilation_cache):
    """Starts the launcher, which prints the processes' numbers and how they end."""

    def start(
        workdir: Path, *flags: str, processes: int, devices: int = 1, options=(), config=_CONFIG
    ):
        path = workdir.with_suffix(".log")
        command = [
            sys.executable,
            "-m",
            "experiments.launch.local",
            f"--processes={processes}",
            f"--devices={devices}",
            "--restarts=2",
            *options,
            "--",
            f"--config={config}",
            *_SMALL,
            f"--workdir={workdir}",
            f"--config.compilation_cache={compilation_cache}",
            *flags,
        ]
        environment = {**os.environ, "XLA_FLAGS": _QUICK, "PYTHONUNBUFFERED": "1"}
        with path.open("w") as log:
            launcher = subprocess.Popen(
                command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT
            )
        return launcher, path

    return start


def _finish(launched, seconds=600) -> str:
    launcher, log = launched
    try:
        launcher.wait(timeout=seconds)
    finally:
        if launcher.poll() is None:
            launcher.terminate()
            launcher.wait()
    return log.read_text()


def _wait_for_step(launched, workdir: Path, step: int) -> None:
    launcher, log = launched
    metrics, end = workdir / "metrics.jsonl", time.monotonic() + 600
    while not (metrics.exists() and f'"step": {step}' in metrics.read_text()):
        assert launcher.poll() is None, log.read_text()
        assert time.monotonic() < end
        time.sleep(0.02)


def _pid(log: Path, process: int) -> int:
    """Of the newest start."""
    return int(re.findall(rf"Process {process} is (\d+)\.", log.read_text())[-1])


def _saved(workdir: Path, step: int = _STEPS):
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        path = (workdir / "checkpoints" / str(step) / "state").absolute()
        tree = checkpointer.metadata(path).item_metadata.tree
        restore = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
        return checkpointer.restore(path, args=ocp.args.PyTreeRestore(restore_args=restore))


def _assert_same(one: Path, other: Path, read_metrics) -> None:
    assert [line["step"] for line in read_metrics(other)] == [*range(1, _STEPS + 1)]
    assert read_metrics(one) == read_metrics(other)
    jax.tree.map(np.testing.assert_array_equal, _saved(one), _saved(other))
    name = "model/model.safetensors"
    assert (one / name).read_bytes() == (other / name).read_bytes()


@pytest.fixture(scope="module")
def two(launch, tmp_path_factory):
    """A run of two processes that nothing disturbs."""
    workdir = tmp_path_factory.mktemp("straight") / "two"
    log = _finish(launch(workdir, processes=2))
    assert log.count("ended with 0.") == 2, log
    return workdir


@pytest.mark.slow
def test_one_process_writes_what_is_written_once(two):
    names = {path.name for path in two.iterdir()}
    assert {"config.json", "checkpoints", "metrics.jsonl", "model"} <= names
    assert len([name for name in names if name.startswith("events.out.tfevents")]) == 1
    assert two.with_suffix(".log").read_text().count(" steps (") == 1


@pytest.mark.slow
def test_training_equals_one_process_on_as_many_devices(launch, tmp_path, read_metrics):
    workdir, one_process = tmp_path / "group", tmp_path / "one"
    log = _finish(launch(one_process, *_MIXED, processes=1, devices=4))
    assert log.count("ended with 0.") == 1, log
    log = _finish(launch(workdir, *_MIXED, processes=2, devices=2))
    assert log.count("ended with 0.") == 2, log
    assert log.count("eval top-1") == 1
    for one, group in zip(read_metrics(one_process), read_metrics(workdir), strict=True):
        assert one.keys() == group.keys()
        assert group["train/loss"] == pytest.approx(one["train/loss"], rel=2e-6)
        # after AdamW's steps parameters differ by more: tiny gradients are made as large as others
        assert group["train/grad_norm"] == pytest.approx(one["train/grad_norm"], rel=1e-3)
    assert group["eval/examples"] == one["eval/examples"] == 144
    assert group["eval/loss"] == pytest.approx(one["eval/loss"], rel=1e-4)


@pytest.mark.slow
def test_a_signal_to_one_stops_all_after_the_same_step(launch, two, tmp_path, read_metrics):
    """SIGINT, of which the process makes the SIGTERM that the others are told of."""
    workdir = tmp_path / "run"
    launched = launch(workdir, processes=2)
    _wait_for_step(launched, workdir, 1)
    os.kill(_pid(launched[1], 1), signal.SIGINT)
    log = _finish(launched)
    stopped = re.findall(r"SIGTERM: saved at step (\d+);", log)
    assert len(stopped) == 2, log
    assert len(set(stopped)) == 1
    assert log.count("ended with 143.") == 2
    assert (workdir / "checkpoints" / stopped[0]).is_dir()
    assert "Traceback" not in log
    log = _finish(launch(workdir, processes=2))
    assert f"Resumed at step {stopped[0]} of" in log
    _assert_same(two, workdir, read_metrics)


@pytest.mark.slow
def test_a_killed_process_ends_the_other_and_the_group_restarts(
    launch, two, tmp_path, read_metrics
):
    """First the one that does not coordinate, then the one that does."""
    workdir = tmp_path / "run"
    timeout = "--config.distributed.heartbeat_timeout=10"
    launched = launch(workdir, timeout, processes=2, options=["--grace=90"])
    for restart, (victim, step) in enumerate(((1, 3), (0, 5)), start=1):
        _wait_for_step(launched, workdir, step)
        os.kill(_pid(launched[1], victim), signal.SIGKILL)
        resumed = rf"Restart {restart} of 2\.(?s:.*)Resumed at step [246] of"
        while not re.search(resumed, log := launched[1].read_text()):
            assert launched[0].poll() is None, log
            time.sleep(0.05)
    starts = re.split(r"Restart \d of 2\.", _finish(launched))
    # before the launcher would have ended it, which makes it -9
    for ended, victim in zip(starts[:2], (1, 0), strict=True):
        found = dict(re.findall(r"Process (\d) ended with (-?\d+)\.", ended))
        assert found[str(victim)] == "-9"
        assert found[str(1 - victim)] in ("70", "-6")
    assert starts[2].count("ended with 0.") == 2, starts
    _assert_same(two, workdir, read_metrics)


@pytest.mark.slow
def test_a_mistake_that_one_process_finds_ends_all_and_restarts_nothing(launch, tmp_path):
    """Process 0 alone asks for the lock; the other one then waits for it with its first step."""
    workdir = tmp_path / "run"
    workdir.mkdir()
    with WorkdirLock(workdir):
        launched = launch(workdir, processes=2)
        log = _finish(launched)
    assert launched[0].returncode == 1
    assert log.count("ended with 1.") == 2, log
    (reason,) = set(re.findall(r"^error: (?:process 0 ended the run: )?(.*)$", log, re.MULTILINE))
    assert str(workdir) in reason
    assert "error: process 0 ended the run: " in log
    for unwanted in ("Traceback", "Check failure", "Restart"):
        assert unwanted not in log


@pytest.mark.slow
def test_an_unexpected_error_ends_all_and_restarts(launch, tmp_path):
    """Once: what fails is gone the second time, as a lost network would be."""
    workdir, flag = tmp_path / "run", tmp_path / "fails"
    flag.touch()
    config = tmp_path / "config.py"
    config.write_text(
        "import pathlib\n"
        "import jax\n"
        "from configs import digits\n"
        "get_config = digits.get_config\n"
        "def fail(event, **_):\n"
        f"    flag = pathlib.Path({str(flag)!r})\n"
        "    if 'compile' in event and jax.process_index() == 1 and flag.exists():\n"
        "        flag.unlink()\n"
        "        raise RuntimeError('the network is down')\n"
        "jax.monitoring.register_event_listener(fail)\n"
    )
    launched = launch(workdir, "--config.total_steps=2", processes=2, config=config)
    log = _finish(launched)
    assert launched[0].returncode == 0, log
    assert log.count("ended with 70.") == log.count("ended with 0.") == 2
    assert log.count("Traceback") == 1
    assert "error: process 1 ended the run: RuntimeError: the network is down" in log
    assert "Restart 1 of 2." in log
    assert "Restart 2" not in log


# Restores the state of the one before, tells it, saves it, and reads two batches.
_LINK = """
import json, sys
from pathlib import Path

import jax
import numpy as np

from configs import digits
from vvt_jax.distributed import hosts, sharding
from vvt_jax.training.checkpoint import Best, Checkpoints
from vvt_jax.training.plan import make_plan, open_sources

told = json.loads(sys.argv[1])
config = digits.get_config()
config.batch_size = 8
config.model.embed_dims, config.model.num_heads = (8,) * 4, (1,) * 4
config.mesh.update(told["mesh"])
config.distributed.update(told["distributed"])
hosts.join(config.distributed, preemptible=False)
assert jax.process_count() == told["processes"]
assert jax.device_count() == told["processes"] * told["devices"]
plan = make_plan(config, open_sources(config))
folder, link = Path(told["folder"]), told["link"]
if link:
    with Checkpoints(folder / str(link - 1), keep=None) as checkpoints:
        state, best = checkpoints.restore(plan.abstract_state)
    assert best == Best(step=link - 1, score=0.25)
else:
    rng = np.random.default_rng(0)

    def draw(leaf):
        values = rng.integers(1000, size=leaf.shape) * np.float64(0.37)
        values = np.asarray(values).astype(leaf.dtype)
        return jax.make_array_from_callback(leaf.shape, leaf.sharding, lambda i: values[i])

    state = jax.tree.map(draw, plan.abstract_state)
layouts = jax.tree.map(lambda x: x.sharding, (state, plan.abstract_state))
assert layouts[0] == layouts[1]
with Checkpoints(folder / str(link), keep=1) as checkpoints:
    checkpoints.save(link + 1, state, Best(step=link, score=0.25))
leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(hosts.fetch(state))]
stream = plan.broken_images(print).watch(plan.train_batches(2 * link))
batches = []
for batch in sharding.to_devices(stream, plan.mesh, config.batch_size):
    rows = len(sharding.local_rows(plan.mesh, config.batch_size))
    assert rows == told["rows"], rows
    batches.append(hosts.fetch(batch))
    if len(batches) == 2:
        break
stream.close()
if hosts.is_first():
    np.savez(
        folder / f"{link}.npz",
        image=np.stack([b["image"] for b in batches]),
        label=np.stack([b["label"] for b in batches]),
        **{f"leaf{i}": leaf for i, leaf in enumerate(leaves)},
    )
"""


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def _group(code: str, processes: int, argument, devices=1, environment=None) -> list[str]:
    """What the processes printed; `argument` and `environment` are given a process's number."""
    environment = environment or (lambda number: {})
    started = [
        fork_server.start(
            ["-c", code, json.dumps(argument(number))],
            {
                **os.environ,
                "XLA_FLAGS": f"{_QUICK} --xla_force_host_platform_device_count={devices}",
                **environment(number),
            },
            anew=number > 0,  # hosts do not share the seed of Python's hashes
        )
        for number in range(processes)
    ]
    try:
        printed = [process.communicate(timeout=600) for process in started]
        assert all(process.returncode == 0 for process in started), printed
        return [out for out, _ in printed]
    finally:
        for process in started:
            process.kill()


@pytest.mark.slow
def test_state_and_data_go_on_over_any_number_of_processes(tmp_path):
    """2x4, 1x8, 4x2, 1x1: the state bit for bit, the batches without a repeat or a gap."""
    links = [
        # processes, devices of each, mesh, rows of the batch that each process reads
        (2, 4, {"data": 2, "fsdp": 2, "spatial": 2}, 4),
        (1, 8, {"data": 1, "fsdp": 8, "spatial": 1}, 8),
        (4, 2, {"data": 2, "fsdp": 1, "spatial": 4}, 4),  # an image's rows in two processes
        (1, 1, {"data": 1, "fsdp": 1, "spatial": 1}, 8),
    ]
    for link, (processes, devices, mesh, rows) in enumerate(links):
        port = _free_port()
        base = {"folder": str(tmp_path), "link": link, "mesh": mesh, "rows": rows}
        base |= {"processes": processes, "devices": devices}

        def argument(number, processes=processes, port=port, base=base):
            group = {"coordinator": f"127.0.0.1:{port}", "num_processes": processes}
            return base | {"distributed": group | {"process_id": number}}

        _group(_LINK, processes, argument, devices=devices)

    found = [dict(np.load(tmp_path / f"{link}.npz")) for link in range(len(links))]
    names = [name for name in found[0] if name.startswith("leaf")]
    assert len(names) > 50
    for one in found[1:]:
        for name in names:
            assert one[name].dtype == found[0][name].dtype
            np.testing.assert_array_equal(one[name], found[0][name])

    source = sources.open_source("digits", "train")
    config = digits.get_config()
    record = {
        "size": list(config.data.size),
        "crop_fraction": config.data.crop_fraction,
        "interpolation": config.data.interpolation,
        "mean": list(config.data.mean),
        "std": list(config.data.std),
    }
    stream = loader.train_batches(
        source, record=record, augment=config.augment.to_dict(), batch_size=8, seed=0, threads=0
    )
    with contextlib.closing(BrokenImages(source, 0, print).watch(stream)) as batches:
        whole = list(itertools.islice(batches, 2 * len(links)))
    for name in ("image", "label"):
        read = np.concatenate([one[name] for one in found])
        np.testing.assert_array_equal(read, np.stack([batch[name] for batch in whole]))


# A run of a segmenter; the validation set has five images of different sizes.
_SEGMENT = """
import json, sys
from configs import folder_segmentation
from vvt_jax.train import train_and_evaluate

told = json.loads(sys.argv[1])
config = folder_segmentation.get_config("vvt_nano,fpn")
config.total_steps = config.eval_every_steps = config.checkpoint_every_steps = 2
config.batch_size = 4
config.model.embed_dims, config.model.num_heads = (8,) * 4, (1,) * 4
config.model.head_channels = 8
config.model.clamp = False
config.data.data_dir = told["data"]
config.data.train_split, config.data.validation_split = "train", "val"
config.data.size = (32, 32)
config.data.threads = 1
config.distributed.update(told["distributed"])
metrics = train_and_evaluate(config, told["workdir"])
clocked = ("train/images_per_second", "train/data_wait")
print(json.dumps({name: value for name, value in metrics.items() if name not in clocked}))
"""


@pytest.mark.slow
def test_a_segmenter_is_measured_exactly_over_processes(scenes, tmp_path):
    """Batch norm over the group, and a confusion matrix summed over uneven shares."""
    found = {}
    for processes in (1, 2):
        workdir = tmp_path / str(processes)
        port = _free_port()

        def argument(number, processes=processes, port=port, workdir=workdir):
            group = {"coordinator": f"127.0.0.1:{port}", "num_processes": processes}
            told = {"data": str(scenes), "workdir": str(workdir)}
            return told | {"distributed": group | {"process_id": number} if processes > 1 else {}}

        printed = _group(_SEGMENT, processes, argument, devices=2 // processes)
        measured = [json.loads(out.splitlines()[-1]) for out in printed]
        assert all(one == measured[0] for one in measured)
        found[processes] = measured[0]
        assert len(list((workdir / "pictures").iterdir())) == 1
    assert found[1]["eval/examples"] == found[2]["eval/examples"] == 5
    assert found[2]["train/loss"] == pytest.approx(found[1]["train/loss"], rel=1e-5)
    assert found[2]["eval/loss"] == pytest.approx(found[1]["eval/loss"], rel=1e-3)
    for name in ("eval/miou", "eval/pixel_accuracy"):  # a tie or two may fall otherwise
        assert found[2][name] == pytest.approx(found[1][name], abs=5e-3)


_JOIN = """
import json, sys
from configs import common
from vvt_jax.distributed import hosts

config = common.get_config()
config.distributed.start_timeout = 120
hosts.join(config.distributed, preemptible=False)
import jax, numpy as np
print(jax.process_index(), np.asarray(hosts.gather(np.array([jax.process_index(), 7]))).tolist())
"""


@pytest.mark.slow
def test_joins_a_slurm_step(tmp_path):
    port = _free_port()

    def environment(number):
        return {
            "SLURM_JOB_ID": "1",
            "SLURM_STEP_NODELIST": "127.0.0.1",
            "SLURM_STEP_NUM_TASKS": "2",
            "SLURM_NTASKS": "2",
            "SLURM_PROCID": str(number),
            "SLURM_LOCALID": str(number),
            "JAX_COORDINATOR_PORT": str(port),
        }

    printed = _group(_JOIN, 2, lambda number: None, environment=environment)
    for number, out in enumerate(printed):
        assert out.splitlines()[-1] == f"{number} [[0, 7], [1, 7]]"


@pytest.mark.parametrize(
    ("environment", "cluster"),
    [
        ({}, None),
        # a shell in an allocation, a step of one task, and a step of four
        ({"SLURM_JOB_ID": "1", "SLURM_NTASKS": "4"}, None),
        ({"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1", "SLURM_NTASKS": "4"}, None),
        ({"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "4"}, ("Slurm", "slurm")),
        ({"OMPI_COMM_WORLD_SIZE": "1"}, None),
        (
            {"OMPI_COMM_WORLD_SIZE": "2", "OMPI_MCA_orte_hnp_uri": "1.0;tcp://10.0.0.1:5"},
            ("Open MPI", "ompi"),
        ),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, ("Open MPI", "mpi4py")),
        ({"PMI_SIZE": "2"}, ("MPI", "mpi4py")),
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, ("the TPU pod", None)),
        ({"TPU_WORKER_HOSTNAMES": "localhost"}, None),
        ({"MEGASCALE_NUM_SLICES": "2"}, ("the TPU pod", None)),
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, None),
    ],
    ids=str,
)
def test_who_started_this_process(environment, cluster):
    no_chip = {"TPU_SKIP_MDS_QUERY": "1"}  # as jax sets it
    assert hosts._cluster(environment | no_chip) == cluster


def test_a_process_alone_joins_nothing(monkeypatch):
    distributed = common.get_config().distributed
    hosts.join(distributed, preemptible=True)
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "2")
    distributed.num_processes = 1
    hosts.join(distributed, preemptible=True)
    assert not jax.distributed.is_initialized()
    np.testing.assert_array_equal(hosts.gather(np.arange(3)), [[0, 1, 2]])
    assert hosts.is_first()


def test_without_a_cluster_what_is_missing_is_named():
    distributed = common.get_config().distributed
    distributed.num_processes = 2
    with pytest.raises(UserError) as refused:
        hosts.join(distributed, preemptible=True)
    for field in ("coordinator", "process_id"):
        assert f"config.distributed.{field}" in str(refused.value)
    assert "num_processes" not in str(refused.value)


def test_a_coordinator_that_does_not_answer_is_named():
    distributed = common.get_config().distributed
    distributed.coordinator = f"127.0.0.1:{_free_port()}"
    distributed.num_processes, distributed.process_id = 2, 1
    distributed.start_timeout = 1
    with pytest.raises(UserError, match=r"coordinator=127.0.0.1:\d+ did not answer for 1 s"):
        hosts.join(distributed, preemptible=True)


_ALONE = """
import sys
from configs import common
from vvt_jax.distributed import hosts

config = common.get_config()
config.distributed.coordinator, config.distributed.start_timeout = sys.argv[1], 1
config.distributed.num_processes, config.distributed.process_id = 2, 0
hosts.join(config.distributed, preemptible=False)
"""


_LATE = """
import json, sys, time
from configs import common
from vvt_jax.distributed import failure, hosts

config = common.get_config()
config.distributed.update(json.loads(sys.argv[1]))
hosts.join(config.distributed, preemptible=False)
if config.distributed.process_id == {fails}:
    time.sleep(2)
    failure.end("The disk is full.", 1)
failure.finish()
"""


@pytest.mark.slow
@pytest.mark.parametrize("fails", [0, 1])
def test_a_late_failure_reaches_a_process_that_is_done(fails):
    port = _free_port()
    group = {"coordinator": f"127.0.0.1:{port}", "num_processes": 2}
    started = [
        fork_server.start(["-c", _LATE.replace("{fails}", str(fails)), json.dumps(argument)])
        for argument in ({**group, "process_id": number} for number in range(2))
    ]
    try:
        ends = [process.communicate(timeout=120) for process in started]
    finally:
        for process in started:
            process.kill()
    assert [process.returncode for process in started] == [1, 1], ends
    assert ends[fails][1].endswith("error: The disk is full.\n")
    assert f"error: process {fails} ended the run: The disk is full." in ends[1 - fails][1]


def test_a_group_that_stays_incomplete_ends_with_a_sentence():
    done = fork_server.run(["-c", _ALONE, f"127.0.0.1:{_free_port()}"])
    assert done.returncode == 70
    assert "config.distributed describes was not complete after 1 s" in done.stderr
    assert "Check failure" not in done.stderr


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"coordinator": "localhost"}, "coordinator='localhost' can't be run: it is HOST:PORT"),
        ({"num_processes": 0}, "num_processes=0 can't be run"),
        ({"num_processes": 2, "process_id": 2}, "process_id=2 can't be run: it goes from 0 up to"),
        ({"process_id": -1}, "process_id=-1 can't be run"),
        ({"heartbeat_timeout": 0}, "heartbeat_timeout=0 can't be run: it has to be positive"),
        ({"start_timeout": -1}, "start_timeout=-1 can't be run: it has to be positive"),
    ],
    ids=str,
)
def test_fields_that_can_not_be_meant(fields, words):
    config = common.get_config()
    config.total_steps = 1
    configuration.check_values(config)
    config.distributed.update(fields)
    with pytest.raises(UserError, match=re.escape(f"config.distributed.{words}")):
        configuration.check_values(config)
