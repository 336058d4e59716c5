"""The tasks that a run can learn, and everything that differs between them.

A model learns to classify either whole images or each of their pixels. The trainer uses a task's
model, batches, loss, evaluation and tables, and knows nothing else about it. To add a task, write a
class with these members and choose it in `make_task`.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import jax
import numpy as np
import PIL.Image
from jax.sharding import Mesh
from ml_collections import ConfigDict

from vvt_jax import models
from vvt_jax.data import augment, overlay, pixel_labels
from vvt_jax.data.examples import Source
from vvt_jax.data.loader import eval_batches, without_flags
from vvt_jax.data.preprocess import check_record, normalize
from vvt_jax.distributed import hosts, sharding
from vvt_jax.inference import segment
from vvt_jax.models import VVT
from vvt_jax.system.errors import MissingPackageError
from vvt_jax.system.storage import AnyPath
from vvt_jax.training import charts, mixing
from vvt_jax.training.configuration import ConfigError
from vvt_jax.training.eval_step import evaluate, make_eval_step, make_set_step
from vvt_jax.training.losses import mean_cross_entropy, pixel_cross_entropy
from vvt_jax.weights.inference_settings import check_inference, plain_inference

_SHOWN = 4  # images in the picture that compares predictions with the ground truth


@dataclasses.dataclass(frozen=True)
class Measured:
    """The results of an evaluation.

    Attributes:
        metrics: the metrics by name.
        confusion: the confusion matrix, int `[classes, classes]`, whose rows are the true classes;
            None if it wasn't computed.
        picture: a picture of predictions beside the ground truth, or None.
        broken: the numbers of the examples that could not be used and are excluded from all counts.
    """

    metrics: dict[str, float]
    confusion: np.ndarray | None
    picture: PIL.Image.Image | None = None
    broken: tuple[int, ...] = ()


class Task(Protocol):
    """The interface between the trainer and a task.

    Attributes:
        model: the model to train.
        card: the information that is stored with the model's weights.
        score: the name of the metric that decides which weights are the best; higher is better.
        train_example: a function that makes the arrays of a training example, see
            `loader.train_batches`.
    """

    model: VVT
    card: dict[str, Any]
    score: str
    train_example: Callable[..., dict[str, Any]]

    def train_arrays(self) -> dict[str, tuple[tuple[int, ...], Any]]:
        """Return the shape and dtype of each array in a training batch."""

    def prepare(
        self, batch: Mapping[str, jax.Array], key: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """Return the images and targets for the model; runs inside the training step."""

    def loss(self, outputs: Any, targets: jax.Array) -> jax.Array:
        """Return the loss of a batch, a float32 scalar, from the model's outputs in training."""

    def evaluator(self, mesh: Mesh, variables: Any) -> Callable[[Any, Source], Measured]:
        """Return a function that evaluates variables on a source.

        `variables` contains the shapes, dtypes and shardings of the variables.
        """

    def set_evaluator(self, mesh: Mesh, variables: Any) -> Callable[..., Measured]:
        """Return the same function for the sources of `imagenet_sets`.

        It also accepts fields of the preprocessing record as keyword arguments.
        """

    def write_tables(self, folder: AnyPath, name: str, confusion: np.ndarray) -> None:
        """Write tables of the results per class, computed from the confusion matrix."""


