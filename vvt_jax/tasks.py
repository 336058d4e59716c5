"""What a run learns: to classify images, or each of their pixels. All that differs between them.

The trainer takes a task's model, batches, loss, evaluation and tables, and knows nothing else of
it. A further task is a further class with these members, and a line in `make_task`.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from vvt_jax import charts, models, parallel
from vvt_jax.configuration import ConfigError
from vvt_jax.data import augment
from vvt_jax.data.loader import eval_batches
from vvt_jax.data.preprocess import check_record
from vvt_jax.data.sources import Source
from vvt_jax.evaluate import evaluate, make_eval_step
from vvt_jax.models import VVT
from vvt_jax.recipe import mixing
from vvt_jax.recipe.losses import mean_cross_entropy
from vvt_jax.storage import AnyPath

Measured = tuple[dict[str, float], np.ndarray | None]  # metrics, and a confusion matrix if counted


class Task(Protocol):
    """What the trainer needs of a task.

    Attributes:
        model: what is trained.
        card: what is stored with its weights.
        score: the measurement that says which weights are the best, higher being better.
        train_example: makes the arrays of a training example, see `loader.train_batches`.
    """

    model: VVT
    card: dict[str, Any]
    score: str
    train_example: Callable[..., dict[str, Any]]

    def train_arrays(self) -> dict[str, tuple[tuple[int, ...], Any]]:
        """Shape and dtype of each array of a training batch."""

    def prepare(
        self, batch: Mapping[str, jax.Array], key: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """Images and targets as the model sees them; runs inside the training step."""

    def loss(self, outputs: Any, targets: jax.Array) -> jax.Array:
        """The loss of a batch, a float32 number, of what the model gives in training."""

    def evaluator(self, mesh: Mesh, variables: Any) -> Callable[[Any, Source], Measured]:
        """Measures variables on a source; given are their shapes with shardings."""

    def write_tables(self, folder: AnyPath, name: str, confusion: np.ndarray) -> None:
        """Writes what each class is taken for."""


class Classification:
    """One label an image."""

    score = "top1"
    train_example = staticmethod(augment.train_example)

    def __init__(self, config: ConfigDict, source: Source):
        self._config = config
        self._record, self.card = _describe_data(config.data, source)
        with naming("config.augment"):
            augment.check_augment(config.augment)
            mixing.check_mixing(config.augment)
        self.model = _make_model(config, source)
        self.prepare = functools.partial(
            mixing.prepare_batch,
            preprocessing=self._record,
            augment=config.augment.to_dict(),
            label_smoothing=config.optimizer.label_smoothing,
            num_classes=self.model.num_classes,
        )

    def train_arrays(self) -> dict[str, tuple[tuple[int, ...], Any]]:
        batch = self._config.batch_size
        return {
            "image": ((batch, *self._config.data.size, 3), np.uint8),
            "label": ((batch,), np.int32),
        }

    def loss(self, outputs: Any, targets: jax.Array) -> jax.Array:
        return mean_cross_entropy(outputs, targets)

    def evaluator(self, mesh: Mesh, variables: Any) -> Callable[[Any, Source], Measured]:
        batch, data = self._config.batch_size, self._config.data
        arrays = {**self.train_arrays(), "mask": ((batch,), np.bool_)}
        step = parallel.compile_program(
            "forward",
            make_eval_step(self.model, self._record, confusion=self._config.mode == "eval"),
            variables,
            parallel.abstract_batch(mesh, arrays),
        )

        def measure(variables: Any, source: Source) -> Measured:
            batches = eval_batches(
                source,
                record=self._record,
                batch_size=batch,
                workers=data.workers,
                threads=data.threads,
            )
            with contextlib.closing(batches):
                return evaluate(step, variables, parallel.to_devices(batches, mesh))

        return measure

    def write_tables(self, folder: AnyPath, name: str, confusion: np.ndarray) -> None:
        names = self.card["class_names"]
        known = confusion[: len(names), : len(names)]  # the model may have more
        charts.write_per_class(folder / f"{name}_per_class.csv", known, names)
        try:
            charts.draw_confusion(folder / f"{name}_confusion.png", known, names)
        except charts.MissingPackageError as error:
            print(error)


def make_task(config: ConfigDict, source: Source) -> Task:
    """The task of a config, for the classes of its training images.

    Raises:
        ConfigError: settings that it can't be run with.
    """
    return Classification(config, source)


def _describe_data(data: ConfigDict, source: Source) -> tuple[dict[str, Any], dict[str, Any]]:
    """The preprocessing record, and the card that holds it."""
    record = {
        "size": list(data.size),
        "crop_fraction": data.crop_fraction,
        "interpolation": data.interpolation,
        "mean": list(data.mean),
        "std": list(data.std),
    }
    with naming("config.data"):
        check_record(record)
    return record, {"preprocessing": record, "class_names": list(source.class_names)}


def _make_model(config: ConfigDict, source: Source) -> VVT:
    fields = {name: value for name, value in config.model.items() if value is not None}
    with naming("config.model"):
        model = models.create(**{"num_classes": source.num_classes, **fields})
    if model.num_classes < source.num_classes:
        raise ConfigError(
            f"config.model.num_classes={model.num_classes} is too small: "
            f"{config.data.source} has {source.num_classes} classes."
        )
    return model


@contextlib.contextmanager
def naming(fields: str) -> Iterator[None]:
    """Says which fields of the config a ValueError is about."""
    try:
        yield
    except ValueError as error:
        raise ConfigError(f"{fields}: {error}") from error
