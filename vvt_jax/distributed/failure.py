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
_DONE = "vvt_jax/done"  # a folder of keys: the processes that have nothing left to do
_LOOK = 1.0  # seconds between looks
_GRACE = 10.0  # seconds that a process gets to end by itself, so that it completes what it saves
_PATIENCE = 15.0  # seconds that process 0, which holds the messages, waits for the others


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
    program ten seconds to end by itself first. When the program is over, it waits until the others
    are as well, so that a failure still reaches it.
    """
    if _watching.is_set():
        return
    _watching.set()
    threading.Thread(target=_watch, name="failure-watch", daemon=True).start()
    atexit.register(_wait_for_others)  # runs before jax's handler, which was there first


def end(message: str, status: int, *, at_once: bool = False) -> NoReturn:
    """Prints why the program ends, and ends it and all other processes of its group.

    Args:
        message: one sentence. If another process has failed before, that one's is printed instead.
        status: exit status, see `vvt_jax.system.errors`.
        at_once: leave out what libraries do when Python exits.
    """
    _ending.set()
    if not _watching.is_set():
        print(f"error: {message}", file=sys.stderr, flush=True)
        if at_once:
            os._exit(status)
        sys.exit(status)
    group = distributed.global_state
    mine = Failure(group.process_id, message, status)
    with contextlib.suppress(jax.errors.JaxRuntimeError):  # another process was first
        assert group.client is not None
        group.client.key_value_set(_KEY, json.dumps(asdict(mine)))
    _leave(_failure() or mine)


def has_happened() -> bool:
    """Whether a process of the group has failed, which other errors may then follow from."""
    return _failure() is not None


_watching = threading.Event()
_ending = threading.Event()  # set once the program ends by itself


def _failure() -> Failure | None:
    client = distributed.global_state.client
    if not _watching.is_set() or client is None:
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


def _wait_for_others() -> None:
    """Waits at the program's end, until all processes are there or one has failed.

    A process that is lost ends the wait, too: jax then aborts the others.
    """
    _ending.set()
    _say_done()
    with contextlib.suppress(jax.errors.JaxRuntimeError):  # process 0 is gone
        while not _are_all_done():
            if failure := _failure():
                _leave(failure)
            time.sleep(_LOOK / 10)


def _leave(failure: Failure) -> NoReturn:
    """Ends this process without the handlers that would wait for the others."""
    # Not asked of jax.process_index(), which waits for the others the first time
    process = distributed.global_state.process_id
    by = "" if failure.process == process else f"process {failure.process} ended the run: "
    print(f"error: {by}{failure.message}", file=sys.stderr, flush=True)
    sys.stdout.flush()
    _say_done()
    end = time.monotonic() + _PATIENCE
    with contextlib.suppress(jax.errors.JaxRuntimeError):
        while process == 0 and time.monotonic() < end and not _are_all_done():
            time.sleep(_LOOK / 10)
    os._exit(failure.status)


def _say_done() -> None:
    group = distributed.global_state
    with contextlib.suppress(jax.errors.JaxRuntimeError):
        assert group.client is not None
        group.client.key_value_set(f"{_DONE}/{group.process_id}", "", allow_overwrite=True)


def _are_all_done() -> bool:
    group = distributed.global_state
    assert group.client is not None
    return len(group.client.key_value_dir_get(_DONE)) == group.num_processes
