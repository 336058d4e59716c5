"""What happens at certain steps of a run: evaluation, reports, checkpoints and model folders."""

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
    """Evaluates, reports and saves states, and keeps track of the best one.

    Args:
        plan: the plan of the run.
        evaluation: the evaluation of states.
        checkpoints: the checkpoints of the run.
        reporter: the reporter of the run.
        best: the best evaluation so far.
        model_dir: the folder for the best weights.

    Attributes:
        latest: the last reported measurements.
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
        """Evaluate the state if that is due, report the results, and save what should be kept.

        Args:
            state: the state after a step.
            metrics: measurements to report together with those of the evaluation.
            evaluate: whether to evaluate on the validation split. The test split is evaluated
                after the last step in any case.
            save: whether to write a checkpoint. One is also written if the weights are the best so
                far.

        Raises:
            BrokenSplitError: a split can't be evaluated. The state is saved before this is raised.
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
            self._save_model(state)  # there was no validation score
        if save or problem is not None:  # progress is saved before bad data ends the run
            self.save(state)
        if problem is not None:
            raise problem

    def save(self, state: TrainState) -> None:
        """Write a checkpoint in the background, after flushing what was reported."""
        self._reporter.flush()
        self._checkpoints.save(int(state.step), state, self._best)

    def _save_model(self, state: TrainState) -> None:
        """Write the model folder, with the averaged weights if there are any."""
        variables = hosts.fetch(state.variables(ema=state.ema is not None))
        if hosts.is_first():
            save_pretrained(self._model_dir, self._plan.model, variables, self._plan.task.card)
