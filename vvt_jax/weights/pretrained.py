"""Model folders: `config.json` and `model.safetensors`, which are all it takes to use a model.

The `README.md` next to them describes the model to people; the program never reads it.
"""

import contextlib
import hashlib
import json
import math
import os
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors import SafetensorError
from safetensors.numpy import load as load_safetensors
from safetensors.numpy import save as save_safetensors

from vvt_jax.data.preprocess import check_record
from vvt_jax.models import VVT, Segmenter
from vvt_jax.models.shapes import variable_shapes
from vvt_jax.models.vvt import from_fields, model_fields
from vvt_jax.system import storage
from vvt_jax.system.storage import AnyPath, SizeLimit
from vvt_jax.weights import hub, model_card
from vvt_jax.weights.checks import WeightsError, check_arrays, check_finite
from vvt_jax.weights.inference_settings import check_inference
from vvt_jax.weights.published import read_published

FORMAT_VERSION = 1
_CONFIG, _WEIGHTS = "config.json", "model.safetensors"
# Where the weights that config.json describes are between its replacement and their renaming.
_NEXT_WEIGHTS = "model.safetensors.next"
_CLASSES: dict[str, type[VVT]] = {
    "vvt_jax.models.VVT": VVT,
    "vvt_jax.models.Segmenter": Segmenter,
}


def save_pretrained(
    folder: str | os.PathLike, model: VVT, variables: Mapping[str, Any], card: Mapping[str, Any]
) -> None:
    """Write a model folder, replacing the one that is there.

    Everything is checked before anything is written. A reader gets either the old or the new model,
    even if this process is killed. Weights in bfloat16 are stored as float32, which represents the
    same values.

    Args:
        folder: the folder, created if it is missing; it may be in an object store, such as
            `gs://bucket/model`.
        model: the model, whose class and fields are stored in `config.json`.
        variables: the variables that `model.apply` takes, saved under keys like
            `params/stage1/...`.
        card: JSON values: `preprocessing` (see `vvt_jax.data.preprocess`) and `class_names`.

    Raises:
        WeightsError: the card does not fit the model or is not valid JSON, or the weights are not
            finite or not those of the model.
    """
    try:
        if isinstance(card, Mapping):
            card = json.loads(json.dumps(dict(card), default=_as_json))
        _check_card(card, model)
        json.dumps(card, allow_nan=False)
    except WeightsError:
        raise
    except (TypeError, ValueError, RecursionError) as error:
        raise WeightsError(f"The card can't be written as JSON: {error}.") from error
    place = storage.locate(folder)
    flat = flatten_dict(dict(variables), sep="/")
    arrays = {name: _storable(name, value) for name, value in flat.items()}
    check_arrays(arrays, variable_shapes(model))
    check_finite(arrays)
    weights = save_safetensors(arrays)
    config = {
        "format_version": FORMAT_VERSION,
        "class": f"vvt_jax.models.{type(model).__name__}",
        "fields": model_fields(model),
        "card": card,
        "sha256": hashlib.sha256(weights).hexdigest(),
    }
    described = (json.dumps(config, indent=2) + "\n").encode()
    parameters = sum(np.size(a) for name, a in arrays.items() if name.startswith("params/"))
    text = model_card.model_card(model, card, parameters).encode()

    _finish_stopped_save(place)
    storage.replace(place / _NEXT_WEIGHTS, weights)
    storage.replace(place / _CONFIG, described)
    _rename_weights(place, weights)
    storage.replace(place / model_card.FILE, text)


def _storable(name: str, value: Any) -> np.ndarray:
    """Return a contiguous array in a float dtype that safetensors stores correctly.

    safetensors writes the memory and not the elements, so it would silently store a transposed view
    wrongly.
    """
    array = np.ascontiguousarray(value)
    if not jnp.issubdtype(array.dtype, jnp.floating):
        raise WeightsError(f"{name} is in {array.dtype}, not a float, and can't be saved.")
    if array.dtype in (np.float16, np.float32):
        return array
    with np.errstate(over="ignore"):  # check_finite reports the overflow, with the name
        return array.astype(np.float32)


def _as_json(value: Any) -> Any:
    """Convert NumPy scalars and arrays to their JSON equivalents."""
    if isinstance(value, np.generic | np.ndarray):
        return value.tolist()
    raise TypeError(f"{type(value).__name__} is not a JSON value")