class Classification:
    """Image classification: one label per image."""

    score = "top1"
    train_example = staticmethod(augment.train_example)

    def __init__(self, config: ConfigDict, source: Source):
        self._config = config
        self._record, self.card = _describe_data(config.data, source)
        with naming("config.augment"):
            augment.check_augment(config.augment)
            mixing.check_mixing(config.augment)
        self.model = _model_for(config, source)
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

    def evaluator(self, mesh: Mesh, variables: Any) -> Callable[..., Measured]:
        step = make_eval_step(self.model, self._record, confusion=self._config.mode == "eval")
        return self._measuring(step, self.train_arrays()["label"], mesh, variables)

    def set_evaluator(self, mesh: Mesh, variables: Any) -> Callable[..., Measured]:
        verdicts = ((self._config.batch_size, self.model.num_classes), np.int8)
        return self._measuring(make_set_step(self.model, self._record), verdicts, mesh, variables)

    def _measuring(
        self, eval_step: Callable, label: tuple, mesh: Mesh, variables: Any
    ) -> Callable[..., Measured]:
        batch, data = self._config.batch_size, self._config.data
        arrays = {**self.train_arrays(), "label": label, "mask": ((batch,), np.bool_)}
        step = sharding.compile_program(
            "forward",
            eval_step,
            variables,
            sharding.abstract_batch(mesh, arrays),
            out_shardings=sharding.replicated(mesh),
        )

        def measure(variables: Any, source: Source, **record: Any) -> Measured:
            batches = eval_batches(
                source,
                record={**self._record, **record},
                batch_size=batch,
                rows=sharding.local_rows(mesh, batch),
                workers=data.workers,
                threads=data.threads,
            )
            broken: list[int] = []
            with contextlib.closing(without_flags(batches, broken)) as batches:
                arrays = sharding.to_devices(batches, mesh, batch)
                metrics, confusion = evaluate(step, variables, arrays)
            return Measured(metrics, confusion, broken=hosts.union(broken))

        return measure

    def write_tables(self, folder: AnyPath, name: str, confusion: np.ndarray) -> None:
        # The model may have, and predict, more classes than the data has names for.
        named = len(self.card["class_names"])
        names = all_class_names(self.card, self.model.num_classes)
        charts.write_per_class(folder / f"{name}_per_class.csv", confusion[:named], names)
        kept = [i for i in range(len(names)) if i < named or confusion[:, i].any()]
        shown, shown_names = confusion[np.ix_(kept, kept)], [names[i] for i in kept]
        try:
            charts.draw_confusion(folder / f"{name}_confusion.png", shown, shown_names)
        except MissingPackageError as error:
            print(error)


