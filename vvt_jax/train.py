"""A run: from a config to checkpoints, metrics and a model folder."""

import contextlib
import dataclasses
import functools
import os
from collections.abc import Callable, Collection, Generator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import PIL.Image
from ml_collections import ConfigDict

from vvt_jax.costs import counting
from vvt_jax.data.examples import Cut, DataError, Source
from vvt_jax.data.loader import BrokenImages, train_batches, why_broken
from vvt_jax.data.mask_survey import survey_masks
from vvt_jax.data.sources import imagenet_sets, open_source
from vvt_jax.distributed import hosts, sharding
from vvt_jax.models import forms, unstack_blocks
from vvt_jax.models.vvt import check_image_shape
from vvt_jax.system import storage
from vvt_jax.system.errors import UserError, telling_of_full_disks
from vvt_jax.system.interruption import Interrupted, Interruption
from vvt_jax.system.lock import WorkdirLock, check_workdir
from vvt_jax.system.storage import AnyPath
from vvt_jax.training import charts, configuration, mixing
from vvt_jax.training.checkpoint import Best, Checkpoints, check_folder
from vvt_jax.training.configuration import ConfigError
from vvt_jax.training.finetune import StartingWeights, initial_variables
from vvt_jax.training.optimizer import make_optimizer, make_schedule
from vvt_jax.training.provenance import Provenance, opened_splits
from vvt_jax.training.reporting import Reporter, SilentReporter, describe
from vvt_jax.training.step import Totals, TrainState, init_state, make_train_step
from vvt_jax.training.tasks import Measured, make_task, naming
from vvt_jax.training.timing import Stopwatch, Trace
from vvt_jax.weights.pretrained import save_pretrained

_LAYOUT_LINES = 8  # of the table of what devices hold, that are printed
_LOG_EVERY = 20  # steps, where the config says nothing


class NonFiniteLossError(UserError):
    """A loss or gradient that is not a number, or infinite."""


