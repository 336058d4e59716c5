"""Model folders: `config.json` and `model.safetensors`, all that is needed to use a model.

A `README.md` beside them tells people the same; nothing reads it.
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
# The weights that config.json describes, from when it is replaced until they are renamed.
_NEXT_WEIGHTS = "model.safetensors.next"
_CLASSES: dict[str, type[VVT]] = {
    "vvt_jax.models.VVT": VVT,
    "vvt_jax.models.Segmenter": Segmenter,
}


def save_pretrained(
    folder: str | os.PathLike, model: VVT, variables: Mapping[str, Any], card: Mapping[str, Any]
) -> None:
    """Writes a model folder; one that is there is replaced.

    Nothing is written unless everything can be. A reader, also after this was killed, gets the old
    model or the new one. Weights in bfloat16 are stored as float32, which holds the same values.

    Args:
        folder: made if it is missing; also of an object store, such as `gs://bucket/model`.
        model: its class and fields go into `config.json`.
        variables: what `model.apply` takes; saved under keys like `params/stage1/...`.
        card: `preprocessing` (see `vvt_jax.data.preprocess`) and `class_names`, JSON values.

    Raises:
        WeightsError: a card that does not fit the model or JSON, or weights that are not finite.
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
    """An array that safetensors stores as it reads: it writes the memory and not the elements, so
    that a transposed view would be stored wrongly without a word."""
    array = np.ascontiguousarray(value)
    if not jnp.issubdtype(array.dtype, jnp.floating):
        raise WeightsError(f"{name} is in {array.dtype}, not a float, and can't be saved.")
    if array.dtype in (np.float16, np.float32):
        return array
    with np.errstate(over="ignore"):  # it is refused by name
        return array.astype(np.float32)


def _as_json(value: Any) -> Any:
    """NumPy's scalars and arrays as JSON has them."""
    if isinstance(value, np.generic | np.ndarray):
        return value.tolist()
    raise TypeError(f"{type(value).__name__} is not a JSON value")


def _finish_stopped_save(place: AnyPath) -> None:
    """Gives the weights of a save that was killed their place, if `config.json` describes them."""
    try:
        described = json.loads(storage.read_text(place / _CONFIG, SizeLimit.CONFIG))["sha256"]
        weights = storage.read_bytes(place / _NEXT_WEIGHTS, SizeLimit.WEIGHTS)
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return  # there are none
    if hashlib.sha256(weights).hexdigest() == described:
        _rename_weights(place, weights)


def _rename_weights(place: AnyPath, weights: bytes) -> None:
    """Gives the new weights, which lie there under their other name, their place."""
    if not storage.is_remote(place):
        (place / _NEXT_WEIGHTS).replace(place / _WEIGHTS)
        return
    storage.replace(place / _WEIGHTS, weights)
    with contextlib.suppress(OSError):  # it may stay: the next call replaces it
        (place / _NEXT_WEIGHTS).unlink()


def load_pretrained(
    path: str | os.PathLike, name: str | None = None, **fields: Any
) -> tuple[VVT, dict[str, Any], dict[str, Any]]:
    """A model, its variables and its card from a folder that `save_pretrained` wrote.

    Args:
        path: the folder, also of an object store; or `hf://organisation/name`, one on the Hugging
            Face Hub, with a revision after `@` if wanted; or a published `.pth`, see
            `vvt_jax.convert.read_published`.
        name: only for weights that don't say which model they are; a folder does.
        **fields: override the model's own, e.g. `dtype="bfloat16"` or `unroll=False`.

    Returns:
        The linen module, `{"params": ...}` (and other collections) and the card.

    Raises:
        WeightsError: the folder is missing, incomplete, damaged, of another format version, or its
            weights or card don't fit the model; the message names what.
        ValueError: fields that a model does not have.
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
    except (OverflowError, TypeError, ValueError) as error:  # widths beyond all measure
        raise WeightsError(f"{folder / _CONFIG} describes no model: {error}.") from error
    try:
        weights = _read_weights(folder, shapes, config["sha256"])
    except WeightsError:
        again = _read_config(folder)
        if again["sha256"] == config["sha256"]:
            raise
        return load_pretrained(path, **fields)  # it was replaced in the meantime
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
    """The file that `config.json` describes."""

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
    except WeightsError as error:  # they are larger than the model
        problem = error
    for name in (_NEXT_WEIGHTS, _WEIGHTS):  # replacing the folder was interrupted, or goes on now
        with contextlib.suppress(OSError, WeightsError):
            if (weights := read(name)) is not None:
                return weights
    raise problem


def read_card(folder: AnyPath) -> dict[str, Any]:
    """The card of a model folder alone; WeightsError where it can't be read."""
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
    if type(version) is not int or version != FORMAT_VERSION:  # True equals 1
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
    """Something out of a file, short."""
    return str(value)[:200]


def _check_size(path: AnyPath, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Refuses what is far larger than the model, before it is read."""
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
