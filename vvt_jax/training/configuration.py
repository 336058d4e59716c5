"""Checks of a run's config: its values, and whether a resumed run has its original config."""

import copy
import json
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from vvt_jax.system import storage
from vvt_jax.system.errors import UserError
from vvt_jax.system.storage import AnyPath
from vvt_jax.training import config_values

# The fields that may be changed on resuming, because they affect neither the updates nor what they
# are measured on. A dot at the end stands for all fields below it.
_FREE = (
    "mode",
    "mesh.",
    "distributed.",
    "data.workers",
    "data.threads",
    "data.broken_limit",
    "data.eval_also",
    "log_every_steps",
    "log_every_examples",
    "log_every_epochs",
    "eval_every_steps",
    "eval_every_examples",
    "eval_every_epochs",
    "checkpoint_every_steps",
    "checkpoint_every_examples",
    "checkpoint_every_epochs",
    "keep_checkpoints",
    "compilation_cache",
    "profile_at_step",
    "profile_steps",
)
# The fields that may differ between the processes of a run, because they concern only the machine
# that each of them runs on. The data must be the same, which is checked separately, but may be
# in different places.
_OF_A_PROCESS = (
    "distributed.",
    "data.data_dir",
    "data.workers",
    "data.threads",
    "compilation_cache",
    "profile_at_step",
    "profile_steps",
)
UNITS = ("steps", "examples", "epochs")
DURATIONS = ("total", "log_every", "eval_every", "checkpoint_every", "optimizer.warmup")
_NOWHERE = "nothing"  # stands for a field that is missing in one of two configs
# How the program behaved before a field existed, for each field whose default in configs/common.py
# behaves differently: a function of the older run's config, as stored in `config.json`.
_BEFORE: dict[str, Callable[[Mapping[str, Any]], Any]] = {
    # Back then, only prepared data sets were read in their stored orientation.
    "data.upright": lambda config: not config["data"]["source"].startswith("tfds:"),
}


class ConfigError(UserError):
    """A config can't be run."""


def check_values(config: ConfigDict) -> None:
    """Check every value of a config, before anything is compiled or written.

    Raises:
        ConfigError: a value is invalid; the message names the field.
    """
    fields = _flatten(config.to_dict())
    if missing := sorted(set(config_values.RULES) - set(fields)):
        raise ConfigError(f"The config lacks config.{missing[0]}: start from configs/common.py.")
    for field, value in fields.items():
        try:
            json.dumps(value, default=_plain)
        except (TypeError, ValueError, RecursionError) as error:
            kind = type(value).__name__
            raise ConfigError(
                f"config.{field} is a {kind}, which no JSON file can hold."
            ) from error
    fields = _keep_first_units(fields)  # a duration's other units are ignored

    def refuse(field: str, why: str):
        raise ConfigError(f"config.{field}={fields[field]!r} can't be run: {why}.")

    if problem := config_values.problem_of(fields):
        refuse(*problem)
    if not any(config[f"total_{unit}"] is not None for unit in UNITS):
        raise ConfigError(
            "None of config.total_steps, total_examples and total_epochs is set: one has to."
        )
    count, number = fields["distributed.num_processes"], fields["distributed.process_id"]
    if count is not None and number is not None and number >= count:
        refuse("distributed.process_id", "it goes from 0 up to num_processes - 1")
    if config.batch_size % config.augment.mix_groups:
        refuse("augment.mix_groups", f"it has to divide batch_size={config.batch_size}")
    accumulate = config.optimizer.accumulate
    if accumulate < 1 or config.batch_size % accumulate:
        refuse("optimizer.accumulate", f"it has to divide batch_size={config.batch_size}")


def in_steps(
    fields: ConfigDict,
    name: str,
    batch_size: int,
    examples: int,
    *,
    default: float = 0.0,
    default_steps: int | None = None,
) -> int:
    """Return a duration in steps, rounded.

    The first of `NAME_steps`, `NAME_examples` and `NAME_epochs` that is set determines it.

    Args:
        fields: the part of the config that contains the duration.
        name: the duration's name, such as `total` or `eval_every`.
        batch_size: the number of examples per step.
        examples: the number of examples per epoch.
        default: the default in epochs, used if none of the three fields is set.
        default_steps: the default in steps, which takes precedence over `default`.
    """
    steps, seen, epochs = (fields[f"{name}_{unit}"] for unit in UNITS)
    if steps is None and seen is None and epochs is None:
        steps, epochs = default_steps, default
    if steps is not None:
        return steps
    return round((examples * epochs if seen is None else seen) / batch_size)


def read(workdir: AnyPath) -> dict[str, Any] | None:
    """Read the config that a run started with, as JSON values; None if the folder holds no run.

    Raises:
        ConfigError: `config.json` is damaged.
    """
    path = workdir / "config.json"
    if not path.exists():
        return None
    try:
        before = json.loads(storage.read_text(path, storage.SizeLimit.CONFIG))
        if not isinstance(before, dict):
            raise ValueError("not a JSON object")
        if not all(isinstance(before.get(part), dict) for part in ("model", "data", "optimizer")):
            raise ValueError("not the config of a run")
    except OSError as error:
        raise ConfigError(f"{path} can't be read: {error.strerror}.") from error
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is damaged ({error}): use another workdir.") from error
    return before


