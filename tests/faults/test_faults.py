"""No fault loses more than the steps since the last checkpoint.

The short form, which `-m slow` runs, has each kind of fault a few times; the full one has them
often enough to be counted, and leaves the counts in experiments/faults:

    python -m pytest tests/faults -m slow --full
"""

import concurrent.futures
import contextlib
import hashlib
import resource
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from tests.faults.harness import (
    checkpoints,
    lines,
    resumed_at,
    told,
    unfinished,
    wait_for_handler,
    wait_for_step,
    wait_for_writing,
    wait_until,
)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="asks the system about its processes"),
]
_SEED = 20


def _moments(rng, kinds, end):
    """(kind, step, seconds after it) of the faults of one run, in their order."""
    steps = np.sort(rng.choice(np.arange(1, end * 3 // 5), size=len(kinds), replace=False))
    return list(zip(kinds, steps.tolist(), rng.uniform(0, 0.1, len(kinds)).tolist(), strict=True))


def _in_runs(rng, kinds, each, steps):
    """Moments for several runs of so many steps, of so many faults each."""
    kinds = [kinds[index] for index in rng.permutation(len(kinds))]
    return [_moments(rng, kinds[i : i + each], steps) for i in range(0, len(kinds), each)]


def _reported(workdir):
    """The last step that a run has told of before it is started again."""
    found = lines(workdir)
    return found[-1]["step"] if found else 0


def _each(function, runs, root):
    """Two runs at a time."""
    folders = [root / str(index) for index in range(len(runs))]
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        return folders, [one for many in pool.map(function, folders, runs) for one in many]


def test_killed_at_random_moments(faulty, straight, differences, tmp_path, full, results):
    rng = np.random.default_rng(_SEED)
    anywhere, writing = (15, 15) if full else (1, 1)
    kinds = ["anywhere"] * anywhere + ["writing"] * writing
    runs = _in_runs(rng, kinds, 5 if full else 2, faulty.steps)
    if not full:  # one kill is before the first checkpoint
        runs = [[("anywhere", 2, 0.05), ("writing", 25, 0.05)]]

    def kill(workdir, moments):
        found = []
        for kind, step, delay in moments:
            reported = _reported(workdir)
            process = faulty.start(workdir)
            wait_for_step(process, workdir, max(step, reported + 1))
            if kind == "writing":
                wait_for_writing(process, workdir)
                time.sleep(delay / 20)
            else:
                time.sleep(delay)
            assert process.poll() is None
            process.kill()
            process.communicate()
            found.append({"step": _reported(workdir), "writing": any(unfinished(workdir))})
        step = resumed_at(faulty(workdir, anew=True))
        assert found[-1]["step"] - 20 < step <= found[-1]["step"]
        return found

    folders, kills = _each(kill, runs, tmp_path)
    differ = [differences(workdir) for workdir in folders]
    identical = sum(len(run) for run, found in zip(runs, differ, strict=True) if not found)
    inside = sum(one["writing"] for one in kills)
    results["kill -9"] = {
        "kills": len(kills),
        "inside a checkpoint's writing": inside,
        "before the first step": sum(one["step"] < 1 for one in kills),
        "ended bit-identical": identical,
        "at steps": [one["step"] for one in kills],
    }
    assert not any(differ), differ
    assert identical == len(kills) == anywhere + writing
    assert all(one["step"] >= 1 for one in kills)
    assert inside >= (10 if full else 1)


def test_interrupted_at_random_moments(faulty, differences, tmp_path, full, results):
    rng = np.random.default_rng(_SEED + 1)
    kinds = [("SIGTERM", "running"), ("SIGINT", "starting")]
    if full:
        both = ("SIGTERM", "SIGINT")
        kinds = [(name, "running") for name in both for _ in range(8)]
        kinds += [(name, "starting") for name in both for _ in range(2)]

    def interrupt(workdir, moments):
        found = []
        for (name, when), step, delay in moments:
            signum, reported = signal.Signals[name], _reported(workdir)
            process = faulty.start(workdir)
            if when == "starting":
                wait_for_handler(process, signal.SIGTERM)
                time.sleep(10 * delay)
            else:
                wait_for_step(process, workdir, max(step, reported + 1))
                time.sleep(delay)
            assert process.poll() is None
            process.send_signal(signum)
            sent = time.monotonic()
            done = faulty.finish(process)
            seconds = time.monotonic() - sent
            assert "Traceback" not in done.stderr
            saved = int(done.stderr.split(f"{name}: saved at step ")[1].split(";")[0])
            kept = done.returncode == 128 + signum and checkpoints(workdir)[-1] == saved
            found.append(
                {"signal": name, "when": when, "step": saved, "kept": kept, "seconds": seconds}
            )
        assert resumed_at(faulty(workdir)) == found[-1]["step"]
        return found

    runs = _in_runs(rng, kinds, 5 if full else 2, faulty.steps)
    folders, signals = _each(interrupt, runs, tmp_path)
    differ = [differences(workdir) for workdir in folders]
    slowest = max(one["seconds"] for one in signals)
    results["SIGTERM and SIGINT"] = {
        "SIGTERM": sum(one["signal"] == "SIGTERM" for one in signals),
        "SIGINT": sum(one["signal"] == "SIGINT" for one in signals),
        "while starting": sum(one["when"] == "starting" for one in signals),
        "saved, with the shell's exit status": sum(one["kept"] for one in signals),
        "resumed bit-identical": sum(
            len(run) for run, found in zip(runs, differ, strict=True) if not found
        ),
        "slowest exit, seconds": round(slowest, 2),
        "at steps": [one["step"] for one in signals],
    }
    assert len(signals) == len(kinds)
    assert all(one["kept"] for one in signals), signals
    assert not any(differ), differ


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 48 MB of its own, where the system lets us have one."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=48m", "none", str(disk)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a small disk is not allowed here")
    yield disk
    subprocess.run(["umount", "--lazy", str(disk)], check=True)


def _fill(disk, spare):
    """Takes all space of a disk but so many bytes."""
    free = shutil.disk_usage(disk).free - spare
    with contextlib.suppress(OSError):  # the run was quicker to take the last of it
        (disk / "filler").write_bytes(b"\0" * max(free, 0))


@pytest.mark.parametrize("place", ["limit", "disk"])
def test_no_room_for_a_checkpoint_or_for_metrics(
    faulty, differences, request, tmp_path, place, full, results
):
    if place == "limit" and not full:
        pytest.skip("in the full form")
    disk = request.getfixturevalue("small_disk") if place == "disk" else tmp_path
    workdir = disk / "run"

    def without_room(process, size):
        if place == "limit":
            resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (size, size))
        else:
            _fill(disk, spare=size)

    process = faulty.start(workdir)
    wait_for_step(process, workdir, 2)
    wait_until(process, lambda: bool(checkpoints(workdir)))
    before = checkpoints(workdir)
    without_room(process, 64_000 if place == "disk" else 32_000)
    sentence = told(faulty.finish(process), alone=False)
    # Whichever notices first: a checkpoint is written in the background.
    told_of = f"A checkpoint can't be written into {workdir / 'checkpoints'} (", str(workdir)
    assert sentence.removeprefix("error: ").startswith(told_of)
    assert "can't be written" in sentence
    assert before[-1] in checkpoints(workdir)
    (disk / "filler").unlink(missing_ok=True)

    process = faulty.start(workdir, "--config.checkpoint_every_steps=1000")
    newest = checkpoints(workdir)
    # Lines of later steps are there, until the run is resumed
    wait_until(process, lambda: all(x["step"] <= newest[-1] for x in lines(workdir)))
    wait_for_step(process, workdir, newest[-1] + 5)
    without_room(process, 0 if place == "disk" else (workdir / "metrics.jsonl").stat().st_size)
    sentence = told(faulty.finish(process), alone=False)
    assert "can't be written (" in sentence
    assert "with room on the disk, the same command goes on" in sentence
    assert checkpoints(workdir) == newest
    (disk / "filler").unlink(missing_ok=True)

    assert resumed_at(faulty(workdir)) == newest[-1]
    differ = differences(workdir)
    results[f"no room ({'a full disk' if place == 'disk' else 'a limit on the size of files'})"] = {
        "during a checkpoint: told, exit status 1, the one before it resumed from": 1,
        "during metrics: told, exit status 1, the checkpoint resumed from": 1,
        "ended bit-identical": int(not differ),
    }
    assert not differ


@pytest.fixture(scope="module")
def stopped(faulty, tmp_path_factory):
    """A run that stopped with two checkpoints, on the way."""
    workdir = tmp_path_factory.mktemp("stopped")
    process = faulty.start(workdir)
    wait_for_step(process, workdir, 32)
    process.terminate()
    assert faulty.finish(process).returncode == 143
    assert len(checkpoints(workdir)) == 2
    return workdir


def _files(checkpoint):
    """Those that the restored state and bookkeeping come from."""
    files = [path for item in ("state", "bookkeeping") for path in (checkpoint / item).rglob("*")]
    return sorted(p for p in files if p.is_file() and p.stat().st_size)


def _flip(checkpoint, rng):
    path = _files(checkpoint)[rng.integers(len(_files(checkpoint)))]
    content = bytearray(path.read_bytes())
    content[rng.integers(len(content))] ^= 1 << rng.integers(8)
    path.write_bytes(content)


def _truncate(checkpoint, rng):
    path = _files(checkpoint)[rng.integers(len(_files(checkpoint)))]
    path.write_bytes(path.read_bytes()[: rng.integers(path.stat().st_size)])


def _remove(checkpoint, rng):
    _files(checkpoint)[rng.integers(len(_files(checkpoint)))].unlink()


@pytest.mark.parametrize("damage", [_flip, _truncate, _remove], ids=lambda f: f.__name__[1:])
def test_a_damaged_newest_checkpoint_is_passed_over(
    faulty, stopped, differences, tmp_path, damage, full, results
):
    if damage is not _flip and not full:
        pytest.skip("in the full form")
    rng = np.random.default_rng([_SEED, len(damage.__name__)])
    older, newest = checkpoints(stopped)
    differ = []
    for count in range(4 if full else 1):
        workdir = tmp_path / str(count)
        shutil.copytree(stopped, workdir)
        damage(workdir / "checkpoints" / str(newest), rng)
        done = faulty(workdir)
        assert resumed_at(done) == older
        assert f"The checkpoint {workdir / 'checkpoints' / str(newest)} is damaged (" in done.stdout
        assert f"it is now {newest}.damaged. Going on from the one of step {older}." in done.stdout
        assert (workdir / "checkpoints" / f"{newest}.damaged").is_dir()
        differ.append(differences(workdir))
    results[f"damaged newest checkpoint: {damage.__name__[1:]}"] = {
        "found, told, gone on from the one before, ended bit-identical": differ.count([])
    }
    assert not any(differ), differ


def test_without_a_sound_checkpoint_the_run_is_refused(faulty, stopped, tmp_path, results):
    workdir = tmp_path / "run"
    shutil.copytree(stopped, workdir)
    rng = np.random.default_rng(_SEED)
    for step in checkpoints(stopped):
        _flip(workdir / "checkpoints" / str(step), rng)
    before = _contents(workdir)
    sentence = faulty.refused(workdir)
    assert f"{checkpoints(stopped)[-1]} is damaged (" in sentence
    assert "there is no sound one before it" in sentence
    assert _contents(workdir) == before
    results["all checkpoints damaged"] = {"refused by name, nothing changed": 1}


def test_another_model_is_refused_by_name(faulty, stopped, tmp_path, results):
    sentence = faulty.refused(stopped, "--config.model.embed_dims=(8,8,16,32)")
    assert "holds a run with another config: config.model.embed_dims (" in sentence
    workdir = tmp_path / "run"  # as if the checkpoints came from elsewhere
    shutil.copytree(stopped / "checkpoints", workdir / "checkpoints")
    sentence = faulty.refused(workdir, "--config.model.embed_dims=(8,8,16,32)")
    assert f"{checkpoints(stopped)[-1]} is of another model or optimizer: " in sentence
    assert checkpoints(workdir) == checkpoints(stopped)
    results["another config, another model"] = {"refused by name": 2}


def _contents(workdir):
    return {
        str(path.relative_to(workdir)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in workdir.rglob("*")
        if path.is_file() and path.name != "lock" and "tfevents" not in path.name
    }


def test_a_second_run_in_a_workdir_is_refused(faulty, differences, tmp_path, results):
    first = faulty.start(tmp_path)
    wait_for_step(first, tmp_path, 1)
    sentence = faulty.refused(tmp_path)
    assert f"Another run is going on in {tmp_path}: " in sentence
    done = faulty.finish(first)
    assert done.returncode == 0, done.stderr
    differ = differences(tmp_path)
    results["two runs in a workdir"] = {
        "the second refused, the first ended bit-identical": int(not differ)
    }
    assert not differ


def test_too_many_skipped_updates_end_the_run(faulty, tmp_path, full, results):
    if not full:  # another limit is another program, which has to be compiled
        pytest.skip("in the full form")
    sentence = faulty.refused(tmp_path, "--config.optimizer.skip_nonfinite=2")
    assert "The loss or its gradient is not finite at step " in sentence
    assert max(line["train/skipped"] for line in lines(tmp_path)) == 2
    results["non-finite loss"] = {"skipped, counted, and ended at the limit of 2": 1}
