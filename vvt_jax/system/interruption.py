"""Handling SIGTERM and Ctrl-C between the steps of a run, so that no progress is lost.

Several processes must stop after the same step, which JAX agrees on in its own threads: the news of
the signal is shared, each process reports its current step, and all of them stop one step after
the furthest (`multihost_utils.reached_preemption_sync_point`). This costs 0.2 µs per step and no
waiting. JAX's handler of SIGTERM, which `jax.distributed.initialize` sets, must not be replaced by
one in Python.
"""

import contextlib
import os
import signal
import threading
from types import FrameType

import jax
from jax.experimental import multihost_utils


class Interrupted(Exception):  # noqa: N818 - an outcome of a run, not an error in it
    """A run was saved and then ended because of a signal."""

    def __init__(self, signum: int, step: int):
        self.exit_status = 128 + signum  # the shell's convention: 143 for SIGTERM, 130 for SIGINT
        name = signal.Signals(signum).name
        super().__init__(f"{name}: saved at step {step}; the same command goes on from there.")


class Interruption:
    """A context in which the first SIGTERM or SIGINT is only recorded, and a second one acts.

    Outside the main thread, where Python can't handle signals, nothing is ever recorded. In one of
    several processes, SIGTERM is handled by JAX, and a second one has no effect.

    Attributes:
        signum: the signal that the run stops for, or None while it continues.
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
        """Return whether the run should stop now; the answer is the same in all processes.

        Args:
            steps: the number of steps begun since the processes joined. Unlike the run's own step
                count, it is 0 in a process that gets the signal before its first step.
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
        else:  # JAX shares only SIGTERM with the other processes
            os.kill(os.getpid(), signal.SIGTERM)
        # Not with print: the signal may have interrupted another print, and Python forbids nesting.
        with contextlib.suppress(OSError):  # there may be no reader
            os.write(2, f"\n{signal.Signals(signum).name}: saving after this step.\n".encode())
