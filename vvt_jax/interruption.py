"""SIGTERM and Ctrl-C during a run: noticed between steps, so that nothing is lost."""

import os
import signal
import threading
from types import FrameType


class Interrupted(Exception):  # noqa: N818 - an outcome of a run, not an error in it
    """A run that a signal ended, after it was saved."""

    def __init__(self, signum: int, step: int):
        self.exit_status = 128 + signum  # the shell's convention: 143 for SIGTERM, 130 for SIGINT
        name = signal.Signals(signum).name
        super().__init__(f"{name}: saved at step {step}; the same command goes on from there.")


class Interruption:
    """Inside the `with`, the first SIGTERM or SIGINT is only noted; a second one acts at once.

    Outside the main thread, where Python takes no signals, nothing is ever noted.
    """

    def __init__(self) -> None:
        self.signum: int | None = None
        self._before: dict[int, object] = {}

    def __enter__(self) -> "Interruption":
        if threading.current_thread() is threading.main_thread():
            for signum in (signal.SIGTERM, signal.SIGINT):
                self._before[signum] = signal.signal(signum, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for signum, handler in self._before.items():
            signal.signal(signum, handler)  # type: ignore[arg-type]

    def _note(self, signum: int, frame: FrameType | None) -> None:
        self.signum = signum
        self.__exit__()
        # Not by print: Python refuses one inside another, which the signal may have interrupted.
        os.write(2, f"\n{signal.Signals(signum).name}: saving after this step.\n".encode())
