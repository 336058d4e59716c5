"""Checks of a run's config: its values, and that a resumed run has the config it started with."""

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from vvt_jax.errors import UserError

# What a resume may change: it alters neither the updates nor what they are measured on. A dot at
# the end stands for all fields below.
_FREE = (
    "mode",
    "mesh.",
    "data.workers",
    "data.threads",
    "log_every_steps",
    "eval_every_steps",
    "checkpoint_every_steps",
    "keep_checkpoints",
    "compilation_cache",
)
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
    if config.total_epochs is None and config.total_steps is None:
        raise ConfigError("Neither config.total_epochs nor config.total_steps is set: one has to.")
    duration = "total_epochs" if config.total_steps is None else "total_steps"
    for field in (
        duration,
        "batch_size",
        "log_every_steps",
        "eval_every_steps",
        "checkpoint_every_steps",
        "keep_checkpoints",
    ):
        if config[field] <= 0:
            refuse(field, "it has to be positive")
    for field in ("learning_rate", "eps"):
        if config.optimizer[field] <= 0:
            refuse(f"optimizer.{field}", "it has to be positive")
    for field in (
        "optimizer.warmup_epochs",
        "optimizer.weight_decay",
        "optimizer.clip_norm",
        "data.workers",
        "data.threads",
    ):
        part, _, name = field.partition(".")
        if config[part][name] < 0:
            refuse(field, "it can't be negative")
    if not 0 <= config.seed < 2**31:  # the state holds 32 bits of it
        refuse("seed", f"it goes from 0 up to {2**31 - 1}")
    for field in ("b1", "b2", "ema_decay", "label_smoothing"):
        if not 0 <= config.optimizer[field] < 1:
            refuse(f"optimizer.{field}", "it goes from 0 up to, not including, 1")


def settle(config: ConfigDict, workdir: Path) -> None:
    """Writes `config.json` into a new run's folder; in an old one's, compares. To evaluate it only
    compares.

    Raises:
        ConfigError: the folder belongs to a run with another config; the fields are named.
    """
    path = workdir / "config.json"
    given = json.loads(json.dumps(config.to_dict()))
    if path.exists():
        try:
            before = json.loads(path.read_text(encoding="utf-8"))
            if not isinstance(before, dict):
                raise ValueError("not a JSON object")
        except ValueError as error:
            raise ConfigError(f"{path} is damaged ({error}): use another workdir.") from error
        changed = [
            f"config.{field} ({old} before, {new} now)"
            for field, old, new in _differences(before, given)
            if not _is_free(field)
        ]
        if changed:
            raise ConfigError(
                f"{workdir} holds a run with another config: {', '.join(changed)}; "
                "use another workdir, or the config it started with."
            )
    if config.mode == "eval":
        return
    workdir.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(given, indent=2) + "\n", encoding="utf-8")
    temporary.replace(path)


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
