"""Checks of a run's config: its values, and that a resumed run has the config it started with."""

import json
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from absl import flags, logging
from ml_collections import ConfigDict

from vvt_jax import storage
from vvt_jax.errors import UserError
from vvt_jax.storage import AnyPath

# What a resume may change: it alters neither the updates nor what they are measured on. A dot at
# the end stands for all fields below.
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
_UNITS = ("steps", "examples", "epochs")
_NOWHERE = "nothing"  # stands for a field that one of two configs lacks


class ConfigError(UserError):
    """A config that can't be run."""


def check_values(config: ConfigDict) -> None:
    """Raises ConfigError, naming the field, for a value that can't be meant."""

    def refuse(field: str, why: str):
        value = config
        for part in field.split("."):
            value = value[part]
        raise ConfigError(f"config.{field}={value!r} can't be run: {why}.")

    if config.mode not in ("train", "eval"):
        refuse("mode", "it is 'train' or 'eval'")
    also = config.data.eval_also
    if not isinstance(also, tuple | list) or not all(isinstance(name, str) for name in also):
        refuse("data.eval_also", "it is a tuple of names, such as \"('imagenet_a',)\"")
    if not any(config[f"total_{unit}"] is not None for unit in _UNITS):
        raise ConfigError(
            "None of config.total_steps, total_examples and total_epochs is set: one has to."
        )
    for name in ("total", "log_every", "eval_every", "checkpoint_every"):
        for unit in _UNITS:
            if (value := config[f"{name}_{unit}"]) is not None:
                if value <= 0:
                    refuse(f"{name}_{unit}", "it has to be positive")
                break  # the other units are not looked at
    for field in ("batch_size", "keep_checkpoints", "profile_steps"):
        if config[field] <= 0:
            refuse(field, "it has to be positive")
    _check_distributed(config.distributed, refuse)
    for field in ("learning_rate", "eps"):
        if config.optimizer[field] <= 0:
            refuse(f"optimizer.{field}", "it has to be positive")
    for field in (
        *(f"optimizer.warmup_{unit}" for unit in _UNITS),
        "optimizer.weight_decay",
        "optimizer.clip_norm",
        "optimizer.learning_rate_batch",
        "optimizer.auxiliary_weight",
        "optimizer.skip_nonfinite",
        "data.workers",
        "data.threads",
        "data.broken_limit",
    ):
        part, _, name = field.partition(".")
        if (config[part][name] or 0) < 0:
            refuse(field, "it can't be negative")
    if config.optimizer.schedule not in ("cosine", "polynomial"):
        refuse("optimizer.schedule", "it is 'cosine' or 'polynomial'")
    if config.optimizer.schedule_power <= 0:
        refuse("optimizer.schedule_power", "it has to be positive")
    if not 0 < config.optimizer.layer_decay <= 1:
        refuse("optimizer.layer_decay", "it goes from, not including, 0 up to 1")
    if config.optimizer.accumulate < 1 or config.batch_size % config.optimizer.accumulate:
        refuse("optimizer.accumulate", f"it has to divide batch_size={config.batch_size}")
    if not 0 <= config.seed < 2**31:  # the state holds 32 bits of it
        refuse("seed", f"it goes from 0 up to {2**31 - 1}")
    for field in ("b1", "b2", "ema_decay", "label_smoothing"):
        if not 0 <= config.optimizer[field] < 1:
            refuse(f"optimizer.{field}", "it goes from 0 up to, not including, 1")


def _check_distributed(distributed: ConfigDict, refuse: Callable[[str, str], None]) -> None:
    for field in ("start_timeout", "heartbeat_timeout"):
        if distributed[field] <= 0:
            refuse(f"distributed.{field}", "it has to be positive")
    coordinator, count, number = (
        distributed[name] for name in ("coordinator", "num_processes", "process_id")
    )
    if coordinator is not None and not re.fullmatch(r".+:\d+", coordinator):
        refuse("distributed.coordinator", "it is HOST:PORT")
    if count is not None and count < 1:
        refuse("distributed.num_processes", "it has to be positive")
    if number is not None and not 0 <= number < (number + 1 if count is None else count):
        refuse("distributed.process_id", "it goes from 0 up to num_processes - 1")


