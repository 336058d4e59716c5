"""Groups of processes that work together: how they find each other and exchange information.

Each process drives either all devices of a host or a single one. All processes run the same program
with the same config, and see one global mesh of all devices.
"""

import contextlib
import functools
import importlib.util
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from vvt_jax.distributed import failure
from vvt_jax.system.errors import CRASH, UserError

_MARGIN = 60  # seconds that JAX's timeout comes after ours, which explains what is wrong
_EXPLICIT = ("coordinator", "num_processes", "process_id")


class GroupError(UserError):
    """Processes can't find each other, or can't work together."""


class IncompleteGroupError(GroupError):
    """Processes are missing or can't be reached; another attempt may succeed."""


def join(distributed: Mapping[str, Any], *, preemptible: bool) -> None:
    """Join this process to its group. Call this before anything else asks JAX for a device.

    It does nothing in a process that runs alone, that is, if `num_processes=1`, or if the fields
    are not set and there is no sign of a cluster. After joining, a thread ends this process if
    another one of the group fails, see `failure`.

    Args:
        distributed: the fields of `config.distributed`. JAX determines those that are not set from
            the environment: a TPU pod, Slurm, Open MPI, another MPI (with mpi4py) or Kubernetes
            (with jax[k8s]).
        preemptible: whether SIGTERM asks the group to stop at a common step (see `interruption`)
            instead of ending the process as usual.

    Raises:
        GroupError: the fields are inconsistent, or the group can't be joined.
        IncompleteGroupError: the first process doesn't answer.
    """
    given = {name: distributed[name] for name in _EXPLICIT if distributed[name] is not None}
    if jax.distributed.is_initialized():
        failure.watch()
        return
    if distributed["num_processes"] == 1:
        return
    method = None
    if len(given) < len(_EXPLICIT):
        found = _cluster(os.environ)
        if found is None:
            if given:
                missing = ", ".join(f"config.distributed.{n}" for n in _EXPLICIT if n not in given)
                raise GroupError(f"There is no cluster here that could tell {missing}: give it.")
            return
        cluster, method = found
    else:
        cluster = "config.distributed"
    timeout = distributed["start_timeout"]
    # Other processes only: the first one waits for the others in any case.
    if given.get("process_id") and given.get("coordinator"):
        _wait_for(distributed["coordinator"], timeout)
    jax.config.update("jax_enable_preemption_service", preemptible)
    try:
        with _time_limit(timeout, cluster):
            jax.distributed.initialize(
                coordinator_address=distributed["coordinator"],
                num_processes=distributed["num_processes"],
                process_id=distributed["process_id"],
                cluster_detection_method=method,
                initialization_timeout=timeout + _MARGIN,
                heartbeat_timeout_seconds=distributed["heartbeat_timeout"],
            )
    except Exception as error:  # from JAX, MPI or Kubernetes
        reason = str(error).strip().partition("\n")[0][:300]
        passes = isinstance(error, jax.errors.JaxRuntimeError | OSError)
        kind = IncompleteGroupError if passes else GroupError
        raise kind(
            f"The group of processes that {cluster} tells of can't be joined ({reason}): "
            "config.distributed.coordinator=HOST:PORT, num_processes and process_id tell it "
            "otherwise, num_processes=1 works alone."
        ) from error
    failure.watch()


@contextlib.contextmanager
def _time_limit(seconds: float, cluster: str) -> Iterator[None]:
    """End the program if the group is not complete in time, before JAX aborts it."""

    def end() -> None:
        print(
            f"error: The group of processes that {cluster} describes was not complete after "
            f"{seconds} s: are all of them running, and can they reach process 0? "
            "config.distributed.start_timeout gives them more time.",
            file=sys.stderr,
            flush=True,
        )
        os._exit(CRASH)

    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _cluster(environment: Mapping[str, str]) -> tuple[str, str | None] | None:
    """Detect the system that started this process as one of several.

    Returns:
        The system's name for messages, and JAX's name for the detection method if it must be set
        explicitly; None if the process runs alone.
    """

    def more_than_one(name: str) -> bool:
        return environment.get(name, "1").strip() not in ("", "1")

    # Count the tasks of the step, not the job: a shell in an allocation of four tasks runs alone.
    if "SLURM_PROCID" in environment and more_than_one("SLURM_STEP_NUM_TASKS"):
        return "Slurm", "slurm"
    if more_than_one("OMPI_COMM_WORLD_SIZE"):
        # Since version 5, Open MPI no longer provides the address of its first process.
        return "Open MPI", "ompi" if "OMPI_MCA_orte_hnp_uri" in environment else "mpi4py"
    if more_than_one("PMI_SIZE"):
        return "MPI", "mpi4py"
    hosts = environment.get("TPU_PROCESS_ADDRESSES") or environment.get("TPU_WORKER_HOSTNAMES", "")
    if "," in hosts or more_than_one("MEGASCALE_NUM_SLICES"):
        return "the TPU pod", None
    # JAX sets this variable if there is no TPU chip; if there is one, it queries the machine.
    if importlib.util.find_spec("libtpu") and "TPU_SKIP_MDS_QUERY" not in environment:
        return "the TPU pod", None
    indexed = "KUBERNETES_SERVICE_HOST" in environment and "JOB_COMPLETION_INDEX" in environment
    if indexed and importlib.util.find_spec("kubernetes"):
        return "Kubernetes", None
    return None