def train_and_evaluate(
    config: ConfigDict, workdir: str | os.PathLike, *, flagged: Collection[str] = ()
) -> dict[str, float]:
    """Trains as the config says, or goes on with what the workdir holds, and evaluates.

    The workdir gets `config.json`, `record.json` and `examples/` (what the run was made from, see
    `vvt_jax.training.run_record`), `layout.txt` (what each device holds), `checkpoints/`,
    `metrics.jsonl`, TensorBoard files and, from the first evaluation on, `model/`: a
    `save_pretrained` folder of the weights with the highest validation top-1 (or mIoU) so far (the
    averaged ones where `optimizer.ema_decay` is set; the last ones where there is no validation
    split).

    Args:
        config: see `configs/common.py`.
        workdir: the run's folder, also a `gs://` address; given again, the run resumes. What is
            different there: `vvt_jax.system.storage`; TensorBoard files go into folders only.
        flagged: fields, such as `data.size`, that were set on the command line: they go before
            what a run or a model recorded, which goes before the rest of the config.

    Returns:
        The last evaluation's measurements, as in `metrics.jsonl`.

    Raises:
        UserError: a config, data set, checkpoint or loss that can't be gone on with, in a sentence.
        Interrupted: SIGTERM or Ctrl-C came; the run was saved.
    """
    workdir = storage.locate(workdir)
    check_folder(workdir / "checkpoints")
    check_workdir(workdir)
    configuration.check_values(config)
    hosts.join(config.distributed, preemptible=config.mode == "train")
    if config.compilation_cache:
        cache = storage.locate(config.compilation_cache)
        jax.config.update("jax_compilation_cache_dir", str(cache))
    may_write = config.mode == "train" or workdir.exists()
    made = Provenance(config, workdir, flagged)
    cache_dir = workdir / "offsets" if may_write else None
    sources = made.match(_open_sources(made.config, cache_dir, made.cuts))
    run = _Run(made.config, sources)
    data_lines = run.describe_data()
    if config.mode == "eval":
        return _evaluate_only(run, made, workdir, data_lines)

    with contextlib.ExitStack() as stack:
        stack.enter_context(telling_of_full_disks(workdir))
        if hosts.is_first():
            stack.enter_context(WorkdirLock(workdir))
        interruption = stack.enter_context(Interruption())
        told = made.told
        checkpoints = stack.enter_context(
            Checkpoints(workdir / "checkpoints", keep=config.keep_checkpoints, say=told.append)
        )
        if checkpoints.latest_step() is None:
            state, best = run.init_state(), Best()
            if config.init_from:
                state, lines = run.start_from(made.read_start(), state)
                told += lines
        else:
            state, best = checkpoints.restore(run.abstract_state)
        step = int(state.step)
        train_step = run.compile_train_step()  # before the clock starts
        if hosts.is_first():  # nothing has to be undone where the run could not start
            made.write(workdir, run.preprocessing, sources)
        make_reporter = Reporter if hosts.is_first() else SilentReporter
        reporter = stack.enter_context(
            make_reporter(workdir, start_step=step, total_steps=run.total_steps)
        )
        for line in [
            *told,
            *data_lines,
            run.describe(),
            *run.describe_layout(workdir / "layout.txt"),
        ]:
            reporter.say(line)
        if step:
            reporter.say(f"Resumed at step {step} of {run.total_steps}.")
        broken = run.broken_images(reporter.say)
        batches = stack.enter_context(
            contextlib.closing(broken.watch(run.train_batches(start_step=step)))
        )
        profile_at = config.profile_at_step if hosts.is_first() else 0
        trace = stack.enter_context(Trace(workdir / "profile", profile_at, config.profile_steps))

        latest = reporter.last_line()
        metrics: dict[str, float]

        def measure(metrics: dict[str, float], *, validate: bool, save: bool) -> None:
            """Evaluates the state where that is due, reports, and saves what is to be kept."""
            nonlocal best, latest
            show = functools.partial(reporter.show, step)
            measuring = functools.partial(run.evaluate, state, show=show, say=reporter.say)
            problem = None  # which all processes find alike
            score = None
            try:
                if validate:
                    metrics |= measuring("validation", "eval")
                    score = run.score(metrics)
                if step == run.total_steps:
                    metrics |= measuring("test", "test")
            except BrokenSplitError as error:
                problem = error
            else:
                reporter.write(step, metrics)
                latest = metrics
            if score is not None and score > best.score:
                best, save = Best(step=step, score=score), True
                run.save_model(workdir / "model", state)
            elif step == run.total_steps and not best.step and problem is None:
                run.save_model(workdir / "model", state)  # there was no validation
            if save or problem is not None:  # nothing that was learnt is lost for the data
                reporter.flush()
                checkpoints.save(step, state, best)
            if problem is not None:
                raise problem

        if step and run.owes_measurements(step, reporter):
            measure({}, validate=run.due(step)[1], save=False)
        unread: _Unread | None = None  # of the step before, not waited for yet
        dispatched = sharding.Dispatched()
        stopwatch = Stopwatch()
        start = step
        arrays = sharding.to_devices(batches, run.mesh, config.batch_size)
        for batch in stopwatch.waiting(arrays):
            if step == run.total_steps or interruption.stops_after(step - start):
                break
            trace.before(step + 1)
            state, done = train_step(state, batch)
            step += 1
            dispatched.add(done)
            trace.after(step, done)
            reporter.advance()
            if unread is not None:  # read while the devices are busy with this step
                metrics = run.describe_training(step - 1, unread.totals, stopwatch)
                reporter.write(step - 1, metrics)
                broken.tell(np.asarray(unread.broken))
                unread = None

            log, validate, save = run.due(step)
            if log:
                unread = _Unread(state.totals, hosts.gather(broken.take()))
                state = dataclasses.replace(state, totals=run.no_totals())
            if not (validate or save):
                continue
            metrics = {}
            if unread is not None:
                metrics = run.describe_training(step, unread.totals, stopwatch)
                broken.tell(np.asarray(unread.broken))
                unread = None
            run.check_finite(state)
            with stopwatch.paused():
                measure(metrics, validate=validate, save=save)

        if interruption.signum:
            if unread is not None:
                metrics = run.describe_training(step, unread.totals, stopwatch)
                reporter.write(step, metrics)
            run.check_finite(state)
            reporter.flush()
            checkpoints.save(step, state, best)
            if unread is not None:
                broken.tell(np.asarray(unread.broken))
    if interruption.signum:  # also one that came while the last checkpoint was being written
        raise Interrupted(interruption.signum, step)
    return latest


