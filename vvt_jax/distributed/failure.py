"""Ends all processes of a group, with one message, when one of them fails.

Without this, the others wait in a collective until a heartbeat is missed, and jax then aborts them
with a stack of C++ that says nothing about the reason.
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
from jax._src import distributed  # its client has no public name; orbax takes it from here, too

_KEY = "vvt_jax/failure"
_DONE, _LEFT = "vvt_jax/done", "vvt_jax/left"  # folders of keys: processes that succeeded, or left
_LOOK = 1.0  # seconds between looks
_GRACE = 10.0  # seconds that a process gets to end by itself, so that it completes what it saves
_PATIENCE = 15.0  # seconds that a process that leaves waits for the others to do so


@dataclass(frozen=True)
class Failure:
    """Why a group ends.

    Attributes:
        process: number of the process that failed first.
        message: that it printed, without `error: `.
        status: exit status of all processes.
    """

    process: int
    message: str
    status: int


def watch() -> None:
    """Ends this process soon after another one of its group has failed; call it after joining.

    A process that waits in a collective can't notice by itself. The watch is a thread; it gives the
    program ten seconds to end by itself first.
    """
    if _watching.is_set():
        return
    _watching.set()
    threading.Thread(target=_watch, name="failure-watch", daemon=True).start()
    atexit.register(_ending.set)


def finish() -> None:
    """Waits at the end of a successful program until the others are done, too.

    Otherwise a failure after that would find this process waiting for the others in jax's own
    handler, which would abort it. A process that is lost ends the wait, since jax then aborts all.
    """
    if _client() is None:
        return
    _say(_DONE)
    while not _have_said(_DONE):
        if failure := _failure():
            _leave(failure)
        time.sleep(_LOOK / 10)


def announce(message: str, status: int) -> None:
    """Lets all processes of the group end in ten seconds, this one included, unless they end by
    themselves. For failures in the background that leave the program waiting for another process.
    """
    client = _client()
    if client is None:
        return
    mine = Failure(distributed.global_state.process_id, message, status)
    with contextlib.suppress(jax.errors.JaxRuntimeError):  # another process was first
        client.key_value_set(_KEY, json.dumps(asdict(mine)))


def end(message: str, status: int, *, at_once: bool = False) -> NoReturn:
    """Prints why the program ends, and ends it and all other processes of its group.

    Args:
        message: one sentence. If another process has failed before, that one's is printed instead.
        status: exit status, see `vvt_jax.system.errors`.
        at_once: leave out what libraries do when Python exits.
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
    """Whether a process of the group has failed, which other errors may then follow from."""
    return _failure() is not None


_watching = threading.Event()
_ending = threading.Event()  # set once the program ends by itself
_leaving = threading.Lock()  # never released: the main thread and the watch print one message


def _client():
    """The connection to process 0; None in a program that is not watched or has left its group."""
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
    """Ends this process without the handlers that would wait for the others."""
    _leaving.acquire()
    try:
        # Not asked of jax.process_index(), which waits for the others the first time
        process = distributed.global_state.process_id
        by = "" if failure.process == process else f"process {failure.process} ended the run: "
        print(f"error: {by}{failure.message}", file=sys.stderr, flush=True)
        sys.stdout.flush()
        _say(_LEFT)
        end = time.monotonic() + _PATIENCE
        while time.monotonic() < end and not _have_said(_LEFT):
            time.sleep(_LOOK / 10)
        if process == 0:  # jax aborts the others when it goes before them
            time.sleep(_LOOK)
    finally:
        os._exit(failure.status)


def _say(what: str) -> None:
    client, process = _client(), distributed.global_state.process_id
    with contextlib.suppress(jax.errors.JaxRuntimeError):
        client.key_value_set(f"{what}/{process}", "", allow_overwrite=True)


def _have_said(what: str) -> bool:
    """Whether all processes have, or can't be asked any more."""
    try:
        said = _client().key_value_dir_get(what)
    except jax.errors.JaxRuntimeError:  # process 0 is gone
        return True
    return len(said) == distributed.global_state.num_processes