def _wait_for(coordinator: str, timeout: float) -> None:
    """Wait until process 0 listens, since JAX would end the program without an exception."""
    host, _, port = coordinator.rpartition(":")
    end = time.monotonic() + timeout
    while True:
        try:
            with socket.create_connection((host.strip("[]"), int(port)), timeout=5):
                return
        except OSError as error:
            if time.monotonic() > end:
                raise IncompleteGroupError(
                    f"config.distributed.coordinator={coordinator} did not answer for {timeout} s "
                    f"({error}): is process 0 running there, and is the port reachable?"
                ) from error
            time.sleep(0.1)


def is_first() -> bool:
    """Return whether this is the process that writes the files that are written only once."""
    return jax.process_index() == 0


def fetch(tree: Any) -> Any:
    """Return a tree of arrays on one mesh as whole NumPy arrays; all processes must call this."""
    if jax.process_count() > 1:
        mesh = jax.tree.leaves(tree)[0].sharding.mesh
        tree = _replicate(mesh)(tree)  # one program for all; JAX's own would be one per shape
    return jax.device_get(tree)


def gather(values: np.ndarray) -> jax.Array:
    """Gather the values of all processes, `[processes, *values.shape]`; all must call this.

    It doesn't wait for the result: as with any array on the devices, reading it does.
    """
    mesh = _processes()
    layout = NamedSharding(mesh, PartitionSpec("process"))
    shape = (mesh.shape["process"], *values.shape)
    return _replicate(mesh)(jax.make_array_from_process_local_data(layout, values[None], shape))


def union(numbers: Collection[int]) -> tuple[int, ...]:
    """Return the sorted union of the numbers of all processes, all of which must call this."""
    if jax.process_count() == 1:
        return tuple(sorted(numbers))
    theirs = _exchange(json.dumps(list(numbers)).encode())
    return tuple(sorted({number for text in theirs for number in json.loads(text)}))


def check_agreement(values: Mapping[str, Any]) -> None:
    """Check that values are the same in all processes, all of which must call this.

    Args:
        values: JSON values by name, such as `config.seed`.

    Raises:
        GroupError: values differ from those of the first process. All processes raise this error.
    """
    if jax.process_count() == 1:
        return
    theirs = [json.loads(text) for text in _exchange(json.dumps(values).encode())]
    if differences := list(_differences(theirs)):
        raise GroupError(
            f"The processes of this run do not agree: {'; '.join(differences)}. Start all of them "
            "with the same command and the same files."
        )


def _exchange(text: bytes) -> list[bytes]:
    """Return the texts of all processes, in the order of the processes."""
    lengths = np.asarray(gather(np.array([len(text)], np.int32)))[:, 0]
    padded = np.zeros(int(lengths.max()), np.uint8)
    padded[: len(text)] = np.frombuffer(text, np.uint8)
    rows = np.asarray(gather(padded))
    return [row[:length].tobytes() for row, length in zip(rows, lengths, strict=True)]


def _differences(theirs: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    first = theirs[0]
    for name in sorted({name for values in theirs for name in values}):
        expected = first.get(name)
        for number, values in enumerate(theirs):
            if (value := values.get(name)) != expected:
                yield f"process {number} has {name}={value!r}, and process 0 has {expected!r}"
                break


@functools.cache
def _processes() -> Mesh:
    devices = sorted(jax.devices(), key=lambda device: (device.process_index, device.id))
    return Mesh(np.array(devices).reshape(jax.process_count(), -1), ("process", "device"))


@functools.cache
def _replicate(mesh: Mesh) -> Any:
    return jax.jit(lambda x: x, out_shardings=NamedSharding(mesh, PartitionSpec()))
