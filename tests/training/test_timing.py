"""Where time goes: read between real sleeps; a real trace on disk."""

import time

import jax
import jax.numpy as jnp
import pytest

from vvt_jax.training.timing import Stopwatch, Trace


def _slowly(items, seconds):
    for item in items:
        time.sleep(seconds)
        yield item


def test_waiting_is_told_apart_from_work_and_pauses():
    stopwatch = Stopwatch()
    for _ in stopwatch.waiting(_slowly(range(3), 0.05)):
        time.sleep(0.02)
    with stopwatch.paused():
        time.sleep(0.5)
    seconds, waited = stopwatch.read()
    assert 0.15 <= waited <= seconds - 0.06 + 1e-3
    assert 0.21 <= seconds < 0.5
    seconds, waited = stopwatch.read()
    assert (seconds < 0.2, waited) == (True, 0.0)


def test_items_come_through():
    assert list(Stopwatch().waiting([3, 1, 2])) == [3, 1, 2]


@pytest.mark.parametrize("ended", ["by its length", "by the run's end"])
def test_a_trace_of_some_steps_is_written(tmp_path, ended):
    with Trace(tmp_path / "profile", first=2, steps=2) as trace:
        for step in range(1, 6 if ended == "by its length" else 3):
            trace.before(step)
            trace.after(step, jnp.ones(3) * step)
            if step == 1:
                assert not (tmp_path / "profile").exists()
    (written,) = (tmp_path / "profile").rglob("*.xplane.pb")
    assert written.stat().st_size > 0
    jax.profiler.start_trace(tmp_path / "next")  # possible, since that one has ended
    jax.profiler.stop_trace()


def test_no_trace_without_a_first_step(tmp_path):
    with Trace(tmp_path / "profile", first=0, steps=3) as trace:
        for step in range(1, 4):
            trace.before(step)
            trace.after(step, jnp.ones(1))
    assert not (tmp_path / "profile").exists()
