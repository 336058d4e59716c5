"""Timing of a run: the time spent waiting for data, and profiler traces of selected steps."""

import contextlib
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

import jax

from vvt_jax.system import storage
from vvt_jax.system.storage import AnyPath

Item = TypeVar("Item")


class Stopwatch:
    """Measures the time since the last reading, without pauses, and how much of it was waiting."""

    def __init__(self) -> None:
        self._since = time.perf_counter()
        self._waited = 0.0

    def read(self) -> tuple[float, float]:
        """Return the seconds since the last reading, and how many of them were spent waiting."""
        since, self._since = self._since, time.perf_counter()
        waited, self._waited = self._waited, 0.0
        return self._since - since, waited

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Exclude what happens inside the context, such as an evaluation."""
        start = time.perf_counter()
        yield
        self._since += time.perf_counter() - start

    def waiting(self, items: Iterable[Item]) -> Iterator[Item]:
        """Yield the items; the time until each of them is available counts as waiting."""
        iterator = iter(items)
        while True:
            start = time.perf_counter()
            try:
                item = next(iterator)
            except StopIteration:
                return
            self._waited += time.perf_counter() - start
            yield item


class Trace:
    """A profiler trace of consecutive steps, for TensorBoard's profile page or Perfetto.

    Args:
        folder: the folder to write the trace to.
        first: the first step to trace, counted from 1; 0 for no trace.
        steps: the number of steps to trace.
    """

    def __init__(self, folder: AnyPath, first: int, steps: int):
        self._folder, self._first, self._last = folder, first, first + steps - 1
        self._running: contextlib.AbstractContextManager | None = None

    def __enter__(self) -> "Trace":
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()

    def before(self, step: int) -> None:
        """Start the trace if the given step is the first one to trace."""
        if self._first and step == self._first:
            self._running = self._traced()
            self._running.__enter__()

    def after(self, step: int, done: jax.Array) -> None:
        """Wait for the given step and write the trace, if it is the last one to trace."""
        if self._running and step >= self._last:
            done.block_until_ready()
            self._stop()

    def _stop(self) -> None:
        if self._running:
            running, self._running = self._running, None
            running.__exit__(None, None, None)

    @contextlib.contextmanager
    def _traced(self) -> Iterator[None]:
        with storage.local_folder(self._folder) as folder, jax.profiler.trace(folder):
            yield
