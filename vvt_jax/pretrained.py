"""Model folders: `config.json` and `model.safetensors`, all that is needed to use a model."""

import hashlib
import json
import os
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors import SafetensorError
from safetensors.numpy import load as load_safetensors
from safetensors.numpy import save as save_safetensors

from vvt_jax import storage
from vvt_jax.models import VVT, Segmenter
from vvt_jax.models.vvt import from_fields, model_fields
from vvt_jax.storage import AnyPath
from vvt_jax.weights import WeightsError, check_arrays, variable_shapes

FORMAT_VERSION = 1
_CONFIG, _WEIGHTS = "config.json", "model.safetensors"
_CLASSES: dict[str, type[VVT]] = {
    "vvt_jax.models.VVT": VVT,
    "vvt_jax.models.Segmenter": Segmenter,
}


def save_pretrained(
    folder: str | os.PathLike, model: VVT, variables: Mapping[str, Any], card: Mapping[str, Any]
) -> None:
    """Writes a model folder; one that is there is replaced.

    Args:
        folder: made if it is missing; also of an object store, such as `gs://bucket/model`.
        model: its class and fields go into `config.json`.
        variables: what `model.apply` takes; saved under keys like `params/stage1/...`.
        card: `preprocessing` (see `vvt_jax.data.preprocess`) and `class_names`, JSON values.
    """
    place = storage.locate(folder)
    # safetensors writes the memory of an array and not its elements: a transposed view would be
    # stored wrongly without a word.
    arrays = {
        name: np.ascontiguousarray(value)
        for name, value in flatten_dict(dict(variables), sep="/").items()
    }
    weights = save_safetensors(arrays)
    config = {
        "format_version": FORMAT_VERSION,
        "class": f"vvt_jax.models.{type(model).__name__}",
        "fields": model_fields(model),
        "card": dict(card),
        "sha256": hashlib.sha256(weights).hexdigest(),
    }
    storage.replace(place / _WEIGHTS, weights)
    storage.replace(place / _CONFIG, (json.dumps(config, indent=2) + "\n").encode())


def load_pretrained(
    path: str | os.PathLike, name: str | None = None, **fields: Any
) -> tuple[VVT, dict[str, Any], dict[str, Any]]:
    """A model, its variables and its card from a folder that `save_pretrained` wrote.

    Args:
        path: the folder; also of an object store.
        name: only for weights that don't say which model they are; a folder does.
        **fields: override the model's own, e.g. `dtype="bfloat16"` or `unroll=False`.

    Returns:
        The linen module, `{"params": ...}` (and other collections) and the card.

    Raises:
        WeightsError: the folder is missing, incomplete, damaged, of another format version, or its
            weights don't fit the model; the message names what.
        ValueError: fields that a model does not have.
    """
    folder = storage.locate(path)
    if name is not None:
        raise WeightsError(f"{folder} says itself which model it holds: leave name={name!r} out.")
    config = _read_config(folder)
    try:
        weights = storage.read_bytes(folder / _WEIGHTS)
    except OSError as error:
        raise WeightsError(f"{folder} has no readable {_WEIGHTS}: {error.strerror}.") from error
    if hashlib.sha256(weights).hexdigest() != config["sha256"]:
        raise WeightsError(
            f"{folder / _WEIGHTS} is damaged: its SHA-256 is not the one in {_CONFIG}; "
            "copy the folder again from where it came."
        )
    try:
        arrays = load_safetensors(weights)
    except SafetensorError as error:
        raise WeightsError(f"{folder / _WEIGHTS} is not a safetensors file: {error}.") from error
    model = from_fields(_CLASSES[config["class"]], {**config["fields"], **fields})
    check_arrays(arrays, variable_shapes(model))
    variables = unflatten_dict({name: jnp.asarray(a) for name, a in arrays.items()}, sep="/")
    return model, variables, config["card"]


def _read_config(folder: AnyPath) -> dict[str, Any]:
    try:
        config = json.loads(storage.read_bytes(folder / _CONFIG).decode())
    except OSError as error:
        raise WeightsError(
            f"{folder} is not a model folder: it has no readable {_CONFIG} ({error.strerror})."
        ) from error
    except ValueError as error:
        raise WeightsError(f"{folder / _CONFIG} is not JSON: {error}.") from error
    if not isinstance(config, dict):
        raise WeightsError(f"{folder / _CONFIG} is not a model folder's: it is no JSON object.")
    missing = {"format_version", "class", "fields", "card", "sha256"} - set(config)
    if missing:
        raise WeightsError(
            f"{folder / _CONFIG} is not a model folder's: it lacks {', '.join(sorted(missing))}."
        )
    if config["format_version"] != FORMAT_VERSION:
        raise WeightsError(
            f"{folder} has format version {config['format_version']}, "
            f"but this program reads version {FORMAT_VERSION}."
        )
    if config["class"] not in _CLASSES:
        raise WeightsError(f"{folder} holds a {config['class']}, not a {' or '.join(_CLASSES)}.")
    try:
        from_fields(_CLASSES[config["class"]], config["fields"])
    except (TypeError, ValueError) as error:
        reason = str(error).rstrip(".")
        raise WeightsError(f"{folder / _CONFIG} describes no model: {reason}.") from error
    return config
