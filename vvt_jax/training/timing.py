"""Where a run's time goes: the share spent waiting for data, and a profiler trace of some steps."""

import contextlib
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

import jax

from vvt_jax.system import storage
from vvt_jax.system.storage import AnyPath

Item = TypeVar("Item")


class Stopwatch:
    """Time since the last reading, pauses left out, and how much of it was waiting."""

    def __init__(self) -> None:
        self._since = time.perf_counter()
        self._waited = 0.0

    def read(self) -> tuple[float, float]:
        """Seconds since the last reading, and those of them spent inside `waiting`."""
        since, self._since = self._since, time.perf_counter()
        waited, self._waited = self._waited, 0.0
        return self._since - since, waited

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Leaves out what happens inside, such as evaluation."""
        start = time.perf_counter()
        yield
        self._since += time.perf_counter() - start

    def waiting(self, items: Iterable[Item]) -> Iterator[Item]:
        """The items; the time until each is there counts as waiting."""
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
    """A profiler trace of some steps, for TensorBoard's profile page or Perfetto.

    Args:
        folder: where it goes.
        first: the first step, counted from 1; 0 for no trace.
        steps: how many.
    """

    def __init__(self, folder: AnyPath, first: int, steps: int):
        self._folder, self._first, self._last = folder, first, first + steps - 1
        self._running: contextlib.AbstractContextManager | None = None

    def __enter__(self) -> "Trace":
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()

    def before(self, step: int) -> None:
        """Starts where that step is the first one."""
        if self._first and step == self._first:
            self._running = self._traced()
            self._running.__enter__()

    def after(self, step: int, done: jax.Array) -> None:
        """Waits for the end of the last step, and writes."""
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
