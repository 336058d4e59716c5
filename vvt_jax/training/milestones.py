"""What happens at some steps of a run: an evaluation, a report, a checkpoint, a model folder."""

import functools
from collections.abc import Mapping

from vvt_jax.distributed import hosts
from vvt_jax.system.storage import AnyPath
from vvt_jax.training.checkpoint import Best, Checkpoints
from vvt_jax.training.evaluate import BrokenSplitError, Evaluation
from vvt_jax.training.plan import Plan
from vvt_jax.training.reporting import Reporter
from vvt_jax.training.step import TrainState
from vvt_jax.weights.pretrained import save_pretrained


class Milestones:
    """Evaluates, reports and saves, and remembers the best.

    Args:
        plan: of the run.
        evaluation: measures states.
        checkpoints: of the run.
        reporter: of the run.
        best: so far.
        model_dir: where the best weights go.

    Attributes:
        latest: measurements that were reported last.
    """

    def __init__(
        self,
        plan: Plan,
        evaluation: Evaluation,
        checkpoints: Checkpoints,
        reporter: Reporter,
        best: Best,
        model_dir: AnyPath,
    ):
        self._plan, self._evaluation = plan, evaluation
        self._checkpoints, self._reporter = checkpoints, reporter
        self._best, self._model_dir = best, model_dir
        self.latest: dict[str, float] = reporter.last_line()

    def reach(
        self, state: TrainState, metrics: Mapping[str, float], *, evaluate: bool, save: bool
    ) -> None:
        """Evaluates the state where that is due, reports, and saves what is to be kept.

        Args:
            state: after a step.
            metrics: to report with the evaluation's.
            evaluate: measure on the validation split. The test split is measured after the last
                step in any case.
            save: write a checkpoint; one is also written where the weights are the best so far.

        Raises:
            BrokenSplitError: a split can't be measured; the state was saved first.
        """
        step, total = int(state.step), self._plan.steps.total
        measure = functools.partial(
            self._evaluation.measure, state, show=functools.partial(self._reporter.show, step)
        )
        metrics = dict(metrics)
        problem = score = None
        try:
            if evaluate:
                metrics |= measure("validation", "eval")
                score = self._evaluation.score(metrics)
            if step == total:
                metrics |= measure("test", "test")
        except BrokenSplitError as error:  # raised in every process
            problem = error
        else:
            self._reporter.write(step, metrics)
            self.latest = metrics
        if score is not None and score > self._best.score:
            self._best, save = Best(step=step, score=score), True
            self._save_model(state)
        elif step == total and not self._best.step and problem is None:
            self._save_model(state)  # there was no validation
        if save or problem is not None:  # progress is saved before bad data ends the run
            self.save(state)
        if problem is not None:
            raise problem

    def save(self, state: TrainState) -> None:
        """Writes a checkpoint in the background, after what was reported."""
        self._reporter.flush()
        self._checkpoints.save(int(state.step), state, self._best)

    def _save_model(self, state: TrainState) -> None:
        """Writes the model folder, with the averaged weights where there are some."""
        variables = hosts.fetch(state.variables(ema=state.ema is not None))
        if hosts.is_first():
            save_pretrained(self._model_dir, self._plan.model, variables, self._plan.task.card)
