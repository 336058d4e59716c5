"""A run: from a config to checkpoints, metrics and a model folder."""

import collections
import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from vvt_jax import charts, configuration, costs, forms, hosts, parallel
from vvt_jax.checkpoint import Best, Checkpoints
from vvt_jax.configuration import ConfigError
from vvt_jax.data.augment import check_augment
from vvt_jax.data.loader import BrokenImages, eval_batches, train_batches
from vvt_jax.data.preprocess import check_record
from vvt_jax.data.sources import Source, open_source
from vvt_jax.errors import UserError
from vvt_jax.evaluate import evaluate, make_eval_step
from vvt_jax.finetune import initial_variables
from vvt_jax.interruption import Interrupted, Interruption
from vvt_jax.models import VVT, create_model, unstack_blocks
from vvt_jax.pretrained import save_pretrained
from vvt_jax.recipe import mixing
from vvt_jax.recipe.optimizer import make_optimizer, make_schedule
from vvt_jax.recipe.step import Totals, TrainState, init_state, make_train_step
from vvt_jax.reporting import Reporter, SilentReporter, describe
from vvt_jax.timing import Stopwatch, Trace

_STEPS_AHEAD = 2  # steps given to the devices and not waited for: more would only hold batches


class NonFiniteLossError(UserError):
    """A loss or gradient that is not a number, or infinite."""


def train_and_evaluate(config: ConfigDict, workdir: str | Path) -> dict[str, float]:
    """Trains as the config says, or goes on with what the workdir holds, and evaluates.

    The workdir gets `config.json`, `checkpoints/`, `metrics.jsonl`, TensorBoard files and, from the
    first evaluation on, `model/`: a `save_pretrained` folder of the weights with the highest
    validation top-1 so far (the averaged ones where `optimizer.ema_decay` is set; the last ones
    where there is no validation split).

    Args:
        config: see `configs/common.py`.
        workdir: the run's folder; given again, the run resumes.

    Returns:
        The last evaluation's measurements, as in `metrics.jsonl`.

    Raises:
        UserError: a config, data set, checkpoint or loss that can't be gone on with, in a sentence.
        Interrupted: SIGTERM or Ctrl-C came; the run was saved.
    """
    workdir = Path(workdir)
    configuration.check_values(config)
    hosts.join(config.distributed, preemptible=config.mode == "train")
    if config.compilation_cache:
        cache = Path(config.compilation_cache).expanduser()
        jax.config.update("jax_compilation_cache_dir", str(cache))
    may_write = config.mode == "train" or workdir.exists()
    sources = _open_sources(config.data, workdir / "offsets" if may_write else None)
    run = _Run(config, sources)
    configuration.settle(config, workdir, write=hosts.is_first())
    if config.mode == "eval":
        return _evaluate_only(run, config, workdir)

    with contextlib.ExitStack() as stack:
        interruption = stack.enter_context(Interruption())
        checkpoints = stack.enter_context(
            Checkpoints(workdir / "checkpoints", keep=config.keep_checkpoints)
        )
        told: list[str] = []
        if checkpoints.latest_step() is None:
            state, best = run.init_state(), Best()
            if config.init_from:
                state, told = run.start_from(config.init_from, state)
        else:
            state, best = checkpoints.restore(run.abstract_state)
        step = int(state.step)
        train_step = run.compile_train_step()  # before the clock starts
        make_reporter = Reporter if hosts.is_first() else SilentReporter
        reporter = stack.enter_context(
            make_reporter(workdir, start_step=step, total_steps=run.total_steps)
        )
        for line in [*told, run.describe()]:
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
        unread: _Unread | None = None  # of the step before, not waited for yet
        under_way: collections.deque[jax.Array] = collections.deque()
        stopwatch = Stopwatch()
        start = step
        arrays = parallel.to_devices(batches, run.mesh, config.batch_size)
        for batch in stopwatch.waiting(arrays):
            if step == run.total_steps or interruption.stops_after(step - start):
                break
            trace.before(step + 1)
            state, done = train_step(state, batch)
            step += 1
            under_way.append(done)
            if len(under_way) > _STEPS_AHEAD:
                under_way.popleft().block_until_ready()
            trace.after(step, done)
            reporter.advance()
            if unread is not None:  # read while the devices are busy with this step
                metrics = run.describe_training(step - 1, unread.totals, stopwatch)
                reporter.write(step - 1, metrics)
                broken.tell(np.asarray(unread.broken))
                unread = None

            log, measure, save = run.due(step)
            if log:
                unread = _Unread(state.totals, hosts.gather(broken.take()))
                state = dataclasses.replace(state, totals=run.no_totals())
            if not (measure or save):
                continue
            _check_finite(state.totals)
            metrics = {}
            if unread is not None:
                metrics = run.describe_training(step, unread.totals, stopwatch)
                broken.tell(np.asarray(unread.broken))
                unread = None
            with stopwatch.paused():
                top1 = None
                if measure:
                    metrics |= run.evaluate(state, "validation", "eval")
                    top1 = metrics.get("eval_ema/top1", metrics.get("eval/top1"))
                if step == run.total_steps:
                    metrics |= run.evaluate(state, "test", "test")
                reporter.write(step, metrics)
                latest = metrics
                if top1 is not None and top1 > best.top1:
                    best, save = Best(step=step, top1=top1), True
                    run.save_model(workdir / "model", state)
                elif step == run.total_steps and not best.step:  # there was no validation
                    run.save_model(workdir / "model", state)
                if save:
                    checkpoints.save(step, state, best)

        if interruption.signum:
            if unread is not None:
                metrics = run.describe_training(step, unread.totals, stopwatch)
                reporter.write(step, metrics)
            _check_finite(state.totals)
            checkpoints.save(step, state, best)
            if unread is not None:
                broken.tell(np.asarray(unread.broken))
    if interruption.signum:  # also one that came while the last checkpoint was being written
        raise Interrupted(interruption.signum, step)
    return latest