class Segmentation:
    """Semantic segmentation: one label per pixel."""

    score = "miou"
    train_example = staticmethod(pixel_labels.train_example)

    def __init__(self, config: ConfigDict, source: Source):
        self._config = config
        self._record, self.card = _describe_data(config.data, source)
        with naming("config.augment"):
            pixel_labels.check_augment(config.augment)
        if config.mode == "train" and config.optimizer.accumulate > 1:
            raise ConfigError(
                f"config.optimizer.accumulate={config.optimizer.accumulate} can't be run: a "
                "segmenter has batch normalisation, which needs the whole batch at once."
            )
        if config.optimizer.label_smoothing:
            raise ConfigError(
                "config.optimizer.label_smoothing is for classification: set it to 0."
            )
        inference = config.inference
        self._inference = {
            **plain_inference(self._record),
            "stride": inference.stride,
            "scales": list(inference.scales),
            "flip": inference.flip,
        }
        if inference.short_side is not None:
            self._inference["short_side"] = inference.short_side
        with naming("config.inference"):
            check_inference(self._inference)
        self.card["inference"] = self._inference
        self.model = _model_for(config, source)

    def train_arrays(self) -> dict[str, tuple[tuple[int, ...], Any]]:
        places = (self._config.batch_size, *self._config.data.size)
        return {"image": ((*places, 3), np.uint8), "segmentation": (places, np.uint8)}

    def prepare(
        self, batch: Mapping[str, jax.Array], key: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        del key  # nothing random happens on the device
        return normalize(batch["image"], self._record), batch["segmentation"]

    def loss(self, outputs: Any, targets: jax.Array) -> jax.Array:
        logits, auxiliary = outputs
        loss = pixel_cross_entropy(logits, targets, pixel_labels.IGNORED)
        if auxiliary is not None:
            weight = self._config.optimizer.auxiliary_weight
            loss += weight * pixel_cross_entropy(auxiliary, targets, pixel_labels.IGNORED)
        return loss

    def evaluator(self, mesh: Mesh, variables: Any) -> Callable[[Any, Source], Measured]:
        scores = segment.make_scores(self.model, self._record, self._inference)
        names = pixel_labels.view_names(self._inference["scales"])
        shapes = variables
        compiled: dict[Any, jax.stages.Compiled] = {}  # by the images' shape

        def sums_of(found, batch):
            sums = segment.pixel_sums(found, batch["segmentation"], batch["own_size"])
            return sums | {"images": batch["mask"].sum()}

        count = jax.jit(sums_of, out_shardings=sharding.replicated(mesh))
        draw = jax.jit(segment.classes_at_own_size, static_argnums=(2, 3))

        def measure(variables: Any, source: Source) -> Measured:
            loss, images, picture = 0.0, 0, None
            # Several processes read all images in lockstep, and each may have its own files. So
            # with several processes, a broken image ends the run.
            broken: list[int] | None = [] if jax.process_count() == 1 else None
            # 64 bits, because a data set has more than 2³¹ pixels.
            confusion = np.zeros((self.model.num_classes,) * 2, np.int64)
            dispatched = sharding.Dispatched()

            def add(finished: Sequence[Mapping[str, jax.Array]]) -> None:
                nonlocal loss, images
                for sums in finished:
                    images += int(sums["images"])
                    loss += float(sums["loss"])
                    confusion[:] += np.asarray(sums["confusion"])

            batches = pixel_labels.whole_image_batches(
                source,
                record=self._record,
                inference=self._inference,
                batch_size=self._config.batch_size,
                broken=broken,
                workers=self._config.data.workers,
                threads=self._config.data.threads,
            )
            with contextlib.closing(batches):
                for batch in sharding.to_devices(batches, mesh):
                    views = {name: batch[name] for name in names}
                    size = views["image"].shape
                    if size not in compiled:
                        compiled[size] = sharding.compile_program(
                            "forward", scores, shapes, sharding.abstract_like(views)
                        )
                    found = compiled[size](variables, views)
                    counted = ("segmentation", "own_size", "mask")
                    sums = count(found, {name: batch[name] for name in counted})
                    add(dispatched.add(sums))
                    if picture is None:
                        canvas = batch["segmentation"].shape[1:]
                        classes = draw(found, batch["own_size"], *canvas)
                        picture = self._compare(hosts.fetch({**batch, "found": classes}))
                add(dispatched.finish())
            metrics = segment.segmentation_metrics(loss, confusion)
            metrics["examples"] = images
            return Measured(metrics, confusion, picture, broken=tuple(sorted(broken or ())))

        return measure

    def set_evaluator(self, mesh: Mesh, variables: Any) -> Callable[..., Measured]:
        raise ConfigError("config.data.eval_also is for classification: set it to ().")

    def _compare(self, batch: Mapping[str, np.ndarray]) -> PIL.Image.Image:
        images, truths, predictions = [], [], []
        names = all_class_names(self.card, self.model.num_classes)
        for i in range(min(_SHOWN, int(batch["mask"].sum()))):
            height, width = batch["own_size"][i]
            images.append(PIL.Image.fromarray(batch["image"][i]).resize((width, height)))
            truths.append(batch["segmentation"][i, :height, :width])
            predictions.append(batch["found"][i, :height, :width])
        return overlay.draw_comparison(images, truths, predictions, names)

    def write_tables(self, folder: AnyPath, name: str, confusion: np.ndarray) -> None:
        charts.write_per_class_iou(
            folder / f"{name}_per_class_iou.csv", confusion, self.card["class_names"]
        )


def all_class_names(card: Mapping[str, Any], num_classes: int) -> list[str]:
    """Return a name for each class of a model, which may have more classes than the card names."""
    names = card["class_names"]
    return [*names, *(f"class {i}" for i in range(len(names), num_classes))]


def make_task(config: ConfigDict, source: Source) -> Task:
    """Return the task of a config, for the classes of a data source.

    Raises:
        ConfigError: the task can't be run with these settings.
    """
    task = Segmentation if config.model.head else Classification
    if source.pixels != (task is Segmentation):
        raise ConfigError(
            f"{config.data.source!r} labels pixels: config.model.head has to be 'fpn' or 'upernet'."
            if source.pixels
            else f"{config.data.source!r} labels whole images, and config.model.head="
            f"{config.model.head!r} is for those that label pixels."
        )
    return task(config, source)


def _describe_data(data: ConfigDict, source: Source) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the preprocessing record, and the card that contains it."""
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


def make_model(config: ConfigDict, num_classes: int) -> VVT:
    """Return the config's model, with `num_classes` classes unless the config sets their number.

    Raises:
        ConfigError: the config doesn't describe a valid model.
    """
    fields = {name: value for name, value in config.model.items() if value is not None}
    with naming("config.model"):
        return models.create(**{"num_classes": num_classes, **fields})


def _model_for(config: ConfigDict, source: Source) -> VVT:
    model = make_model(config, source.num_classes)
    if model.num_classes < source.num_classes:
        raise ConfigError(
            f"config.model.num_classes={model.num_classes} is too small: "
            f"{config.data.source} has {source.num_classes} classes."
        )
    return model


@contextlib.contextmanager
def naming(fields: str) -> Iterator[None]:
    """Turn a ValueError into a ConfigError that names the config fields it is about."""
    try:
        yield
    except ValueError as error:
        raise ConfigError(f"{fields}: {error}") from error
