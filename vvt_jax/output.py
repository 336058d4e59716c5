"""Standard output and error that nobody may be reading any more."""

import os
import sys
from typing import Any, TextIO


def outlive_readers() -> None:
    """Lets the program go on when a reader of its output goes away, as `| head -1` does.

    From then on what is written goes nowhere. Without this, Python raises BrokenPipeError in
    whatever happens to print next.
    """
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # it was closed when the program started
            stream = open(os.devnull, "w")  # noqa: SIM115 - it is open as long as the program runs
        setattr(sys, name, _Outliving(stream))


class _Outliving:
    """A text stream whose descriptor is turned to the null device once nobody reads it."""

    def __init__(self, stream: TextIO):
        self._stream = stream

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except BrokenPipeError:
            self._discard()
            return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except BrokenPipeError:
            self._discard()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def _discard(self) -> None:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, self._stream.fileno())
        os.close(null)
        self._stream.flush()  # what waited in the buffer
