"""Evaluation of a run's weights on the parts of its data, and on additional data sets."""

from collections.abc import Callable, Mapping, Sequence

import PIL.Image

from vvt_jax.data.examples import DataError, Source
from vvt_jax.data.loader import why_broken
from vvt_jax.data.sources import imagenet_sets
from vvt_jax.distributed import hosts
from vvt_jax.system.storage import AnyPath
from vvt_jax.training import charts
from vvt_jax.training.plan import Plan
from vvt_jax.training.programs import Programs
from vvt_jax.training.reporting import Reporter
from vvt_jax.training.step import TrainState

Say = Callable[[str], object]


class BrokenSplitError(DataError):
    """A split has more broken images than allowed. All processes of a run raise this error."""


class Evaluation:
    """The evaluation of a run's states.

    Args:
        plan: the plan of the run.
        programs: the programs of the run.
        say: a function that is called with a sentence about each broken image, once per run.
    """

    def __init__(self, plan: Plan, programs: Programs, say: Say):
        self._plan, self._programs, self._say = plan, programs, say
        self._named: set[tuple[str, int]] = set()

    def measure(
        self,
        state: TrainState,
        part: str,
        prefix: str,
        folder: AnyPath | None = None,
        show: Callable[[str, PIL.Image.Image], None] | None = None,
    ) -> dict[str, float]:
        """Evaluate a state on a part of the data and return its metrics.

        The metrics are empty if the config names no split for this part.

        Args:
            state: the state whose weights are evaluated, as well as its averaged weights, if any.
            part: the part of the data, such as `validation`.
            prefix: the prefix of the metrics' names, such as `eval`.
            folder: the folder for confusion tables.
            show: a function that is called with a name and a picture of predictions.

        Raises:
            BrokenSplitError: there are more broken images than `config.data.broken_limit`, or all
                images are broken.
        """
        if part not in self._plan.sources:
            return {}
        source = self._plan.sources[part]
        metrics: dict[str, float] = {}
        for name, ema in _kinds_of_weights(state, prefix):
            variables = self._programs.variables(state, ema=ema)
            measured = self._programs.measure(variables, source)
            metrics |= {f"{name}/{key}": value for key, value in measured.metrics.items()}
            metrics[f"{name}/broken"] = len(measured.broken)
            self._report_broken(f"the {part} split", source, measured.broken)
            if not hosts.is_first():
                continue
            if measured.confusion is not None and folder is not None:
                self._plan.task.write_tables(folder, name, measured.confusion)
            if measured.picture is not None and show is not None:
                show(name, measured.picture)
        return metrics

    def score(self, metrics: Mapping[str, float]) -> float | None:
        """Return the score that selects the best weights, or None if it was not measured."""
        name = self._plan.task.score
        return metrics.get(f"eval_ema/{name}", metrics.get(f"eval/{name}"))

    def was_missed(self, step: int, reporter: Reporter) -> bool:
        """Return whether an evaluation is still missing at the step where a run resumes.

        This happens if the data was broken at the time. The first process decides for all of them.
        """
        steps, sources = self._plan.steps, self._plan.sources
        wanted = ["eval/loss"] if steps.due(step).evaluate and "validation" in sources else []
        if step == steps.total and "test" in sources:
            wanted.append("test/loss")
        owed = hosts.is_first() and any(not reporter.has(step, name) for name in wanted)
        return bool(hosts.union([1] if owed else []))

    def open_extra_sets(self, cache_dir: AnyPath | None) -> list[imagenet_sets.EvaluationSet]:
        """Open the data sets of `config.data.eval_also`."""
        data = self._plan.config.data
        return imagenet_sets.open_sets(
            data.eval_also,
            self._plan.main_source.class_names,
            self._plan.model.num_classes,
            data_dir=data.data_dir if data.source.startswith("tfds:") else None,
            cache_dir=cache_dir,
            upright=data.upright,
        )

    def measure_extra_sets(
        self, state: TrainState, sets: Sequence[imagenet_sets.EvaluationSet], folder: AnyPath
    ) -> dict[str, float]:
        """Evaluate a state on these data sets and return its metrics.

        A table of the errors per corruption is written to the folder, if there are any.
        """
        metrics: dict[str, float] = {}
        for suffix, ema in _kinds_of_weights(state, "") if sets else ():
            variables = self._programs.variables(state, ema=ema)
            measured: dict[str, Mapping[str, float]] = {}
            for each in sets:
                whole = {"crop_fraction": 1.0} if each.cropped else {}
                found = self._programs.measure_set(variables, each.source, **whole)
                self._report_broken(each.name, each.source, found.broken)
                measured[each.name] = found.metrics
            measured, errors, relative = imagenet_sets.sum_up_corruptions(measured)
            if errors and hosts.is_first():
                path = folder / f"{imagenet_sets.CORRUPTED}{suffix}.csv"
                charts.write_corruptions(path, errors, relative, imagenet_sets.SEVERITIES)
            metrics |= {
                f"{name}{suffix}/{key}": value
                for name, values in measured.items()
                for key, value in values.items()
            }
        return metrics

    def _report_broken(self, name: str, source: Source, broken: Sequence[int]) -> None:
        """Report the broken images of an evaluation, each of them once per run.

        Raises:
            BrokenSplitError: there are more than the config allows, or all images are broken.
        """
        limit = self._plan.config.data.broken_limit
        count, examples = len(broken), len(source.examples)
        if count > limit or (count and count == examples):
            many = f"{count} of the {examples} images of {name} are broken"
            if count > limit:
                many += f", more than config.data.broken_limit={limit} allows"
            raise BrokenSplitError(f"{many}. The first one: {why_broken(source, broken[0])}")
        for index in broken:
            if (name, index) not in self._named:
                self._named.add((name, index))
                self._say(f"Left a broken image of {name} out. {why_broken(source, index)}")


def _kinds_of_weights(state: TrainState, prefix: str) -> list[tuple[str, bool]]:
    """Return (name, whether averaged) for each kind of weights that is evaluated separately."""
    return [(prefix, False)] + ([(f"{prefix}_ema", True)] if state.ema is not None else [])