def _finish_stopped_save(place: AnyPath) -> None:
    """Rename the weights that a killed save left behind, if `config.json` describes them."""
    try:
        described = json.loads(storage.read_text(place / _CONFIG, SizeLimit.CONFIG))["sha256"]
        weights = storage.read_bytes(place / _NEXT_WEIGHTS, SizeLimit.WEIGHTS)
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return  # no save was interrupted
    if hashlib.sha256(weights).hexdigest() == described:
        _rename_weights(place, weights)


def _rename_weights(place: AnyPath, weights: bytes) -> None:
    """Rename the new weights, which are already stored under their temporary name."""
    if not storage.is_remote(place):
        (place / _NEXT_WEIGHTS).replace(place / _WEIGHTS)
        return
    storage.replace(place / _WEIGHTS, weights)
    with contextlib.suppress(OSError):  # it can be left behind: the next save replaces it
        (place / _NEXT_WEIGHTS).unlink()


def load_pretrained(
    path: str | os.PathLike, name: str | None = None, **fields: Any
) -> tuple[VVT, dict[str, Any], dict[str, Any]]:
    """Load a model, its variables and its card from a folder that `save_pretrained` wrote.

    Args:
        path: the folder, which may be in an object store; or `hf://organisation/name` for a folder
            on the Hugging Face Hub, with an optional revision after `@`; or a published `.pth`
            file, see `vvt_jax.convert.read_published`.
        name: the name of the model, only for weights that don't identify their model; a folder
            does.
        **fields: model fields that override the stored ones, e.g. `dtype="bfloat16"` or
            `unroll=False`.

    Returns:
        The linen module, its variables `{"params": ...}` (with any other collections) and the card.

    Raises:
        WeightsError: the folder is missing, incomplete, damaged or of another format version, or
            its weights or card don't fit the model; the message says which.
        ValueError: a field does not exist in the model.
    """
    if str(path).startswith(hub.PREFIX):
        folder = hub.fetch(str(path), (_CONFIG, _WEIGHTS, model_card.FILE))
    else:
        folder = storage.locate(path)
        if os.path.isfile(folder) or folder.suffix in (".pth", ".pt"):
            return read_published(folder, name, **fields)
    if name is not None:
        raise WeightsError(f"{folder} says itself which model it holds: leave name={name!r} out.")
    config = _read_config(folder)
    model = from_fields(_CLASSES[config["class"]], {**config["fields"], **fields})
    try:
        shapes = variable_shapes(model)
    except (OverflowError, TypeError, ValueError) as error:  # absurdly large widths
        raise WeightsError(f"{folder / _CONFIG} describes no model: {error}.") from error
    try:
        weights = _read_weights(folder, shapes, config["sha256"])
    except WeightsError:
        again = _read_config(folder)
        if again["sha256"] == config["sha256"]:
            raise
        return load_pretrained(path, **fields)  # the folder was replaced in the meantime
    try:
        arrays = load_safetensors(weights)
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise WeightsError(f"{folder / _WEIGHTS} is not a safetensors file: {error}.") from error
    check_arrays(arrays, shapes)
    for key, array in arrays.items():
        if not jnp.issubdtype(array.dtype, jnp.floating):
            raise WeightsError(f"{folder / _WEIGHTS} has {key} in {array.dtype}, not a float.")
    try:
        check_finite(arrays)
    except WeightsError as error:
        raise WeightsError(f"{folder / _WEIGHTS}: {error}") from error
    variables = unflatten_dict({name: jnp.asarray(a) for name, a in arrays.items()}, sep="/")
    return model, variables, config["card"]


def _read_weights(folder: AnyPath, shapes: Mapping[str, tuple[int, ...]], sha256: str) -> bytes:
    """Read the weights file whose SHA-256 sum `config.json` has."""

    def read(name: str) -> bytes | None:
        _check_size(folder / name, shapes)
        weights = storage.read_bytes(folder / name, SizeLimit.WEIGHTS)
        return weights if hashlib.sha256(weights).hexdigest() == sha256 else None

    problem: WeightsError
    try:
        if (weights := read(_WEIGHTS)) is not None:
            return weights
        problem = WeightsError(
            f"{folder / _WEIGHTS} is damaged: its SHA-256 is not the one in {_CONFIG}; "
            "copy the folder again from where it came."
        )
    except OSError as error:
        problem = WeightsError(f"{folder} has no readable {_WEIGHTS}: {error.strerror}.")
        problem.__cause__ = error
    except WeightsError as error:  # the file is far larger than the model
        problem = error
    for name in (_NEXT_WEIGHTS, _WEIGHTS):  # a save was interrupted, or is under way
        with contextlib.suppress(OSError, WeightsError):
            if (weights := read(name)) is not None:
                return weights
    raise problem