def settle(config: ConfigDict, workdir: AnyPath, *, write: bool = True) -> None:
    """Compare the config with that of an earlier run in the workdir, and write `config.json`.

    In an evaluation, it is only compared. If the earlier run's config lacks a field, the field was
    added to the program later, and is taken to mean what the program did before. An evaluation
    doesn't compare preprocessing and inference, which are determined by the run's record
    (`vvt_jax.training.run_record`), or the training split.

    Args:
        config: the config of the run.
        workdir: the folder of the run.
        write: whether to write the file; False if another process of the group does so.

    Raises:
        ConfigError: the folder belongs to a run with another config; the message names the fields.
    """
    from vvt_jax.data.preprocess import FIELDS  # imported late, to keep --help fast

    given = _as_json(config)
    before = read(workdir)
    if before is not None:
        free: tuple[str, ...] = _FREE
        if config.mode == "eval":
            free += ("inference.", "data.train_split", *(f"data.{name}" for name in FIELDS))
        changed = [
            f"config.{field} ({old} before, {new} now)"
            for field, old, new in _differences(before, given)
            if not _is_one_of(field, free)
        ]
        if changed:
            raise ConfigError(
                f"{workdir} holds a run with another config: {', '.join(changed)}; "
                "use another workdir, or the config it started with."
            )
    if config.mode == "eval" or not write:
        return
    storage.replace(workdir / "config.json", (json.dumps(given, indent=2) + "\n").encode())


def as_before(
    config: ConfigDict, before: Mapping[str, Any], flagged: Collection[str]
) -> ConfigDict:
    """Return the config for resuming an older run.

    Fields that the program didn't have at the time are set to what it did then, unless the config
    sets them itself.

    Args:
        config: the config of the resumed run.
        before: the config of the older run, as returned by `read`.
        flagged: the fields that were set on the command line.
    """
    missing = set(_flatten(_as_json(config))) - set(_flatten(before))
    defaults = _defaults()
    given = _flatten(_as_json(config))
    return replaced(
        config,
        {
            field: _BEFORE[field](before)
            for field in missing & set(_BEFORE)
            if field not in flagged and given[field] == defaults.get(field)
        },
    )


def replaced(config: ConfigDict, values: Mapping[str, Any]) -> ConfigDict:
    """Return a copy with other values, given by field such as `data.size`; lists become tuples."""
    config = copy.deepcopy(config)
    config.update_from_flattened_dict(
        {field: tuple(v) if isinstance(v, list) else v for field, v in values.items()}
    )
    return config


def values_of(config: ConfigDict, fields: Iterable[str]) -> dict[str, Any]:
    """Return the values of some fields as JSON values, by field such as `data.size`."""
    values = _flatten(_as_json(config))
    return {field: values[field] for field in fields}


def shared_fields(config: ConfigDict) -> dict[str, Any]:
    """Return the values that must be the same in all processes, by field such as `config.seed`."""
    return {
        f"config.{field}": value
        for field, value in _flatten(_as_json(config)).items()
        if not _is_one_of(field, _OF_A_PROCESS)
    }


def _is_one_of(field: str, names: Collection[str]) -> bool:
    """Return whether a field is listed; a name that ends in a dot stands for all fields below."""
    return any(field.startswith(name) if name[-1] == "." else field == name for name in names)


def _differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """Yield each field in which two configs differ, with both values."""
    before, now = _flatten(old), _flatten(new)
    defaults = _defaults()
    for field in sorted(set(now) - set(before)):
        if field in _BEFORE:
            before[field] = _BEFORE[field](old)
        else:  # a field that configs/common.py lacks, too, has no effect
            before[field] = defaults.get(field, now[field])
    counted, counts = _keep_first_units(before), _keep_first_units(now)
    for field in sorted(before):
        values = before[field], now.get(field, _NOWHERE)
        if values[0] != values[1] and counted[field] != counts.get(field, _NOWHERE):
            yield field, *values


def _keep_first_units(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields with each duration's ignored units set to None, see `in_steps`."""
    kept = dict(fields)
    for name in DURATIONS:
        units = [f"{name}_{unit}" for unit in UNITS]
        given = [field for field in units if fields.get(field) is not None]
        kept |= dict.fromkeys(given[1:])
    return kept


def _defaults() -> dict[str, Any]:
    """Return the fields of configs/common.py with their values."""
    try:
        from configs import common
    except ImportError:  # a program with its own configs
        return {}
    return _flatten(_as_json(common.get_config()))


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten a nested mapping into values by field, such as `data.size`."""
    fields: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            fields |= _flatten(value, f"{prefix}{key}.")
        else:
            fields[prefix + key] = value
    return fields


def _as_json(config: ConfigDict) -> dict[str, Any]:
    return json.loads(json.dumps(config.to_dict(), default=_plain))


def _plain(value: Any) -> Any:
    """Convert a NumPy scalar into a JSON value."""
    if isinstance(value, np.generic):
        return value.item()
    raise TypeError(f"{type(value).__name__} is not a JSON value")