def see_batch(
    config: ConfigDict, step: int
) -> tuple[np.ndarray, np.ndarray, Mapping[str, Any], Sequence[str]]:
    """What the model sees at a step of training, counted from 1.

    Returns:
        float32 images `[batch, height, width, 3]`, targets `[batch, num_classes]`, the
        preprocessing record that they were normalised by, and the classes' names.

    Raises:
        UserError: as `train_and_evaluate`.
    """
    configuration.check_values(config)
    sources = _open_sources(config.data)
    run = _Run(config, sources)
    images, targets = run.see_batch(step)
    return images, targets, run.preprocessing, sources["train"].class_names


class _Unread(NamedTuple):
    """What a report is made of, on its way from the devices."""

    totals: Totals  # since the last report
    broken: jax.Array  # numbers of broken examples, int32 [processes, ...]


class _Run:
    """What follows from the config alone: model, mesh, data streams, compiled steps."""

    def __init__(self, config: ConfigDict, sources: Mapping[str, Source]):
        self._config, self._sources = config, sources
        data = config.data
        self.preprocessing = {
            "size": list(data.size),
            "crop_fraction": data.crop_fraction,
            "interpolation": data.interpolation,
            "mean": list(data.mean),
            "std": list(data.std),
        }
        with _naming("config.data"):
            check_record(self.preprocessing)
        with _naming("config.augment"):
            check_augment(config.augment)
            mixing.check_mixing(config.augment)
        self._model = _make_model(config, sources["train"].num_classes)
        self.mesh = parallel.make_mesh(
            config.mesh,
            config.batch_size,
            height=data.size[0],
            stride=math.prod(self._model.patch_strides),
        )

        examples = len(sources["train"].examples)

        def in_steps(fields: ConfigDict, name: str) -> int:
            steps = configuration.in_steps(fields, name, config.batch_size, examples, default=1.0)
            return max(1, steps)

        self.total_steps: int = in_steps(config, "total")
        self._cadences = [
            in_steps(config, f"{name}_every") for name in ("log", "eval", "checkpoint")
        ]
        self._schedule = make_schedule(
            config.optimizer,
            self.total_steps,
            configuration.in_steps(config.optimizer, "warmup", config.batch_size, examples),
            config.batch_size,
        )
        optimizer = make_optimizer(config.optimizer, self._schedule)

        self._init = functools.partial(
            init_state,
            self._model,
            optimizer,
            (1, *data.size, 3),
            ema=config.optimizer.ema_decay > 0,
        )
        with _naming("config.data.size"):
            images = jax.ShapeDtypeStruct((1, *data.size, 3), np.float32)
            jax.eval_shape(self._model.init, jax.random.key(0), images)
        with _naming("config.optimizer.freeze"):
            shapes = jax.eval_shape(self._init, config.seed)
        self._shardings = parallel.state_shardings(self.mesh, shapes)
        self.abstract_state = parallel.abstract(self._shardings, shapes)
        self._prepare = functools.partial(
            mixing.prepare_batch,
            preprocessing=self.preprocessing,
            augment=config.augment.to_dict(),
            label_smoothing=config.optimizer.label_smoothing,
            num_classes=self._model.num_classes,
        )
        self._train_step = make_train_step(
            self._model,
            optimizer,
            prepare=self._prepare,
            ema_decay=config.optimizer.ema_decay,
            accumulate=config.optimizer.accumulate,
            freeze=config.optimizer.freeze,
        )

    def describe(self) -> str:
        """The run in a line: how long it is, and how often it does what."""
        epochs = self.total_steps * self._config.batch_size / len(self._sources["train"].examples)
        log, measure, save = self._cadences
        return (
            f"{self.total_steps} steps ({epochs:.4g} epochs) of {self._config.batch_size} images: "
            f"logs every {log}, evaluates every {measure}, saves every {save}."
            + ("" if self._peak_flops else " Model-FLOPs utilisation: unknown for these devices.")
        )

    def init_state(self) -> TrainState:
        """The state before the first step, laid out on the devices."""
        options = forms.compiler_options("init")
        init = jax.jit(self._init, out_shardings=self._shardings, compiler_options=options)
        return init(self._config.seed)

    def start_from(
        self, path: str, state: TrainState, *, keep_head: bool = False
    ) -> tuple[TrainState, list[str]]:
        """The state with the weights of a model folder or another run, and what to say of them."""
        variables, told = initial_variables(
            path,
            self._model,
            hosts.fetch(state.variables()),
            self._sources["train"].class_names,
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

        return parallel.compile_program(
            "train",
            update,
            self.abstract_state,
            self._abstract_batch("image", "label"),
            donate=(0,),
            out_shardings=(self._shardings, self._shardings.step),
        )

    @functools.cached_property
    def _eval_variables(self) -> Any:
        """Variables as evaluation takes them: a program that runs often wants blocks apart."""
        shapes = jax.eval_shape(unstack_blocks, self.abstract_state.variables())
        return parallel.abstract(parallel.state_shardings(self.mesh, shapes), shapes)

    @functools.cached_property
    def _unstack(self) -> Callable[[Any], Any]:
        shardings = jax.tree.map(lambda x: x.sharding, self._eval_variables)
        return jax.jit(unstack_blocks, out_shardings=shardings)

    @functools.cached_property
    def _eval_step(self) -> Callable[[Any, Mapping[str, jax.Array]], dict[str, jax.Array]]:
        return parallel.compile_program(
            "forward",
            make_eval_step(self._model, self.preprocessing, confusion=self._config.mode == "eval"),
            self._eval_variables,
            self._abstract_batch("image", "label", "mask"),
            out_shardings=parallel.replicated(self.mesh),
        )

    def _abstract_batch(self, *names: str) -> dict[str, jax.ShapeDtypeStruct]:
        batch = self._config.batch_size
        kinds = {
            "image": ((batch, *self._config.data.size, 3), np.uint8),
            "label": ((batch,), np.int32),
            "mask": ((batch,), np.bool_),
        }
        shardings = parallel.batch_shardings(self.mesh, names)
        return {
            name: jax.ShapeDtypeStruct(*kinds[name], sharding=shardings[name]) for name in names
        }

    @functools.cached_property
    def _rows(self) -> np.ndarray:
        """The examples of a batch that are this process's own."""
        return parallel.local_rows(self.mesh, self._config.batch_size)

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
        return jax.device_get(jax.jit(self._prepare)(batch, key))

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
        metrics = {
            "train/loss": float(totals.loss) / steps,
            "train/grad_norm": float(totals.grad_norm) / steps,
            "train/learning_rate": float(self._schedule(step - 1)),
            "train/images_per_second": rate,
            "train/data_wait": waiting / seconds,
        }
        if self._peak_flops:
            metrics["train/mfu"] = rate * self._flops_per_image / self._peak_flops
        return metrics

    @functools.cached_property
    def _peak_flops(self) -> float | None:
        """Of all devices, float operations a second; None where it is unknown."""
        peak = costs.PEAK_FLOPS.get(self.mesh.devices.flat[0].device_kind)
        return peak and peak * self.mesh.devices.size

    @functools.cached_property
    def _flops_per_image(self) -> int:
        """Of a training step: 2 a multiply-add, 3 forward passes' worth."""
        return 6 * sum(
            layer.published for layer in costs.count(self._model, *self._config.data.size)
        )

    def evaluate(
        self, state: TrainState, part: str, prefix: str, folder: Path | None = None
    ) -> dict[str, float]:
        """Measurements on a part of the data, none where the config names no split for it; in mode
        "eval" also what each class is taken for, as files in the folder."""
        if part not in self._sources:
            return {}
        metrics: dict[str, float] = {}
        for name in (prefix, f"{prefix}_ema") if state.ema is not None else (prefix,):
            batches = eval_batches(
                self._sources[part],
                record=self.preprocessing,
                batch_size=self._config.batch_size,
                rows=self._rows,
                workers=self._config.data.workers,
                threads=self._config.data.threads,
            )
            with contextlib.closing(batches):
                measured, confusion = evaluate(
                    self._eval_step,
                    self._unstack(state.variables(ema=name.endswith("_ema"))),
                    parallel.to_devices(batches, self.mesh, self._config.batch_size),
                )
            metrics |= {f"{name}/{key}": value for key, value in measured.items()}
            if confusion is not None and folder is not None and hosts.is_first():
                self._write_confusion(folder, name, confusion)
        return metrics

    def _write_confusion(self, folder: Path, name: str, confusion: np.ndarray) -> None:
        classes = self._sources["train"].num_classes  # the model may have more
        known, names = confusion[:classes, :classes], self._sources["train"].class_names
        charts.write_per_class(folder / f"{name}_per_class.csv", known, names)
        try:
            charts.draw_confusion(folder / f"{name}_confusion.png", known, names)
        except charts.MissingPackageError as error:
            print(error)

    def save_model(self, folder: Path, state: TrainState) -> None:
        """Writes the model folder, with the averaged weights where there are some."""
        card = {
            "preprocessing": self.preprocessing,
            "class_names": list(self._sources["train"].class_names),
        }
        variables = hosts.fetch(state.variables(ema=state.ema is not None))
        if hosts.is_first():
            save_pretrained(folder, self._model, variables, card)


def _open_sources(data: ConfigDict, cache_dir: Path | None = None) -> dict[str, Source]:
    splits = {
        "train": data.train_split,
        "validation": data.validation_split,
        "test": data.test_split,
    }
    sources = {
        part: open_source(data.source, split, data_dir=data.data_dir, cache_dir=cache_dir)
        for part, split in splits.items()
        if split
    }
    if "train" not in sources:
        raise ConfigError("config.data.train_split is empty: training needs a split.")
    return sources


def _make_model(config: ConfigDict, classes: int) -> VVT:
    fields = {name: value for name, value in config.model.items() if value is not None}
    with _naming("config.model"):
        model = create_model(fields.pop("name"), **{"num_classes": classes, **fields})
    if model.num_classes < classes:
        raise ConfigError(
            f"config.model.num_classes={model.num_classes} is too small: "
            f"{config.data.source} has {classes} classes."
        )
    return model


@contextlib.contextmanager
def _naming(fields: str) -> Iterator[None]:
    """Says which fields of the config a ValueError is about."""
    try:
        yield
    except ValueError as error:
        raise ConfigError(f"{fields}: {error}") from error


def _check_finite(totals: Totals) -> None:
    """Waits for the step that the totals are of."""
    if bad_step := int(totals.bad_step):
        raise NonFiniteLossError(
            f"The loss or its gradient is not finite at step {bad_step}: the last checkpoint is "
            "from before; a lower config.optimizer.learning_rate or clip_norm may help."
        )


def _evaluate_only(run: _Run, config: ConfigDict, workdir: Path) -> dict[str, float]:
    if config.init_from:
        state, told = run.start_from(config.init_from, run.init_state(), keep_head=True)
    else:
        with Checkpoints(workdir / "checkpoints", keep=None) as checkpoints:
            if checkpoints.latest_step() is None:
                raise ConfigError(
                    f"{workdir} has no checkpoint to evaluate: is it the run's folder?"
                )
            (state, _), told = checkpoints.restore(run.abstract_state), []
    folder = workdir / "evaluation"
    metrics = run.evaluate(state, "validation", "eval", folder)
    metrics |= run.evaluate(state, "test", "test", folder)
    for name in metrics:
        if name.endswith("/top1"):
            part = describe(name.removesuffix("/top1"), metrics)
            told.append(f"step {int(state.step)}: {part}")
    told.append(f"What each class is taken for is in {folder}.")
    if hosts.is_first():
        print(*told, sep="\n")
    return metrics