def in_steps(
    fields: ConfigDict, name: str, batch_size: int, examples: int, default: float = 0.0
) -> int:
    """A duration in steps, rounded; the first that is given of `NAME_steps`, `NAME_examples` and
    `NAME_epochs`.

    Args:
        fields: the part of the config that has it.
        name: such as `total` or `eval_every`.
        batch_size: examples of a step.
        examples: of an epoch.
        default: epochs, where none of the three is given.
    """
    if (steps := fields[f"{name}_steps"]) is not None:
        return steps
    if (seen := fields[f"{name}_examples"]) is None:
        epochs = fields[f"{name}_epochs"]
        seen = examples * (default if epochs is None else epochs)
    return round(seen / batch_size)


def settle(config: ConfigDict, workdir: AnyPath, *, write: bool = True) -> None:
    """Writes `config.json` into a new run's folder; in an old one's, compares. To evaluate it only
    compares.

    Args:
        config: of the run.
        workdir: its folder.
        write: False in a process whose group has another one for it.

    Raises:
        ConfigError: the folder belongs to a run with another config; the fields are named.
    """
    path = workdir / "config.json"
    given = json.loads(json.dumps(config.to_dict()))
    if path.exists():
        try:
            before = json.loads(storage.read_text(path, storage.SizeLimit.CONFIG))
            if not isinstance(before, dict):
                raise ValueError("not a JSON object")
        except OSError as error:
            raise ConfigError(f"{path} can't be read: {error.strerror}.") from error
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"{path} is damaged ({error}): use another workdir.") from error
        changed = [
            f"config.{field} ({old} before, {new} now)"
            for field, old, new in _differences(before, given)
            if not _is_free(field)
            and not (config.mode == "eval" and field.startswith("inference."))
        ]
        if changed:
            raise ConfigError(
                f"{workdir} holds a run with another config: {', '.join(changed)}; "
                "use another workdir, or the config it started with."
            )
    if config.mode == "eval" or not write:
        return
    storage.replace(path, (json.dumps(given, indent=2) + "\n").encode())


def parse_flags(argv: list[str], config_flag: flags.FlagHolder) -> list[str]:
    """Parses a command's flags for `absl.app.run`; what is wrong with the config ends the program
    with one sentence. Returns the arguments that are no flags."""
    try:
        rest = flags.FLAGS(argv)
        if flags.FLAGS["verbosity"].using_default_value:
            flags.FLAGS.verbosity = logging.WARNING  # type: ignore[assignment]
        _ = "mode" in config_flag.value  # a file that can't be read complains when it is used
        return rest
    except flags.Error as error:
        lines = str(error).strip().splitlines()
        # The traceback of a config's own get_config ends with what that says
        told = lines[-1].partition("Error: ")[2] if "Traceback" in str(error) else lines[0]
        sys.exit(f"error: {told}")
    except AttributeError as error:
        sys.exit(f"error: {unknown_field(error, argv)}")
    except OSError as error:
        reason = str(error).strip().splitlines()[-1].strip()  # the paths that were tried go before
        sys.exit(f"error: The config file can't be read: {reason}.")


def unknown_field(error: AttributeError, argv: list[str]) -> str:
    """One sentence about a field that ml_collections does not know, from the command line or set by
    a config file, with the nearest one that it does know."""
    told = str(error).replace("\\'", "'")
    if not (found := re.search(r"""Key "(\w+)"|'(\w+)'""", told)):
        return f"The config can't be read: {told}."
    name = found[1] or found[2]
    flag = next(
        (arg.split("=")[0].lstrip("-") for arg in argv if name in arg.split("=")[0].split(".")),
        name,
    )
    near = re.search(r'Did you mean "(\w+)"', told)
    hint = f"did you mean '{near[1]}'? " if near else ""
    return f"There is no field {flag}: {hint}configs/common.py lists all of them."


def _is_free(field: str) -> bool:
    return any(field.startswith(free) if free[-1] == "." else field == free for free in _FREE)


def _differences(
    old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = ""
) -> Iterator[tuple[str, Any, Any]]:
    for key in sorted({*old, *new}):
        before, now = old.get(key, _NOWHERE), new.get(key, _NOWHERE)
        if isinstance(before, dict) and isinstance(now, dict):
            yield from _differences(before, now, f"{prefix}{key}.")
        elif before != now:
            yield prefix + key, before, now
