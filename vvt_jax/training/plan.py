"""Everything that is derived from a config and its data before anything is computed."""

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

_LAYOUT_LINES = 8  # of the table of what devices hold, that are printed
_LOG_EVERY = 20  # steps, where the config says nothing


class Due(NamedTuple):
    """What is to be done after a step."""

    log: bool
    evaluate: bool
    save: bool


@dataclasses.dataclass(frozen=True)
class Steps:
    """How long a run is, and how often it logs, evaluates and saves, in steps."""

    total: int
    log_every: int
    evaluate_every: int
    save_every: int

    def due(self, step: int) -> Due:
        """What is to be done after that step; everything after the last one."""
        cadences = (self.log_every, self.evaluate_every, self.save_every)
        return Due(*(step == self.total or step % every == 0 for every in cadences))


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a run is made of.

    Attributes:
        config: with what a run or model recorded already applied, see `provenance`.
        sources: by part of the data: `train`, `validation`, `test`.
        task: what is learnt, with the model.
        mesh: of the devices.
        steps: the length of the run. An evaluation has it as zeros.
        schedule: the learning rate by the number of updates done so far; None in an evaluation.
        optimizer: in an evaluation one that has no state.
        abstract_state: shapes, dtypes and shardings of the state.
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
        """The one that names the classes."""
        return _main_source(self.sources)

    @property
    def preprocessing(self) -> Mapping[str, Any]:
        """The preprocessing record."""
        return self.task.card["preprocessing"]

    @property
    def shardings(self) -> TrainState:
        """Of the state."""
        return jax.tree.map(lambda leaf: leaf.sharding, self.abstract_state)

    def init_state(self, seed: jax.typing.ArrayLike) -> TrainState:
        """The state before the first step; a pure function, to be compiled."""
        return _make_init(self.config, self.model, self.optimizer)(seed)

    def train_batches(self, start_step: int) -> Generator[dict[str, np.ndarray], None, None]:
        """The endless stream of batches from that step on, with flags for broken images; of each
        batch only the examples that this process's own devices hold."""
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
        """What names and counts the broken images of training."""
        return BrokenImages(self.sources["train"], self.config.data.broken_limit, say)

    def peak_flops(self) -> float | None:
        """Of all devices, float operations a second; None where it is unknown."""
        peak = counting.PEAK_FLOPS.get(self.mesh.devices.flat[0].device_kind)
        return peak and peak * self.mesh.devices.size

    def flops_per_image(self) -> int:
        """Of a training step: two FLOPs per multiply-add, times three forward passes."""
        layers = counting.count(self.model, *self.config.data.size)
        return 6 * sum(layer.published for layer in layers)


def open_sources(
    config: ConfigDict,
    cache_dir: AnyPath | None = None,
    cuts: Mapping[str, Cut] | None = None,
) -> dict[str, Source]:
    """The sources that a run reads, by part of the data.

    Args:
        config: of the run.
        cache_dir: see `sources.open_source`.
        cuts: how the examples of each part are chosen.

    Raises:
        DataError, ConfigError: the data or the splits are not there.
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
    """The plan of a run.

    Args:
        config: whose values were checked.
        sources: by part, as `open_sources` opens them.

    Raises:
        UserError: the config can't be run with this data, in a sentence.
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
    """The data in a line, the files that are left out, and in training what the masks contain.

    Raises:
        DataError: masks that can't be learnt from.
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
    """The run in a line: how long it is, and how often it logs, evaluates and saves."""
    steps, batch = plan.steps, plan.config.batch_size
    epochs = steps.total * batch / len(plan.sources["train"].examples)
    return (
        f"{steps.total} steps ({epochs:.4g} epochs) of {batch} images: logs every "
        f"{steps.log_every}, evaluates every {steps.evaluate_every}, saves every "
        f"{steps.save_every}."
        + ("" if plan.peak_flops() else " Model-FLOPs utilisation: unknown for these devices.")
    )


def describe_rows(plan: Plan) -> list[str]:
    """What to say of images whose rows do not divide evenly over the devices, if anything."""
    strides = np.cumprod(plan.model.patch_strides).tolist()
    line = sharding.describe_rows(plan.mesh, plan.config.data.size[0], strides)
    return [line] if line else []


def describe_layout(plan: Plan, path: AnyPath) -> list[str]:
    """The mesh and its forms, and what each of several devices holds; all of that in a file."""
    lines = [sharding.describe_mesh(plan.mesh), *describe_rows(plan)]
    if hosts.is_first():
        storage.replace(path, (sharding.layout_report(plan.abstract_state) + "\n").encode())
    if plan.mesh.devices.size > 1:
        shown = sharding.layout_report(plan.abstract_state, largest=_LAYOUT_LINES)
        lines.append(f"{shown}\nThe whole table is in {path}.")
    return lines


def see_batch(plan: Plan, step: int) -> dict[str, np.ndarray]:
    """This process's examples of the batch of that step, counted from 1."""
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