def see_batch(
    config: ConfigDict, step: int, *, flagged: Collection[str] = ()
) -> tuple[np.ndarray, np.ndarray, Mapping[str, Any], Sequence[str]]:
    """What the model sees at a step of training, counted from 1.

    Args:
        config: of a new run.
        step: of it.
        flagged: as for `train_and_evaluate`.

    Returns:
        float32 images `[batch, height, width, 3]`, targets `[batch, num_classes]` (of segmentation:
        masks `[batch, height, width]`), the preprocessing record that they were normalised by, and
        the classes' names.

    Raises:
        UserError: as `train_and_evaluate`.
    """
    configuration.check_values(config)
    made = Provenance(config, None, flagged)
    sources = made.match(_open_sources(made.config, cuts=made.cuts))
    run = _Run(made.config, sources)
    images, targets = run.see_batch(step)
    return images, targets, run.preprocessing, sources["train"].class_names


class BrokenSplitError(DataError):
    """More broken images in a split than the config allows. All processes of a run raise it."""


class _Unread(NamedTuple):
    """What a report is made of, on its way from the devices."""

    totals: Totals  # since the last report
    broken: jax.Array  # numbers of broken examples, int32 [processes, ...]


class _Run:
    """What follows from the config alone: model, mesh, data streams, compiled steps."""

    def __init__(self, config: ConfigDict, sources: Mapping[str, Source]):
        self._config, self._sources = config, sources
        self._told_broken: set[tuple[str, int]] = set()
        for part, source in sources.items():
            if not len(source.examples):
                raise DataError(
                    f"The split config.data.{part}_split={source.split!r} of {source.name!r} has "
                    "no examples."
                )
        data = config.data
        self._main = sources.get("train", next(iter(sources.values())))
        self._task = make_task(config, self._main)
        self._model = self._task.model
        self.preprocessing = self._task.card["preprocessing"]
        self.mesh = sharding.make_mesh(
            config.mesh,
            config.batch_size,
            height=data.size[0],
        )

        training = config.mode == "train"
        optimizer = self._plan_training() if training else optax.identity()
        self._init = functools.partial(
            init_state,
            self._model,
            optimizer,
            (1, *data.size, 3),
            ema=config.optimizer.ema_decay > 0,
        )
        with naming("config.data.size"):
            check_image_shape((1, *data.size, 3))
        with naming("config.optimizer.freeze"):
            shapes = jax.eval_shape(self._init, config.seed)
        self._shardings = sharding.state_shardings(self.mesh, shapes)
        self.abstract_state = sharding.abstract(self._shardings, shapes)
        if training:
            self._train_step = make_train_step(
                self._model,
                optimizer,
                prepare=self._task.prepare,
                loss=self._task.loss,
                ema_decay=config.optimizer.ema_decay,
                accumulate=config.optimizer.accumulate,
                freeze=config.optimizer.freeze,
                skip_nonfinite=config.optimizer.skip_nonfinite,
            )

    def _plan_training(self) -> optax.GradientTransformation:
        """Says how long the run is and how often it does what; its optimizer."""
        config, examples = self._config, len(self._sources["train"].examples)

        def in_steps(name: str, default_steps: int | None = None) -> int:
            steps = configuration.in_steps(
                config,
                name,
                config.batch_size,
                examples,
                default=1.0,
                default_steps=default_steps,
            )
            if steps >= 2**31:  # the state counts them in 32 bits
                raise ConfigError(f"config.{name}_* comes to {steps:,} steps, which is too many.")
            return max(1, steps)

        self.total_steps: int = in_steps("total")
        self._cadences = [
            in_steps("log_every", default_steps=_LOG_EVERY),
            in_steps("eval_every"),
            in_steps("checkpoint_every"),
        ]
        self._schedule = make_schedule(
            config.optimizer,
            self.total_steps,
            configuration.in_steps(config.optimizer, "warmup", config.batch_size, examples),
            config.batch_size,
            examples / config.batch_size,
        )
        return make_optimizer(config.optimizer, self._schedule)

    def describe(self) -> str:
        """The run in a line: how long it is, and how often it does what."""
        epochs = self.total_steps * self._config.batch_size / len(self._sources["train"].examples)
        log, measure, save = self._cadences
        return (
            f"{self.total_steps} steps ({epochs:.4g} epochs) of {self._config.batch_size} images: "
            f"logs every {log}, evaluates every {measure}, saves every {save}."
            + ("" if self._peak_flops else " Model-FLOPs utilisation: unknown for these devices.")
        )

    def describe_data(self) -> list[str]:
        """The data in a line, what of it is not used, and in training what the masks contain.

        Raises:
            DataError: masks that can't be learnt from.
        """
        main = self._main
        counts = [f"{part} {len(source.examples)}" for part, source in self._sources.items()]
        told = [f"{main.name}: {main.num_classes} classes; images: {', '.join(counts)}."]
        for source in self._sources.values():
            told += [line for line in source.left_out if line not in told]
        if main.pixels and self._config.mode == "train":
            told += survey_masks(main).sentences(main.class_names)
        return told

    def describe_layout(self, path: AnyPath) -> list[str]:
        """The mesh and its forms, and what each of several devices holds; all of that in a file."""
        told = [sharding.describe_mesh(self.mesh), *self.describe_rows()]
        if hosts.is_first():
            storage.replace(path, (sharding.layout_report(self.abstract_state) + "\n").encode())
        if self.mesh.devices.size > 1:
            shown = sharding.layout_report(self.abstract_state, largest=_LAYOUT_LINES)
            told.append(f"{shown}\nThe whole table is in {path}.")
        return told

    def describe_rows(self) -> list[str]:
        """What to say of images whose rows do not divide evenly over the devices, if anything."""
        strides = np.cumprod(self._model.patch_strides).tolist()
        told = sharding.describe_rows(self.mesh, self._config.data.size[0], strides)
        return [told] if told else []

    def init_state(self) -> TrainState:
        """The state before the first step, laid out on the devices."""
        options = forms.compiler_options("init")
        init = jax.jit(self._init, out_shardings=self._shardings, compiler_options=options)
        return init(self._config.seed)

    def start_from(
        self, start: StartingWeights, state: TrainState, *, keep_head: bool = False
    ) -> tuple[TrainState, list[str]]:
        """The state with the weights of a model folder or another run, and what to say of them."""
        variables, told = initial_variables(
            start,
            self._model,
            hosts.fetch(state.variables()),
            self._main.class_names,
            keep_head=keep_head,
        )
        params = variables.pop("params")

        def place(tree, shardings):
            # Copied: the step takes the memory over, and jax may share numpy's.
            return jax.tree.map(jnp.copy, jax.device_put(tree, shardings))

        return dataclasses.replace(
            state,
            params=place(params, self._shardings.params),
            mutable=place(variables, self._shardings.mutable),
            ema=None if state.ema is None else place(params, self._shardings.ema),
        ), told

    def no_totals(self) -> Totals:
        """Totals that start anew."""
        return self._zero_totals()

    def check_finite(self, state: TrainState) -> None:
        """Refuses a state that must not be saved, before anything of it is written.

        Raises:
            NonFiniteLossError: a loss, a gradient or a weight that is not finite.
        """
        _check_finite(state.totals)
        if not bool(self._are_finite((state.params, state.mutable, state.ema))):
            raise NonFiniteLossError(
                f"The weights after step {int(state.step)} are not finite, so they are not saved: "
                "the last checkpoint is from before; a lower config.optimizer.learning_rate may "
                "help."
            )

    @functools.cached_property
    def _are_finite(self) -> Callable[[Any], jax.Array]:
        def check(tree: Any) -> jax.Array:
            return jnp.stack([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(tree)]).all()

        return jax.jit(check, out_shardings=sharding.replicated(self.mesh))

    @functools.cached_property
    def _zero_totals(self) -> Callable[[], Totals]:
        # Not put there: with several processes that would compare them, and wait
        return jax.jit(Totals.zeros, out_shardings=self._shardings.totals)

    def compile_train_step(
        self,
    ) -> Callable[[TrainState, Mapping[str, jax.Array]], tuple[TrainState, jax.Array]]:
        """The update; it takes the state's memory over. Any other shape is an error.

        What it returns beside the state is small, and there when the step is done: the state itself
        can't be waited for, since the next step takes it over.
        """

        def update(state, batch):
            state = self._train_step(state, batch)
            return state, state.step

        return sharding.compile_program(
            "train",
            update,
            self.abstract_state,
            sharding.abstract_batch(self.mesh, self._task.train_arrays()),
            donate=(0,),
            out_shardings=(self._shardings, self._shardings.step),
        )

    @functools.cached_property
    def _eval_variables(self) -> Any:
        """Variables as evaluation takes them: a program that runs often wants blocks apart."""
        shapes = jax.eval_shape(unstack_blocks, self.abstract_state.variables())
        return sharding.abstract(sharding.state_shardings(self.mesh, shapes), shapes)

    @functools.cached_property
    def _unstack(self) -> Callable[[Any], Any]:
        shardings = jax.tree.map(lambda x: x.sharding, self._eval_variables)
        return jax.jit(unstack_blocks, out_shardings=shardings)

    @functools.cached_property
    def _measure(self) -> Callable[[Any, Source], Measured]:
        return self._task.evaluator(self.mesh, self._eval_variables)

    @functools.cached_property
    def _measure_set(self) -> Callable[..., Measured]:
        return self._task.set_evaluator(self.mesh, self._eval_variables)

    @functools.cached_property
    def _rows(self) -> np.ndarray:
        """The examples of a batch that are this process's own."""
        return sharding.local_rows(self.mesh, self._config.batch_size)

    def broken_images(self, say: Callable[[str], None]) -> BrokenImages:
        """What names and counts the training's broken images."""
        return BrokenImages(self._sources["train"], self._config.data.broken_limit, say)

    def train_batches(self, start_step: int) -> Generator[dict[str, np.ndarray], None, None]:
        """The endless stream of batches from that step on, with flags for broken images; of each
        batch this process's own examples."""
        data = self._config.data
        return train_batches(
            self._sources["train"],
            record=self.preprocessing,
            augment=self._config.augment.to_dict(),
            prepare=self._task.train_example,
            batch_size=self._config.batch_size,
            seed=self._config.seed,
            start_step=start_step,
            repeats=self._config.augment.repeats,
            rows=self._rows,
            workers=data.workers,
            threads=data.threads,
        )

    def see_batch(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        """Images and targets as the model sees them at that step, counted from 1."""
        broken = self.broken_images(print)
        with contextlib.closing(broken.watch(self.train_batches(step - 1))) as batches:
            batch = next(batches)
        broken.tell(broken.take())
        key = mixing.augmentation_key(self._config.seed, step)
        return jax.device_get(jax.jit(self._task.prepare)(batch, key))

    def due(self, step: int) -> tuple[bool, bool, bool]:
        """Whether to log, to evaluate and to save after that step."""
        last = step == self.total_steps
        log, measure, save = (last or step % every == 0 for every in self._cadences)
        return log, measure, save

    def describe_training(
        self, step: int, totals: Totals, stopwatch: Stopwatch
    ) -> dict[str, float]:
        """Means over the steps since the last report; waits for that step's end."""
        _check_finite(totals)
        steps = int(totals.steps)
        seconds, waiting = stopwatch.read()
        rate = steps * self._config.batch_size / seconds
        skipped, updates = int(totals.skipped), int(totals.updates)
        metrics = {}
        if updates:
            metrics = {
                "train/loss": float(totals.loss) / updates,
                "train/grad_norm": float(totals.grad_norm) / updates,
            }
        if self._config.optimizer.skip_nonfinite:
            metrics["train/skipped"] = skipped
        metrics |= {
            "train/learning_rate": float(self._schedule(step - skipped - 1)),
            "train/images_per_second": rate,
            "train/data_wait": waiting / seconds,
        }
        if self._peak_flops:
            metrics["train/mfu"] = rate * self._flops_per_image / self._peak_flops
        return metrics

    @functools.cached_property
    def _peak_flops(self) -> float | None:
        """Of all devices, float operations a second; None where it is unknown."""
        peak = counting.PEAK_FLOPS.get(self.mesh.devices.flat[0].device_kind)
        return peak and peak * self.mesh.devices.size

    @functools.cached_property
    def _flops_per_image(self) -> int:
        """Of a training step: 2 a multiply-add, 3 forward passes' worth."""
        return 6 * sum(
            layer.published for layer in counting.count(self._model, *self._config.data.size)
        )

    def evaluate(
        self,
        state: TrainState,
        part: str,
        prefix: str,
        folder: AnyPath | None = None,
        show: Callable[[str, PIL.Image.Image], None] | None = None,
        *,
        say: Callable[[str], None],
    ) -> dict[str, float]:
        """Measurements on a part of the data, none where the config names no split for it; what
        each class is taken for goes into the folder, and pictures to `show`, where given.

        Raises:
            DataError: more broken images than `config.data.broken_limit`.
        """
        if part not in self._sources:
            return {}
        metrics: dict[str, float] = {}
        for name, ema in _weights(state, prefix):
            variables = self._unstack(state.variables(ema=ema))
            measured = self._measure(variables, self._sources[part])
            metrics |= {f"{name}/{key}": value for key, value in measured.metrics.items()}
            metrics[f"{name}/broken"] = len(measured.broken)
            self._report_broken(f"the {part} split", self._sources[part], measured.broken, say)
            if not hosts.is_first():
                continue
            if measured.confusion is not None and folder is not None:
                self._task.write_tables(folder, name, measured.confusion)
            if measured.picture is not None and show is not None:
                show(name, measured.picture)
        return metrics

    def _report_broken(
        self, name: str, source: Source, broken: Sequence[int], say: Callable[[str], None]
    ) -> None:
        """Names the broken images of an evaluation, each once a run."""
        limit, count, examples = self._config.data.broken_limit, len(broken), len(source.examples)
        if count > limit or (count and count == examples):
            many = f"{count} of the {examples} images of {name} are broken"
            if count > limit:
                many += f", more than config.data.broken_limit={limit} allows"
            raise BrokenSplitError(f"{many}. The first one: {why_broken(source, broken[0])}")
        for index in broken:
            if (name, index) not in self._told_broken:
                self._told_broken.add((name, index))
                say(f"Left a broken image of {name} out. {why_broken(source, index)}")

    def owes_measurements(self, step: int, reporter: Reporter) -> bool:
        """Whether a run that goes on at a step had no chance to measure there, since its data was
        broken. The first process decides for all."""
        _, validate, _ = self.due(step)
        wanted = ["eval/loss"] if validate and "validation" in self._sources else []
        if step == self.total_steps and "test" in self._sources:
            wanted.append("test/loss")
        owed = hosts.is_first() and any(not reporter.has(step, name) for name in wanted)
        return bool(hosts.union([1] if owed else []))

    def score(self, metrics: Mapping[str, float]) -> float | None:
        """What says whether weights are better than others, None where it was not measured."""
        name = self._task.score
        return metrics.get(f"eval_ema/{name}", metrics.get(f"eval/{name}"))

    def open_also(self, cache_dir: AnyPath | None) -> list[imagenet_sets.EvaluationSet]:
        """The sets that are measured as well in mode "eval"."""
        data = self._config.data
        return imagenet_sets.open_sets(
            data.eval_also,
            self._main.class_names,
            self._model.num_classes,
            data_dir=data.data_dir if data.source.startswith("tfds:") else None,
            cache_dir=cache_dir,
            upright=data.upright,
        )

    def evaluate_also(
        self,
        state: TrainState,
        sets: Sequence[imagenet_sets.EvaluationSet],
        folder: AnyPath,
        say: Callable[[str], None],
    ) -> dict[str, float]:
        """Measurements on those sets; a table of the corruptions goes into the folder."""
        metrics: dict[str, float] = {}
        for suffix, ema in _weights(state, "") if sets else ():
            variables = self._unstack(state.variables(ema=ema))
            measured: dict[str, Mapping[str, float]] = {}
            for each in sets:
                whole = {"crop_fraction": 1.0} if each.cropped else {}
                found = self._measure_set(variables, each.source, **whole)
                self._report_broken(each.name, each.source, found.broken, say)
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

    def save_model(self, folder: AnyPath, state: TrainState) -> None:
        """Writes the model folder, with the averaged weights where there are some."""
        variables = hosts.fetch(state.variables(ema=state.ema is not None))
        if hosts.is_first():
            save_pretrained(folder, self._model, variables, self._task.card)


def _open_sources(
    config: ConfigDict,
    cache_dir: AnyPath | None = None,
    cuts: Mapping[str, Cut] | None = None,
) -> dict[str, Source]:
    return {
        part: open_source(
            config.data.source,
            split,
            data_dir=config.data.data_dir,
            cache_dir=cache_dir,
            cut=None if cuts is None else cuts[part],
            upright=config.data.upright,
        )
        for part, split in opened_splits(config).items()
    }


def _check_finite(totals: Totals) -> None:
    """Waits for the step that the totals are of."""
    if bad_step := int(totals.bad_step):
        raise NonFiniteLossError(
            f"The loss or its gradient is not finite at step {bad_step}: the last checkpoint is "
            "from before; a lower config.optimizer.learning_rate or clip_norm may help."
        )


def _weights(state: TrainState, prefix: str) -> list[tuple[str, bool]]:
    """(Name, whether averaged) of each of the state's weights, which are measured apart."""
    return [(prefix, False)] + ([(f"{prefix}_ema", True)] if state.ema is not None else [])


def _evaluate_only(
    run: _Run, made: Provenance, workdir: AnyPath, data_lines: Sequence[str]
) -> dict[str, float]:
    also = run.open_also(workdir / "offsets" if workdir.exists() else None)
    told = made.told
    if made.start is not None:
        state, lines = run.start_from(made.start, run.init_state(), keep_head=True)
        told += lines
    else:
        with Checkpoints(workdir / "checkpoints", keep=None, say=told.append) as checkpoints:
            if checkpoints.latest_step() is None:
                raise ConfigError(
                    f"{workdir} has no checkpoint to evaluate: is it the run's folder?"
                )
            state, _ = checkpoints.restore(run.abstract_state, without=("opt_state",))
    told = [*run.describe_rows(), *told]
    folder = workdir / "evaluation"
    metrics = run.evaluate(state, "validation", "eval", folder, say=told.append)
    metrics |= run.evaluate(state, "test", "test", folder, say=told.append)
    metrics |= run.evaluate_also(state, also, folder, told.append)
    if not hosts.is_first():
        return metrics
    step = int(state.step)
    charts.write_metrics(folder / "metrics.json", step, metrics)
    for name, value in metrics.items():
        if name.endswith("/loss"):
            told.append(f"step {step}: {describe(name.removesuffix('/loss'), metrics)}")
        if name.endswith("/mce"):
            kind = name.removesuffix("/mce")
            told.append(f"step {step}: {kind} mean corruption error {value:.2%}")
    told.append(f"All measurements, and what each class is taken for, are in {folder}.")
    print(*data_lines, *told, sep="\n")
    return metrics
