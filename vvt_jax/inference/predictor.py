"""Predictions, features and other outputs of a model for images as they are on disk."""

import collections
import concurrent.futures
import dataclasses
import itertools
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import jax
import numpy as np

from vvt_jax.data import preprocess
from vvt_jax.data.examples import BrokenImageError
from vvt_jax.data.preprocess import UnfitImageError
from vvt_jax.distributed import sharding
from vvt_jax.inference.batches import ImageLike, batched, read_upright, several
from vvt_jax.models import VVT, Segmenter, unstack_blocks
from vvt_jax.models.vvt import SMALLEST_SIDE
from vvt_jax.system.errors import UserError
from vvt_jax.weights import pretrained
from vvt_jax.weights.inference_settings import plain_inference

Size: TypeAlias = tuple[int, int]  # height, width in pixels
# Takes the model, its variables, normalised images [batch, height, width, 3] and further arrays
# [batch, ...], and returns a tree of arrays [batch, ...].
Function: TypeAlias = Callable[..., Any]

_LARGEST_OF_CARD = 2**22  # pixels, 2048 x 2048; larger inputs need an explicit size
_LARGEST_INPUT = 2**26  # pixels of the model's input, 8192 x 8192; a card with more is damaged


@dataclasses.dataclass(frozen=True)
class Prediction:
    """The most probable classes of an image, in order of decreasing probability.

    Attributes:
        labels: the indices of the classes, from 0.
        names: the names of the classes.
        probabilities: the softmax of the logits, from 0 to 1.
    """

    labels: tuple[int, ...]
    names: tuple[str, ...]
    probabilities: tuple[float, ...]


