"""SIGTERM and Ctrl-C during a run: noticed between steps, so that nothing is lost.

Several processes have to stop after the same step. jax agrees on one, in threads of its own: the
signal's news goes round, each process tells how far it is, and all stop one step after the furthest
(`multihost_utils.reached_preemption_sync_point`). That costs a step 0.2 µs and no wait. Its handler
of SIGTERM, set by `jax.distributed.initialize`, must not be replaced by one in Python.
"""

import contextlib
import os
import signal
import threading
from types import FrameType

import jax
from jax.experimental import multihost_utils


class Interrupted(Exception):  # noqa: N818 - an outcome of a run, not an error in it
    """A run that a signal ended, after it was saved."""

    def __init__(self, signum: int, step: int):
        self.exit_status = 128 + signum  # the shell's convention: 143 for SIGTERM, 130 for SIGINT
        name = signal.Signals(signum).name
        super().__init__(f"{name}: saved at step {step}; the same command goes on from there.")


class Interruption:
    """Inside the `with`, the first SIGTERM or SIGINT is only noted; a second one acts at once.

    Outside the main thread, where Python takes no signals, nothing is ever noted. In one of several
    processes SIGTERM is jax's: a second one does nothing.

    Attributes:
        signum: the signal that the run stops for, None as long as it goes on.
    """

    def __init__(self) -> None:
        self.signum: int | None = None
        self._alone = not jax.distributed.is_initialized()
        self._before: dict[int, object] = {}

    def __enter__(self) -> "Interruption":
        if threading.current_thread() is threading.main_thread():
            for signum in (signal.SIGTERM, signal.SIGINT) if self._alone else (signal.SIGINT,):
                self._before[signum] = signal.signal(signum, self._note)
        return self

    def stops_after(self, steps: int) -> bool:
        """Whether a run of one or several processes is to stop; the same answer in all of them.

        Args:
            steps: that were begun here, counted from where the processes joined: in contrast to the
                run's own count, it is 0 for one that got the signal before its first step.
        """
        if not self._alone and multihost_utils.reached_preemption_sync_point(steps):
            self.signum = signal.SIGTERM
        return self.signum is not None

    def __exit__(self, *_: object) -> None:
        for signum, handler in self._before.items():
            signal.signal(signum, handler)  # type: ignore[arg-type]

    def _note(self, signum: int, frame: FrameType | None) -> None:
        self.__exit__()
        if self._alone:
            self.signum = signum
        else:  # SIGTERM is what jax tells the others of
            os.kill(os.getpid(), signal.SIGTERM)
        # Not by print: Python refuses one inside another, which the signal may have interrupted.
        with contextlib.suppress(OSError):  # nobody may read it
            os.write(2, f"\n{signal.Signals(signum).name}: saving after this step.\n".encode())
