"""How processes that work as one end when one of them fails: all of them, and with its message.

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

USER_ERROR = 1  # exit status: trying again would fail in the same way
CRASH = 70  # exit status (EX_SOFTWARE): whatever started the program may try again

_KEY = "vvt_jax/failure"
_GONE = "vvt_jax/gone"  # a folder of keys: the processes that have ended because of the failure
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
    """Ends this process soon after another one of its group has failed.

    A process that waits in a collective can't notice by itself. The watch is a thread; it gives the
    program ten seconds to end by itself first.
    """
    threading.Thread(target=_watch, name="failure-watch", daemon=True).start()
    atexit.register(_ending.set)  # before jax leaves the group, whose handler was there first


def end(message: str, status: int, *, at_once: bool = False) -> NoReturn:
    """Prints why the program ends, and ends it and all other processes of its group.

    Args:
        message: one sentence; after another process has failed, that one's is printed instead.
        status: exit status, `USER_ERROR` or `CRASH`.
        at_once: leave out what libraries do when Python exits.
    """
    _ending.set()
    group = distributed.global_state
    if group.client is None:
        print(f"error: {message}", file=sys.stderr, flush=True)
        if at_once:
            os._exit(status)
        sys.exit(status)
    mine = Failure(group.process_id, message, status)
    with contextlib.suppress(jax.errors.JaxRuntimeError):  # another process was first
        group.client.key_value_set(_KEY, json.dumps(asdict(mine)))
    _leave(_failure() or mine)


def has_happened() -> bool:
    """Whether a process of the group has failed, which other errors may then follow from."""
    return _failure() is not None


_ending = threading.Event()  # set once the program ends by itself


def _failure() -> Failure | None:
    client = distributed.global_state.client
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
    # Not asked of jax.process_index(), which waits for the others the first time
    group = distributed.global_state
    client, process = group.client, group.process_id
    assert client is not None
    by = "" if failure.process == process else f"process {failure.process} ended the run: "
    print(f"error: {by}{failure.message}", file=sys.stderr, flush=True)
    with contextlib.suppress(jax.errors.JaxRuntimeError):
        client.key_value_set(f"{_GONE}/{process}", "", allow_overwrite=True)
        end = time.monotonic() + _PATIENCE
        while process == 0 and time.monotonic() < end:
            if len(client.key_value_dir_get(_GONE)) == group.num_processes:
                break
            time.sleep(_LOOK / 10)
    sys.stdout.flush()
    os._exit(failure.status)
