"""Standard output and standard error that survive the loss of their reader."""

import os
import sys
from collections.abc import Iterable
from typing import Any, TextIO


def outlive_readers() -> None:
    """Let the program continue when its output can no longer be written.

    The reader of a pipe may have exited, as `| head -1` does, a terminal may have been closed, or
    the disk of a log may be full. From then on, all output is discarded. Otherwise, Python would
    raise an error in whatever code happens to print next.
    """
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # it was closed when the program started
            stream = open(os.devnull, "w")  # noqa: SIM115 - it is open as long as the program runs
        setattr(sys, name, _Outliving(stream))


class _Outliving:
    """A text stream that is redirected to the null device once it can't be written to."""

    def __init__(self, stream: TextIO):
        self._stream = stream

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except OSError:
            self._discard()
            return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError:
            self._discard()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def _discard(self) -> None:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, self._stream.fileno())
        os.close(null)
        self._stream.flush()  # what is still in the buffer
