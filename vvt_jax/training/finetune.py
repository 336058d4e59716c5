"""Weights to fine-tune, from a model folder, a `.pth` file or another run."""

import dataclasses
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from vvt_jax.models import VVT, Segmenter, create
from vvt_jax.models.vvt import model_fields
from vvt_jax.system import storage
from vvt_jax.training import run_record
from vvt_jax.training.checkpoint import Checkpoints
from vvt_jax.weights import hub
from vvt_jax.weights.checks import WeightsError, check_arrays
from vvt_jax.weights.pretrained import load_pretrained

# Fields that change what a model computes from the same weights without changing any shapes.
_TELLING = ("num_heads", "locality", "attention", "clamp", "patch_strides")


@dataclasses.dataclass(frozen=True)
class StartingWeights:
    """Weights to start from, or to evaluate.

    Attributes:
        path: the place from which they were read.
        arrays: the arrays, by names such as `params/stage1/...`.
        model: the model that the weights belong to.
        card: the model's class names, preprocessing and inference settings, if recorded.
        published: whether they are from a `.pth` file, in which only shapes identify the model.
    """

    path: str
    arrays: Mapping[str, Any]
    model: VVT
    card: Mapping[str, Any]
    published: bool = False


def initial_variables(
    start: StartingWeights | str | os.PathLike,
    model: VVT,
    fresh: Mapping[str, Any],
    class_names: Sequence[str],
    *,
    keep_head: bool = False,
) -> tuple[dict[str, Any], list[str]]:
    """Return the variables to start from, and sentences to report about them.

    The image size may differ, since no weight depends on it. Everything after the backbone remains
    freshly initialised if the classes differ, or if the models perform different tasks, as when a
    segmenter starts from a classifier.

    Args:
        start: the weights, or the place where `read_weights` finds them.
        model: the model to train.
        fresh: the model's freshly initialised variables, which provide the head if necessary.
        class_names: the class names of the data, in the order of the labels.
        keep_head: whether to reject different classes, for weights that are only evaluated.

    Returns:
        Variables with the same structure as `fresh`, and sentences for the log.

    Raises:
        WeightsError, CheckpointError: there is nothing to start from, or the weights don't fit the
            model.
    """
    if not isinstance(start, StartingWeights):
        start = read_weights(start, model)
    path, given, source = start.path, dict(start.arrays), start.model
    names = start.card.get("class_names")
    told = [f"Starts from {path}."]
    for field in _TELLING:
        there, here = (_as_json(model_fields(m)[field]) for m in (source, model))
        if there != here:
            told.append(
                f"Those weights were made with {field}={there!r}, and this run has {here!r}."
            )

    expected = {name: np.shape(value) for name, value in flatten_dict(dict(fresh), sep="/").items()}
    head = [name for name in expected if not name.startswith("params/stage")]
    other_kind = _kind(source) != _kind(model)
    if other_kind and keep_head:
        raise WeightsError(
            f"config.init_from={str(path)!r} holds a {_kind(source)}, and this config measures a "
            f"{_kind(model)}."
        )
    other_classes = names is not None and tuple(names) != tuple(class_names)
    other_shape = any(name not in given or np.shape(given[name]) != expected[name] for name in head)
    if other_kind:
        told.append(
            f"Only the backbone is taken: those weights are a {_kind(source)}'s, and this is a "
            f"{_kind(model)}."
        )
    elif other_classes or other_shape:
        old = len(names) if names is not None else source.num_classes
        differ = (
            f"there were {old} classes, here are {len(class_names)}"
            f"{_how_names_differ(names or (), class_names)}."
        )
        if keep_head:
            raise WeightsError(f"config.init_from={str(path)!r} has other classes: {differ}")
        told.append(f"The head starts anew: {differ}")
    if other_kind or other_classes or other_shape:
        given = {k: v for k, v in given.items() if k.startswith("params/stage")}
        given |= {name: flatten_dict(dict(fresh), sep="/")[name] for name in head}
    try:
        check_arrays(given, expected)
    except WeightsError as error:
        raise WeightsError(f"config.init_from={str(path)!r}: {error}") from error
    return unflatten_dict(given, sep="/"), told


def _how_names_differ(before: Sequence[str], now: Sequence[str]) -> str:
    if len(before) != len(now):
        return ""
    return ", in another order" if sorted(before) == sorted(now) else ", of other names"


def _kind(model: VVT) -> str:
    return f"segmenter ({model.head})" if isinstance(model, Segmenter) else "classifier"


def read_weights(place: str | os.PathLike, trained: VVT) -> StartingWeights:
    """Read weights to start from.

    Args:
        place: anything that `load_pretrained` accepts (a model folder, an `hf://` address or a
            published `.pth` file), or the workdir of another run, whose newest checkpoint is read
            (with its averaged weights, if it has them).
        trained: the model to use the weights for, with any number of classes.

    Raises:
        WeightsError, CheckpointError: there is nothing to start from.
    """
    path = Path(place) if str(place).startswith(hub.PREFIX) else storage.locate(place)
    if not storage.is_folder(path / "checkpoints"):
        heads: dict[str, Any] = {}
        if os.path.isfile(path) and trained.embed_dims != VVT().embed_dims:
            heads = {"num_heads": trained.num_heads}  # a .pth of other widths doesn't imply them
        model, variables, card = load_pretrained(place, **heads)
        arrays = flatten_dict(variables, sep="/")
        return StartingWeights(str(place), arrays, model, card, published=os.path.isfile(path))
    with Checkpoints(path / "checkpoints", keep=None) as checkpoints:
        if checkpoints.latest_step() is None:
            raise WeightsError(f"config.init_from={str(path)!r} has no checkpoint yet.")
        variables = checkpoints.restore_variables()
    arrays = flatten_dict(variables, sep="/")
    try:
        fields = json.loads(storage.read_text(path / "config.json", storage.SizeLimit.CONFIG))[
            "model"
        ]
        fields = {name: value for name, value in fields.items() if value is not None}
        last = "params/decoder/classifier/linear/bias" if "head" in fields else "params/head/bias"
        classes = np.shape(arrays.get(last, ()))
        model = create(fields.pop("name"), **{**fields, "num_classes": (*classes, 0)[0]})
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise WeightsError(f"{path / 'config.json'} is not a run's: {error}.") from error
    return StartingWeights(str(place), arrays, model, run_record.card_of(run_record.read(path)))


def _as_json(value: Any) -> Any:
    """Convert tuples into lists, because JSON has no tuples."""
    return list(value) if isinstance(value, tuple) else value
