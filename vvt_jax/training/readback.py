"""Delayed reading of measurements from the devices."""

import functools
from typing import NamedTuple

import jax
import numpy as np

from vvt_jax.data.loader import BrokenImages
from vvt_jax.distributed import hosts
from vvt_jax.training.plan import Plan
from vvt_jax.training.programs import check_totals
from vvt_jax.training.step import Totals
from vvt_jax.training.timing import Stopwatch


class _Waiting(NamedTuple):
    step: int
    totals: Totals  # since the last report
    broken: jax.Array  # indices of broken examples, int32 [processes, ...]


class Readback:
    """A holder that delays a report until the devices are busy with the next step.

    Reading a number from the devices waits for the step that computes it. The report of a step is
    therefore only stored here, and read one step later, or before anything that has to wait anyway.

    Args:
        plan: the plan of the run.
        broken: the object that reports and counts broken images.
        stopwatch: the stopwatch that measures the time between reports.
    """

    def __init__(self, plan: Plan, broken: BrokenImages, stopwatch: Stopwatch):
        self._plan, self._broken, self._stopwatch = plan, broken, stopwatch
        self._waiting: _Waiting | None = None
        self._unnamed: jax.Array | None = None

    def put(self, step: int, totals: Totals) -> None:
        """Store the totals after a step, before they are handed to the next step."""
        self._waiting = _Waiting(step, totals, hosts.gather(self._broken.take()))

    def read(self) -> dict[str, float]:
        """Wait for the stored measurements and return them; empty if there are none.

        Call `name_broken` next. It is a separate method so that the measurements can be written
        first.

        Raises:
            NonFiniteLossError: a loss or gradient was not finite.
        """
        waiting, self._waiting = self._waiting, None
        if waiting is None:
            return {}
        self._unnamed = waiting.broken
        return self._describe(waiting.step, waiting.totals)

    def name_broken(self) -> None:
        """Report the images that were found to be broken, up to the last report that was read.

        Raises:
            DataError: there are more broken images than the config allows.
        """
        unnamed, self._unnamed = self._unnamed, None
        if unnamed is not None:
            self._broken.tell(np.asarray(unnamed))

    def _describe(self, step: int, totals: Totals) -> dict[str, float]:
        """Return the measurements of training, averaged over the steps since the last report."""
        check_totals(totals)
        plan = self._plan
        assert plan.schedule is not None
        seconds, waited = self._stopwatch.read()
        rate = int(totals.steps) * plan.config.batch_size / seconds
        skipped, updates = int(totals.skipped), int(totals.updates)
        metrics = {}
        if updates:
            metrics = {
                "train/loss": float(totals.loss) / updates,
                "train/grad_norm": float(totals.grad_norm) / updates,
            }
        if plan.config.optimizer.skip_nonfinite:
            metrics["train/skipped"] = skipped
        metrics |= {
            "train/learning_rate": float(plan.schedule(step - skipped - 1)),
            "train/images_per_second": rate,
            "train/data_wait": waited / seconds,
        }
        if peak := plan.peak_flops():
            metrics["train/mfu"] = rate * self._flops_per_image / peak
        return metrics

    @functools.cached_property
    def _flops_per_image(self) -> int:
        return self._plan.flops_per_image()
