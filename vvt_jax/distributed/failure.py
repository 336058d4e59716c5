"""Ending all processes of a group, with one message, when one of them fails.

Without this module, the others would wait in a collective until a heartbeat is missed. JAX would
then abort them with a C++ stack trace that doesn't show the reason.
"""

import atexit
import contextlib
import json
import os
import sys
import threading
import time
from dataclasses import asdict, dataclass
from typing import NoReturn

import jax
from jax._src import distributed  # the client isn't public; Orbax takes it from here, too

_KEY = "vvt_jax/failure"
_DONE, _LEFT = "vvt_jax/done", "vvt_jax/left"  # folders of keys: who has succeeded, or left
_LOOK = 1.0  # seconds between checks
_GRACE = 10.0  # seconds a process gets to end by itself, so that it can finish saving
_PATIENCE = 15.0  # seconds that a leaving process waits for the others to leave


@dataclass(frozen=True)
class Failure:
    """The reason why a group ends.

    Attributes:
        process: the number of the process that failed first.
        message: the message that it printed, without `error: `.
        status: the exit status of all processes.
    """

    process: int
    message: str
    status: int


def watch() -> None:
    """Start a thread that ends this process soon after another one of its group has failed.

    Call this after joining the group. The thread is needed because a process that waits in a
    collective can't notice the failure. It first gives the program ten seconds to end by itself.
    """
    if _watching.is_set():
        return
    _watching.set()
    threading.Thread(target=_watch, name="failure-watch", daemon=True).start()
    atexit.register(_ending.set)


def finish() -> None:
    """Wait at the end of a successful program until the other processes are done, too.

    Otherwise this process would wait for them in JAX's own exit handler, which would abort it if
    one of them failed later. If a process is lost, the wait ends because JAX aborts all of them.
    """
    if _client() is None:
        return
    _say(_DONE)
    while not _have_said(_DONE):
        if failure := _failure():
            _leave(failure)
        time.sleep(_LOOK / 10)


def announce(message: str, status: int) -> None:
    """Make all processes of the group, including this one, end within about ten seconds.

    They get this time to end by themselves. This is for failures in the background that leave the
    program waiting for another process.
    """
    client = _client()
    if client is None:
        return
    mine = Failure(distributed.global_state.process_id, message, status)
    with contextlib.suppress(jax.errors.JaxRuntimeError):  # another process announced one first
        client.key_value_set(_KEY, json.dumps(asdict(mine)))


def end(message: str, status: int, *, at_once: bool = False) -> NoReturn:
    """Print why the program ends, and end it with all other processes of its group.

    Args:
        message: one sentence. If another process failed first, its message is printed instead.
        status: the exit status, see `vvt_jax.system.errors`.
        at_once: whether to skip what libraries do when Python exits.
    """
    _ending.set()
    if _client() is None:
        print(f"error: {message}", file=sys.stderr, flush=True)
        if at_once:
            os._exit(status)
        sys.exit(status)
    announce(message, status)
    _leave(_failure() or Failure(distributed.global_state.process_id, message, status))


def has_happened() -> bool:
    """Return whether a process of the group has failed, which may have caused other errors."""
    return _failure() is not None


_watching = threading.Event()
_ending = threading.Event()  # set once the program ends by itself
_leaving = threading.Lock()  # never released, so that only one thread prints the message


def _client():
    """Return the connection to process 0, or None if the program isn't watched or has left."""
    return distributed.global_state.client if _watching.is_set() else None


def _failure() -> Failure | None:
    client = _client()
    if client is None:
        return None
    try:
        return Failure(**json.loads(client.key_value_try_get(_KEY)))
    except jax.errors.JaxRuntimeError:  # there is none, or process 0 is gone
        return None


def _watch() -> None:
    while not _ending.wait(_LOOK):
        failure = _failure()
        if failure is not None:
            if not _ending.wait(_GRACE):
                _leave(failure)
            return


def _leave(failure: Failure) -> NoReturn:
    """End this process without the exit handlers that would wait for the others."""
    _leaving.acquire()
    try:
        # Not from jax.process_index(), whose first call waits for the other processes.
        process = distributed.global_state.process_id
        by = "" if failure.process == process else f"process {failure.process} ended the run: "
        print(f"error: {by}{failure.message}", file=sys.stderr, flush=True)
        sys.stdout.flush()
        _say(_LEFT)
        end = time.monotonic() + _PATIENCE
        while time.monotonic() < end and not _have_said(_LEFT):
            time.sleep(_LOOK / 10)
        if process == 0:  # JAX aborts the others if it leaves before them
            time.sleep(_LOOK)
    finally:
        os._exit(failure.status)


def _say(what: str) -> None:
    client, process = _client(), distributed.global_state.process_id
    with contextlib.suppress(jax.errors.JaxRuntimeError):
        client.key_value_set(f"{what}/{process}", "", allow_overwrite=True)


def _have_said(what: str) -> bool:
    """Return whether all processes have set a key in the folder, or process 0 is gone."""
    try:
        said = _client().key_value_dir_get(what)
    except jax.errors.JaxRuntimeError:  # process 0 is gone
        return True
    return len(said) == distributed.global_state.num_processes
