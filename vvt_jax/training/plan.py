"""The plan of a run: all that follows from its config and data before anything is computed."""

import contextlib
import dataclasses
from collections.abc import Generator, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from vvt_jax.data.examples import Cut, DataError, Source
from vvt_jax.data.loader import BrokenImages, train_batches
from vvt_jax.data.mask_survey import survey_masks
from vvt_jax.data.sources import open_source
from vvt_jax.distributed import hosts, sharding
from vvt_jax.models import VVT, counting
from vvt_jax.models.vvt import check_image_shape
from vvt_jax.system import storage
from vvt_jax.system.storage import AnyPath
from vvt_jax.training import configuration
from vvt_jax.training.configuration import ConfigError
from vvt_jax.training.optimizer import make_optimizer, make_schedule
from vvt_jax.training.provenance import opened_splits
from vvt_jax.training.step import TrainState, init_state
from vvt_jax.training.tasks import Task, make_task, naming

_LAYOUT_LINES = 8  # how many lines of the layout table are printed
_LOG_EVERY = 20  # steps between log entries, unless the config sets them


class Due(NamedTuple):
    """What needs to be done after a step."""

    log: bool
    evaluate: bool
    save: bool


@dataclasses.dataclass(frozen=True)
class Steps:
    """The length of a run, and how often it logs, evaluates and saves, all in steps."""

    total: int
    log_every: int
    evaluate_every: int
    save_every: int

    def due(self, step: int) -> Due:
        """Return what needs to be done after the given step. After the last one, everything is."""
        cadences = (self.log_every, self.evaluate_every, self.save_every)
        return Due(*(step == self.total or step % every == 0 for every in cadences))


@dataclasses.dataclass(frozen=True)
class Plan:
    """The components of a run.

    Attributes:
        config: the configuration, with what a run or model recorded already applied; see
            `provenance`.
        sources: the data sources, keyed by part of the data: `train`, `validation`, `test`.
        task: the task to learn, including the model.
        mesh: the mesh of devices.
        steps: the length of the run; all zeros in an evaluation.
        schedule: the learning rate as a function of the number of updates so far; None in an
            evaluation.
        optimizer: the optimizer; in an evaluation, one without state.
        abstract_state: the shapes, dtypes and shardings of the training state.
    """

    config: ConfigDict
    sources: Mapping[str, Source]
    task: Task
    mesh: Mesh
    steps: Steps
    schedule: optax.Schedule | None
    optimizer: optax.GradientTransformation
    abstract_state: TrainState

    @property
    def model(self) -> VVT:
        return self.task.model

    @property
    def main_source(self) -> Source:
        """The source that defines the class names."""
        return _main_source(self.sources)

    @property
    def preprocessing(self) -> Mapping[str, Any]:
        """The preprocessing record."""
        return self.task.card["preprocessing"]

    @property
    def shardings(self) -> TrainState:
        """The shardings of the training state."""
        return jax.tree.map(lambda leaf: leaf.sharding, self.abstract_state)

    def init_state(self, seed: jax.typing.ArrayLike) -> TrainState:
        """Return the state before the first step. This is a pure function, meant for `jax.jit`."""
        return _make_init(self.config, self.model, self.optimizer)(seed)

    def train_batches(self, start_step: int) -> Generator[dict[str, np.ndarray], None, None]:
        """Return an endless stream of training batches, with flags for broken images.

        The stream begins with the batch that follows `start_step` completed steps. Of each batch,
        it contains only the examples that this process's own devices hold.
        """
        config = self.config
        return train_batches(
            self.sources["train"],
            record=self.preprocessing,
            augment=config.augment.to_dict(),
            prepare=self.task.train_example,
            batch_size=config.batch_size,
            seed=config.seed,
            start_step=start_step,
            repeats=config.augment.repeats,
            rows=sharding.local_rows(self.mesh, config.batch_size),
            workers=config.data.workers,
            threads=config.data.threads,
        )

    def broken_images(self, say) -> BrokenImages:
        """Return an object that reports and counts the broken images of the training data."""
        return BrokenImages(self.sources["train"], self.config.data.broken_limit, say)

    def peak_flops(self) -> float | None:
        """Return the peak FLOP/s of all devices together, or None if it is unknown."""
        peak = counting.PEAK_FLOPS.get(self.mesh.devices.flat[0].device_kind)
        return peak and peak * self.mesh.devices.size

    def flops_per_image(self) -> int:
        """Return the FLOPs of a training step per image.

        A multiply-add counts as two FLOPs, and a training step as three forward passes.
        """
        layers = counting.count(self.model, *self.config.data.size)
        return 6 * sum(layer.published for layer in layers)


def open_sources(
    config: ConfigDict,
    cache_dir: AnyPath | None = None,
    cuts: Mapping[str, Cut] | None = None,
) -> dict[str, Source]:
    """Open the data sources of a run and return them by part of the data.

    Args:
        config: the configuration of the run.
        cache_dir: the cache folder, see `sources.open_source`.
        cuts: how the examples of each part are selected.

    Raises:
        DataError, ConfigError: the data or the splits do not exist.
    """
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