def read_card(folder: AnyPath) -> dict[str, Any]:
    """Read only the card of a model folder.

    Raises:
        WeightsError: the folder's `config.json` can't be read.
    """
    return _read_config(folder)["card"]


def _read_config(folder: AnyPath) -> dict[str, Any]:
    try:
        config = json.loads(storage.read_text(folder / _CONFIG, SizeLimit.CONFIG))
    except OSError as error:
        raise WeightsError(
            f"{folder} is not a model folder: it has no readable {_CONFIG} ({error.strerror})."
        ) from error
    except (ValueError, RecursionError) as error:
        raise WeightsError(f"{folder / _CONFIG} is not JSON: {error}.") from error
    if not isinstance(config, dict):
        raise WeightsError(f"{folder / _CONFIG} is not a model folder's: it is no JSON object.")
    missing = {"format_version", "class", "fields", "card", "sha256"} - set(config)
    if missing:
        raise WeightsError(
            f"{folder / _CONFIG} is not a model folder's: it lacks {', '.join(sorted(missing))}."
        )
    version = config["format_version"]
    if type(version) is not int or version != FORMAT_VERSION:  # bool is excluded: True == 1
        raise WeightsError(
            f"{folder} has format version {_shown(version)}, "
            f"but this program reads version {FORMAT_VERSION}."
        )
    if not isinstance(config["class"], str) or config["class"] not in _CLASSES:
        raise WeightsError(
            f"{folder} holds a {_shown(config['class'])}, not a {' or '.join(_CLASSES)}."
        )
    try:
        model = from_fields(_CLASSES[config["class"]], config["fields"])
    except (AttributeError, RecursionError, TypeError, ValueError) as error:
        reason = str(error).rstrip(".")
        raise WeightsError(f"{folder / _CONFIG} describes no model: {_shown(reason)}.") from error
    _check_card(config["card"], model, f"{folder / _CONFIG}: ")
    return config


def _shown(value: Any) -> str:
    """Return a value from a file as text, shortened for an error message."""
    return str(value)[:200]


def _check_size(path: AnyPath, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Refuse a weights file that is far larger than the model, before it is read."""
    most = 8 * sum(map(math.prod, shapes.values())) + 2**20
    ((_, size, _),) = storage.fingerprints([str(path)])
    if size > most:
        raise WeightsError(f"{path} has {size} bytes, but its model needs at most {most}.")


def _check_card(card: Any, model: VVT, where: str = "") -> None:
    if not isinstance(card, Mapping):
        raise WeightsError(f"{where}the card is no object, but {type(card).__name__}.")
    if "preprocessing" in card:
        record = card["preprocessing"]
        try:
            check_record(record)
            np.asarray([record["mean"], record["std"]], np.float32)
        except (AttributeError, OverflowError, RecursionError, TypeError, ValueError) as error:
            reason = _shown(str(error).rstrip("."))
            raise WeightsError(f"{where}the card's preprocessing is unfit: {reason}.") from error
    if "inference" in card:
        try:
            check_inference(card["inference"])
        except (OverflowError, RecursionError, TypeError, ValueError) as error:
            reason = _shown(str(error).rstrip("."))
            raise WeightsError(f"{where}the card's inference is unfit: {reason}.") from error
    if "class_names" in card:
        names = card["class_names"]
        if not isinstance(names, list | tuple) or not all(isinstance(n, str) for n in names):
            raise WeightsError(f"{where}the card's class_names are not a list of texts.")
        for name in names:
            try:
                name.encode()
            except UnicodeEncodeError as error:
                raise WeightsError(
                    f"{where}the card's class name {ascii(name)[:100]} can't be written: it has "
                    "half of a character."
                ) from error
        if model.num_classes and len(names) > model.num_classes:
            raise WeightsError(
                f"{where}the card has {len(names)} class_names, the model {model.num_classes} "
                "classes."
            )
