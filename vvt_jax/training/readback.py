"""What the devices computed for a report that has not been read back yet."""

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
    broken: jax.Array  # numbers of broken examples, int32 [processes, ...]


class Readback:
    """Holds one report back until the devices are busy with the next step.

    Reading a number from the devices waits for the step that computes it. So the report of a step
    is only put here, and read one step later, or before anything that waits anyway.

    Args:
        plan: of the run.
        broken: names and counts broken images.
        stopwatch: measures the time between reports.
    """

    def __init__(self, plan: Plan, broken: BrokenImages, stopwatch: Stopwatch):
        self._plan, self._broken, self._stopwatch = plan, broken, stopwatch
        self._waiting: _Waiting | None = None
        self._unnamed: jax.Array | None = None

    def put(self, step: int, totals: Totals) -> None:
        """Takes the totals after a step, before the next one takes their memory over."""
        self._waiting = _Waiting(step, totals, hosts.gather(self._broken.take()))

    def read(self) -> dict[str, float]:
        """Waits for the measurements that were put here and returns them; empty if none are there.

        Call `name_broken` next: apart, so that what was read is written first.

        Raises:
            NonFiniteLossError: a loss or a gradient was not finite.
        """
        waiting, self._waiting = self._waiting, None
        if waiting is None:
            return {}
        self._unnamed = waiting.broken
        return self._describe(waiting.step, waiting.totals)

    def name_broken(self) -> None:
        """Names the images that were found broken up to what was last read.

        Raises:
            DataError: there are more than the config allows.
        """
        unnamed, self._unnamed = self._unnamed, None
        if unnamed is not None:
            self._broken.tell(np.asarray(unnamed))

    def _describe(self, step: int, totals: Totals) -> dict[str, float]:
        """Means over the steps since the last report."""
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
