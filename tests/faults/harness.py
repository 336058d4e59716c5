"""Runs as processes, and what they leave."""

import contextlib
import dataclasses
import json
import os
import re
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp

from tests import fork_server
from tests.fork_server import Process

ROOT = Path(__file__).parent.parent.parent
_TIMEOUT = 600  # seconds, of anything that is waited for


@dataclasses.dataclass
class Faulty:
    """`python -m vvt_jax.main` on the small run, as a process."""

    images: Path
    cache: Path
    steps: int

    def start(self, workdir: Path, *flags: str, anew: bool = False) -> Process | subprocess.Popen:
        """By a fork, or `anew` by Python itself, whose hashes then have another seed."""
        command = ["-m", "vvt_jax.main", "--config=tests/faults/tiny.py", f"--workdir={workdir}"]
        command += [f"--config.data.data_dir={self.images}", f"--config.total_steps={self.steps}"]
        command += [f"--config.compilation_cache={self.cache}", *flags]
        return fork_server.start(command, {**os.environ, "XLA_FLAGS": ""}, anew=anew)

    def finish(self, process: Process | subprocess.Popen) -> subprocess.CompletedProcess:
        try:
            out, err = process.communicate(timeout=_TIMEOUT)
        finally:
            process.kill()
        return subprocess.CompletedProcess(process.args, process.returncode, out, err)

    def __call__(
        self, workdir: Path, *flags: str, anew: bool = False
    ) -> subprocess.CompletedProcess:
        return self.finish(self.start(workdir, *flags, anew=anew))

    def refused(self, workdir: Path, *flags: str) -> str:
        """The sentence with which a run ends at once."""
        return told(self(workdir, *flags))


def told(done: subprocess.CompletedProcess, *, alone: bool = True) -> str:
    """The sentence with which a run ended in an error.

    Not `alone`, libraries may have printed tracebacks before it: where a disk is full,
    TensorStore's threads do, past Python's logging.
    """
    assert done.returncode == 1, done.stderr
    assert not alone or "Traceback" not in done.stderr, done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("error: ")
    return last


def lines(workdir: Path) -> list[dict]:
    """Of metrics.jsonl; the last one may be torn."""
    path = workdir / "metrics.jsonl"
    found = []
    for line in path.read_text().splitlines() if path.exists() else ():
        with contextlib.suppress(json.JSONDecodeError):
            found.append(json.loads(line))
    return found


def wait_for_step(process: Process, workdir: Path, step: int) -> None:
    """Until the run has reported that step, or a later one."""

    def reported() -> bool:
        path = workdir / "metrics.jsonl"
        numbers = re.findall(r'"step": (\d+),', path.read_text()) if path.exists() else ()
        return bool(numbers) and int(numbers[-1]) >= step

    wait_until(process, reported)


def wait_for_writing(process: Process, workdir: Path) -> None:
    """Until a checkpoint is being written."""
    wait_until(process, lambda: any(unfinished(workdir)), pause=0.0005)


def wait_for_handler(process: Process, signum: int) -> None:
    """Until the process no longer dies of the signal."""

    def caught() -> bool:
        try:
            status = Path(f"/proc/{process.pid}/status").read_text()
        except FileNotFoundError:  # it has ended
            return False
        mask = int(status.split("SigCgt:")[1].split()[0], 16)
        return bool(mask >> (signum - 1) & 1)

    wait_until(process, caught)


def wait_until(process: Process, condition: Callable[[], bool], pause: float = 0.005) -> None:
    deadline = time.monotonic() + _TIMEOUT
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(pause)


def resumed_at(done: subprocess.CompletedProcess) -> int:
    """The step at which a run went on, 0 if it started anew; it has to have come to its end."""
    assert done.returncode == 0, done.stderr
    found = re.search(r"Resumed at step (\d+) of", done.stdout)
    return int(found[1]) if found else 0


def checkpoints(workdir: Path) -> list[int]:
    """Steps of those that are complete."""
    folder = workdir / "checkpoints"
    return sorted(int(path.name) for path in folder.iterdir() if path.name.isdigit())


def unfinished(workdir: Path) -> Iterator[Path]:
    """What is being written, or was when the run was killed."""
    return (workdir / "checkpoints").glob("*.orbax-checkpoint-tmp*")


def saved_state(workdir: Path):
    """All arrays of the newest checkpoint, as numpy's."""
    handler = ocp.PyTreeCheckpointHandler()
    with ocp.Checkpointer(handler) as checkpointer:
        path = (workdir / "checkpoints" / str(checkpoints(workdir)[-1]) / "state").absolute()
        tree = checkpointer.metadata(path).item_metadata.tree
        restore = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
        return checkpointer.restore(path, args=ocp.args.PyTreeRestore(restore_args=restore))