def make_plan(config: ConfigDict, sources: Mapping[str, Source]) -> Plan:
    """Make the plan of a run.

    Args:
        config: the configuration, whose values have already been checked.
        sources: the data sources by part, as returned by `open_sources`.

    Raises:
        UserError: the config can't be run with this data; the message is one sentence.
    """
    for part, source in sources.items():
        if not len(source.examples):
            raise DataError(
                f"The split config.data.{part}_split={source.split!r} of {source.name!r} has "
                "no examples."
            )
    size = config.data.size
    task = make_task(config, _main_source(sources))
    mesh = sharding.make_mesh(config.mesh, config.batch_size, height=size[0])
    steps, schedule, optimizer = Steps(0, 0, 0, 0), None, optax.identity()
    if config.mode == "train":
        examples = len(sources["train"].examples)
        steps = _count_steps(config, examples)
        schedule = make_schedule(
            config.optimizer,
            steps.total,
            configuration.in_steps(config.optimizer, "warmup", config.batch_size, examples),
            config.batch_size,
            examples / config.batch_size,
        )
        optimizer = make_optimizer(config.optimizer, schedule)
    with naming("config.data.size"):
        check_image_shape((1, *size, 3))
    with naming("config.optimizer.freeze"):
        shapes = jax.eval_shape(_make_init(config, task.model, optimizer), config.seed)
    abstract_state = sharding.abstract(sharding.state_shardings(mesh, shapes), shapes)
    return Plan(config, sources, task, mesh, steps, schedule, optimizer, abstract_state)


def describe_data(plan: Plan) -> list[str]:
    """Return lines that describe the data.

    They summarise the sources, list the files that are left out and, when training a segmenter,
    say what the masks contain.

    Raises:
        DataError: the masks are unusable for training.
    """
    main = plan.main_source
    counts = [f"{part} {len(source.examples)}" for part, source in plan.sources.items()]
    lines = [f"{main.name}: {main.num_classes} classes; images: {', '.join(counts)}."]
    for source in plan.sources.values():
        lines += [line for line in source.left_out if line not in lines]
    if main.pixels and plan.config.mode == "train":
        lines += survey_masks(main).sentences(main.class_names)
    return lines


def describe_steps(plan: Plan) -> str:
    """Return one line on the run's length and on how often it logs, evaluates and saves."""
    steps, batch = plan.steps, plan.config.batch_size
    epochs = steps.total * batch / len(plan.sources["train"].examples)
    return (
        f"{steps.total} steps ({epochs:.4g} epochs) of {batch} images: logs every "
        f"{steps.log_every}, evaluates every {steps.evaluate_every}, saves every "
        f"{steps.save_every}."
        + ("" if plan.peak_flops() else " Model-FLOPs utilisation: unknown for these devices.")
    )


def describe_rows(plan: Plan) -> list[str]:
    """Return a line about image rows that can't be split evenly over the devices, if any."""
    strides = np.cumprod(plan.model.patch_strides).tolist()
    line = sharding.describe_rows(plan.mesh, plan.config.data.size[0], strides)
    return [line] if line else []


def describe_layout(plan: Plan, path: AnyPath) -> list[str]:
    """Write the layout of the state to a file and return lines that describe it.

    The lines describe the mesh with the forms chosen for it and, if there are several devices, how
    much of the largest parameters each of them holds; the file contains the whole table.
    """
    lines = [sharding.describe_mesh(plan.mesh), *describe_rows(plan)]
    if hosts.is_first():
        storage.replace(path, (sharding.layout_report(plan.abstract_state) + "\n").encode())
    if plan.mesh.devices.size > 1:
        shown = sharding.layout_report(plan.abstract_state, largest=_LAYOUT_LINES)
        lines.append(f"{shown}\nThe whole table is in {path}.")
    return lines


def see_batch(plan: Plan, step: int) -> dict[str, np.ndarray]:
    """Return this process's examples of the batch of a given step, counted from 1."""
    broken = plan.broken_images(print)
    with contextlib.closing(broken.watch(plan.train_batches(step - 1))) as batches:
        batch = next(batches)
    broken.tell(broken.take())
    return batch


def _main_source(sources: Mapping[str, Source]) -> Source:
    return sources.get("train") or next(iter(sources.values()))


def _make_init(config: ConfigDict, model: VVT, optimizer: optax.GradientTransformation):
    shape, ema = (1, *config.data.size, 3), config.optimizer.ema_decay > 0
    return lambda seed: init_state(model, optimizer, shape, seed, ema=ema)


def _count_steps(config: ConfigDict, examples: int) -> Steps:
    def count(name: str, default_steps: int | None = None) -> int:
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

    return Steps(
        total=count("total"),
        log_every=count("log_every", default_steps=_LOG_EVERY),
        evaluate_every=count("eval_every"),
        save_every=count("checkpoint_every"),
    )