class Predictor:
    """A model that can be applied to images as they are on disk.

        predictor = vvt_jax.Predictor("runs/digits/model")
        predictor("seven.png")[0].names[0]

    Images are paths, PIL images or uint8 arrays `[height, width]` or `[height, width, 1 or 3]`,
    one or several, of any size. They are turned upright by their EXIF orientation and then
    preprocessed as in evaluation. Files can have any of the formats in `vvt_jax.data.image_files`;
    16-bit, grey, CMYK and palette images are converted to RGB, and transparent parts are shown on
    white.

    Batches are padded to the full batch size, so that each kind of result is compiled only once per
    input size, whatever the number of images. A batch is split across all devices of this process.

    Attributes:
        model: the linen module.
        variables: the variables that `model.apply` takes, with the blocks unstacked (see
            `models.unstack_blocks`).
        card: the model's card.
        class_names: a name for each class, `class N` where the card has none.
        batch_size: the number of images per call of the compiled program.

    Args:
        source: anything that `load_pretrained` takes, or the three values that it returns.
        name: the name of the model, as for `load_pretrained`.
        batch_size: the number of images per call, rounded up to a multiple of the number of
            devices.
        class_names: names to use instead of the card's, one for each class.
        **fields: model fields to override, as for `load_pretrained`.

    Raises:
        UserError: the weights can't be loaded, the card's preprocessing is missing or unusable, or
            the class names do not fit the model.
        ValueError: a field does not exist in the model, a name or field is given with a loaded
            model, or the batch size is below 1.
    """

    def __init__(
        self,
        source: str | os.PathLike | tuple[VVT, Mapping[str, Any], Mapping[str, Any]],
        name: str | None = None,
        *,
        batch_size: int = 16,
        class_names: Sequence[str] | None = None,
        **fields: Any,
    ):
        if batch_size < 1:
            raise ValueError(f"`batch_size` must be 1 or more, not {batch_size}.")
        if isinstance(source, tuple):
            if name is not None or fields:
                raise ValueError("A loaded model has its name and fields: leave them out.")
            self.model, variables, self.card = source
        else:
            self.model, variables, self.card = pretrained.load_pretrained(source, name, **fields)
        told = "The model" if isinstance(source, tuple) else os.fspath(source)
        self._record = _preprocessing(self.card, told)
        if isinstance(self.model, Segmenter):
            _check_views(self.card, told)
        self.class_names = _class_names(self.card, class_names, self.model.num_classes)
        devices = jax.local_devices()
        self.batch_size = -(-batch_size // len(devices)) * len(devices)
        self._mesh = sharding.make_mesh(
            {"data": -1, "fsdp": 1, "spatial": 1}, self.batch_size, devices=devices
        )
        variables = unstack_blocks(variables)
        self._shardings = sharding.state_shardings(self._mesh, variables)
        self.variables = jax.device_put(variables, self._shardings)
        self._programs: dict[Any, Callable[..., Any]] = {}

    @property
    def size(self) -> Size:
        """Height and width of the model's input in pixels, as given in the card.

        Raises:
            UserError: the input is so large that it would take gigabytes of memory.
        """
        height, width = self._record["size"]
        if height * width > _LARGEST_OF_CARD:
            raise UserError(
                f"The model's card asks for images of {height}x{width} pixels, which takes "
                "gigabytes of memory: if that is meant, give size=(height, width) to Predictor's "
                "methods."
            )
        return int(height), int(width)

    def __call__(self, images: ImageLike | Iterable[ImageLike], top: int = 5) -> list[Prediction]:
        """Return the `top` most probable classes of each image, or all if there are fewer.

        Raises:
            BrokenImageError: a file can't be decoded.
            UserError: the model has no classifier.
            ValueError: an image is of an unsupported kind.
        """
        return [self.describe(row, top) for row in self.logits(images)]

    def logits(self, images: ImageLike | Iterable[ImageLike]) -> np.ndarray:
        """Return logits `[images, num_classes]`, float32; raises the same errors as a call."""
        self.check_classifier()
        return self.apply(logits_of, images)

    def pooled(
        self, images: ImageLike | Iterable[ImageLike], size: Size | None = None
    ) -> np.ndarray:
        """Return the features that a classifier sees: the mean of the last feature map.

        Args:
            images: the images, see the class.
            size: height and width of the model's input, in pixels; by default the card's.

        Returns:
            Features `[images, channels]`, float32.
        """
        return self.apply(pooled_of, images, size=size)

    def features(
        self, images: ImageLike | Iterable[ImageLike], size: Size | None = None
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Return the four feature maps `[images, h, w, channels]`, see `VVT.features`.

        Args:
            images: the images, see the class.
            size: height and width of the model's input, in pixels; by default the card's.
        """
        return self.apply(features_of, images, size=size)

    def describe(self, logits: np.ndarray, top: int = 5) -> Prediction:
        """Return the `top` most probable classes, given the logits `[num_classes]` of one image."""
        shares = np.exp(logits.astype(np.float64) - logits.max())
        shares /= shares.sum()
        order = np.argsort(-shares, kind="stable")[:top]
        return Prediction(
            labels=tuple(order.tolist()),
            names=tuple(self.class_names[i] for i in order),
            probabilities=tuple(shares[order].tolist()),
        )

    def check_classifier(self) -> None:
        """Check that the model is a classifier of images.

        Raises:
            UserError: it is a segmenter, or has no classes.
        """
        if isinstance(self.model, Segmenter):
            raise UserError(
                "The model labels pixels, not images: vvt_jax.segment.segment_image uses it."
            )
        if not self.model.num_classes:
            raise UserError("The model has no classifier (num_classes=0): it gives features only.")

    def apply(
        self,
        function: Function,
        images: ImageLike | Iterable[ImageLike],
        *arrays: np.ndarray,
        size: Size | None = None,
    ) -> Any:
        """Apply a function of the model to images, batch by batch.

        Args:
            function: takes the model, its variables, normalised images `[batch, height, width, 3]`
                and a batch of each further array, and returns a tree of arrays `[batch, ...]`. It
                is compiled once for each input size; functions are distinguished by identity.
            images: the images, see the class.
            *arrays: further arguments of the function, `[images, ...]`.
            size: height and width of the model's input, in pixels; by default the card's.

        Returns:
            The tree that the function returns, with NumPy arrays `[images, ...]`.

        Raises:
            BrokenImageError: a file can't be decoded.
            UserError: the output of the model is not finite.
            ValueError: there are no images, or one is of an unsupported kind.
        """
        prepared = (self._raise(pixels) for _, pixels in self.read(several(images), size))
        results = []
        for number, batch in enumerate(batched(prepared, self.batch_size)):
            start = number * self.batch_size
            parts = [array[start : start + len(batch)] for array in arrays]
            results.append(self.run(function, np.stack(batch), *parts))
        if not results:
            raise ValueError("There are no images.")
        return jax.tree.map(lambda *parts: np.concatenate(parts), *results)

    def pixels(
        self, images: ImageLike | Iterable[ImageLike], size: Size | None = None
    ) -> np.ndarray:
        """Return images as the model sees them before normalisation, uint8 `[images, h, w, 3]`."""
        return np.stack([self._raise(pixels) for _, pixels in self.read(several(images), size)])

    def run(self, function: Function, pixels: np.ndarray, *arrays: np.ndarray) -> Any:
        """Apply a function to one batch from `read`, uint8 `[up to batch_size, h, w, 3]`."""
        count = len(pixels)

        def fill(array: np.ndarray) -> np.ndarray:
            return np.pad(array, [(0, self.batch_size - count)] + [(0, 0)] * (array.ndim - 1))

        filled = [fill(array) for array in (pixels, *arrays)]
        key = (function, *((array.shape, array.dtype) for array in filled))
        if key not in self._programs:
            self._programs[key] = self._compile(function, filled)
        result = jax.device_get(self._programs[key](filled))
        result = jax.tree.map(lambda array: array[:count], result)
        if not all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(result)):
            raise UserError(
                "The model's answer is not finite: its weights or its preprocessing are unfit."
            )
        return result

    def read(
        self, images: Iterable[ImageLike], size: Size | None = None
    ) -> Iterator[tuple[ImageLike, np.ndarray | BrokenImageError]]:
        """Yield each image with its pixels as `run` takes them, uint8 `[height, width, 3]`.

        The images come in order; for a broken one, the error takes the place of the pixels. Threads
        prepare some images in advance.
        """
        height, width = self.size if size is None else size
        if min(height, width) < SMALLEST_SIDE:
            raise UserError(
                f"{height}x{width} pixels are too small: the model takes {SMALLEST_SIDE} a side "
                "and more."
            )
        record = {**self._record, "size": [height, width]}
        ahead: collections.deque[tuple[ImageLike, concurrent.futures.Future]] = collections.deque()
        given = iter(images)
        with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
            try:
                while True:
                    for image in itertools.islice(given, 2 * self.batch_size - len(ahead)):
                        ahead.append((image, pool.submit(_prepare, image, record)))
                    if not ahead:
                        return
                    image, future = ahead.popleft()
                    error = future.exception()
                    if error is not None and not isinstance(error, BrokenImageError):
                        raise error
                    yield image, future.result() if error is None else error
            finally:
                pool.shutdown(wait=True, cancel_futures=True)

    @staticmethod
    def _raise(pixels: np.ndarray | BrokenImageError) -> np.ndarray:
        if isinstance(pixels, BrokenImageError):
            raise pixels
        return pixels

    def _compile(self, function: Function, arrays: Sequence[np.ndarray]) -> Callable[..., Any]:
        def program(variables, pixels, *rest):
            # On the device, as in evaluation, so that the model gets bit-identical inputs.
            images = preprocess.normalize(pixels, self._record)
            return function(self.model, variables, images, *rest)

        # Only an array named "image" would be split along its rows, so none has that name.
        names = [str(i) for i in range(len(arrays))]
        shardings = sharding.batch_shardings(self._mesh, names).values()
        shapes = [jax.ShapeDtypeStruct(array.shape, array.dtype) for array in arrays]
        batch = sharding.abstract(list(shardings), shapes)
        compiled = sharding.compile_program(
            "forward", program, sharding.abstract(self._shardings, self.variables), *batch
        )
        return lambda given: compiled(self.variables, *jax.device_put(given, list(shardings)))


def logits_of(model: VVT, variables: Any, images: Any) -> Any:
    return model.apply(variables, images)


def features_of(model: VVT, variables: Any, images: Any) -> Any:
    return model.apply(variables, images, method="features")


def pooled_of(model: VVT, variables: Any, images: Any) -> Any:
    return features_of(model, variables, images)[-1].mean((1, 2), dtype=np.float32)


def _prepare(image: ImageLike, record: Mapping[str, Any]) -> np.ndarray:
    if isinstance(image, str | os.PathLike):
        path = os.fspath(image)
        decoded = read_upright(path)
        try:
            return preprocess.eval_image(decoded, record)
        except UnfitImageError as error:
            raise BrokenImageError(f"{path} can't be used: {error}") from error
    return preprocess.eval_image(image, record)


def _preprocessing(card: Mapping[str, Any], told: str) -> dict[str, Any]:
    """Return the preprocessing record of a card.

    Args:
        card: the card of the model.
        told: how error messages name the model.

    Raises:
        UserError: the record is missing or unusable.
    """
    if not isinstance(card, Mapping) or not card.get("preprocessing"):
        raise UserError(
            f"{told} has a card without preprocessing, so nobody knows how it takes images: save "
            "the model again with one (see vvt_jax.save_pretrained)."
        )
    record = card["preprocessing"]
    try:
        preprocess.check_record(record)
        height, width = record["size"]
        if height * width > _LARGEST_INPUT:
            raise ValueError(f"`size` {record['size']} is too large")
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        reason = str(error).rstrip(".")
        raise UserError(
            f"{told} has a card whose preprocessing can't be used: {reason}."
        ) from error
    return dict(record)


def _check_views(card: Mapping[str, Any], told: str) -> None:
    """Refuse a segmenter's card whose settings would take gigabytes of memory per image."""
    inference = card.get("inference") or plain_inference(card["preprocessing"])
    side = inference["short_side"] * max(inference["scales"])
    if side**2 > _LARGEST_OF_CARD:
        raise UserError(
            f"{told} has a card that asks for images with a short side of {side:g} pixels, which "
            "takes gigabytes of memory: if that is meant, use vvt_jax.segment.segment_image."
        )


def _class_names(
    card: Mapping[str, Any], given: Sequence[str] | None, num_classes: int
) -> tuple[str, ...]:
    """Return a name for each class of the model: the given one, the card's, or `class N`."""
    if given is not None and len(given) != num_classes:
        raise UserError(f"{len(given)} class names do not fit the model's {num_classes} classes.")
    names = card.get("class_names") or [] if given is None else given
    if isinstance(names, str) or not isinstance(names, Sequence):
        raise UserError("The class names in the model's card are no list.")
    if not all(isinstance(name, str) for name in names) or len(names) > num_classes > 0:
        raise UserError(
            f"The {len(names)} class names in the model's card do not fit its {num_classes} "
            "classes: there has to be a text for each."
        )
    return (*names, *(f"class {i}" for i in range(len(names), num_classes)))
