"""The record of what a run was made from, written to its folder once and checked on every start.

`record.json` contains the class names, the preprocessing and the number of examples in each part of
the data. If the source has names for its examples, `examples/PART.txt` lists them in the order of
the run, one per line. Runs of older versions have no `record.json`: this information then comes
from their config and the card in their model folder, and their data is cut as it was then.
"""

import dataclasses
import hashlib
import json
import os
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict

from vvt_jax.data import splits
from vvt_jax.data.examples import Cut, Source, with_classes
from vvt_jax.data.preprocess import FIELDS, check_record
from vvt_jax.system import storage
from vvt_jax.system.errors import UserError
from vvt_jax.system.storage import AnyPath
from vvt_jax.training import configuration
from vvt_jax.training.configuration import ConfigError
from vvt_jax.training.examples_list import from_line, to_line
from vvt_jax.weights import hub
from vvt_jax.weights.pretrained import read_card

FORMAT_VERSION = 1
FILE, LISTS = "record.json", "examples"
_MOST_NAMES = 3  # listed in a sentence


class RecordError(UserError):
    """Data or settings differ from those that a run or a model was made from."""


@dataclasses.dataclass(frozen=True)
class Part:
    """The examples of one part of a run's data: `train`, `validation` or `test`.

    Attributes:
        split: the split, as written in the config.
        count: the number of examples.
        names: the names of the examples, see `Source`; None if the source has none.
    """

    split: str
    count: int
    names: tuple[str, ...] | None


@dataclasses.dataclass(frozen=True)
class RunRecord:
    """The record of what a run was made from.

    Attributes:
        config: the config, as in `config.json`.
        class_names: the class names, in the order of the labels; None if unknown in an older run.
        preprocessing: the preprocessing record; empty if unknown in an older run.
        parts: the parts of the data by name; None in an older run.
        digest: a digest of the whole record.
    """

    config: Mapping[str, Any]
    class_names: tuple[str, ...] | None
    preprocessing: Mapping[str, Any]
    parts: Mapping[str, Part] | None
    digest: str


def read(workdir: AnyPath) -> RunRecord | None:
    """Read the record of the run in a folder; None if there is no run.

    Raises:
        ConfigError: one of its files is damaged or can't be read.
    """
    config = configuration.read(workdir)
    if config is None:
        return None
    path = workdir / FILE
    if not path.exists():
        return _read_older(workdir, config)
    try:
        content = storage.read_bytes(path)
        found = json.loads(content.decode("utf-8"))
        if (version := found["format_version"]) != FORMAT_VERSION:
            raise ConfigError(
                f"{path} has format version {version}, but this program reads version "
                f"{FORMAT_VERSION}."
            )
        check_record(found["preprocessing"])
        parts = {name: _read_part(workdir, name, part) for name, part in found["parts"].items()}
        class_names = tuple(map(str, found["class_names"]))
    except ConfigError:
        raise
    except OSError as error:
        raise ConfigError(f"{path} can't be read: {error.strerror}.") from error
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        reason = str(error).rstrip(".")
        raise ConfigError(f"{path} is damaged ({reason}): use another workdir.") from error
    digest = hashlib.sha256(content + json.dumps(config).encode()).hexdigest()
    return RunRecord(config, class_names, found["preprocessing"], parts, digest)


def write(
    workdir: AnyPath,
    class_names: Sequence[str],
    preprocessing: Mapping[str, Any],
    sources: Mapping[str, Source],
) -> None:
    """Write the record of a new run.

    It must be written before `config.json`, which marks the folder as that of a run.
    """
    parts: dict[str, dict[str, Any]] = {}
    for name, source in sources.items():
        parts[name] = {"split": source.split, "count": len(source.examples)}
        if source.names is not None:
            content = b"".join(to_line(each) for each in source.names)
            storage.replace(workdir / LISTS / f"{name}.txt", content)
            parts[name]["sha256"] = hashlib.sha256(content).hexdigest()
    record = {
        "format_version": FORMAT_VERSION,
        "class_names": list(class_names),
        "preprocessing": dict(preprocessing),
        "parts": parts,
    }
    storage.replace(workdir / FILE, (json.dumps(record, indent=2) + "\n").encode())


def find_origin(path: str | os.PathLike) -> RunRecord | None:
    """Return the record of the run that weights come from, or None if there is none.

    The path is the run's workdir, or the `model` folder in it.
    """
    if str(path).startswith(hub.PREFIX):
        return None
    place = storage.locate(path)
    for folder in (place, place.parent) if place.name == "model" else (place,):
        if storage.is_folder(folder / "checkpoints"):
            return read(folder)
    return None


def choose_cuts(
    record: RunRecord | None, origin: RunRecord | None, data: ConfigDict, parts: Mapping[str, str]
) -> dict[str, Cut]:
    """Return how to select the examples of each part.

    Args:
        record: the record of the run to resume or evaluate; None for a new run.
        origin: the record of the run that the weights come from, if any. If that run was made from
            the same data, its examples apply, so that nothing it was trained on is used to
            evaluate.
        data: the `config.data` fields.
        parts: the splits by part.
    """
    if record is None and origin is not None and _has_same_data(origin, data, parts):
        record = origin
    if record is None:
        return dict.fromkeys(parts, splits.ByHash(parts.values()))
    if record.parts is None:
        return dict.fromkeys(parts, splits.at_random)
    cuts: dict[str, Cut] = {}
    for name in {**record.parts, **parts}:  # including parts that an evaluation doesn't read
        listed = record.parts[name].names if name in record.parts else None
        # If files are gone, training keeps the positions of all other examples in its order.
        cuts[name] = (
            splits.ByHash(parts.values())
            if listed is None
            else splits.Recorded(listed, fill=name == "train")
        )
    return cuts


def describe_changes(cuts: Mapping[str, Cut]) -> list[str]:
    """Return sentences about files that were added or removed since a run recorded its examples.

    Args:
        cuts: the cuts by part, after the sources have been opened.
    """
    recorded = {name: cut for name, cut in cuts.items() if isinstance(cut, splits.Recorded)}
    lines = []
    for name, cut in recorded.items():
        if cut.missing:
            what = "the next one of the list takes its place" if name == "train" else "left out"
            lines.append(
                f"{_count(cut.missing, 'file')} of the run's {name} examples "
                f"{'is' if len(cut.missing) == 1 else 'are'} gone ({what}): {_some(cut.missing)}."
            )
    known = {each for cut in recorded.values() for each in cut.names}
    added = sorted({each for cut in recorded.values() for each in cut.listed} - known)
    if added:
        lines.append(
            f"{_count(added, 'file')} added since the run began "
            f"{'is' if len(added) == 1 else 'are'} not used: {_some(added)}."
        )
    return lines


def check_counts(record: RunRecord, sources: Mapping[str, Source]) -> None:
    """Check that each part of the data without names has as many examples as the run recorded.

    Raises:
        RecordError: the number of examples differs.
    """
    for name, source in sources.items():
        part = (record.parts or {}).get(name)
        if part is None or part.names is not None or part.count == len(source.examples):
            continue
        raise RecordError(
            f"{source.name!r}, split {source.split!r}, had {part.count} examples when this run "
            f"began and has {len(source.examples)} now: give the run the data that it began with, "
            "or use another workdir."
        )


def match_classes(
    sources: Mapping[str, Source],
    class_names: Sequence[str],
    told: str,
    *,
    some: bool,
) -> dict[str, Source]:
    """Return the sources with their labels renumbered to match the outputs of a model.

    Args:
        sources: the data sources by part.
        class_names: the class names of the model, in the order of its outputs.
        told: the place where they are recorded, such as `runs/mine`.
        some: whether the data may contain only some of the classes.

    Raises:
        RecordError: the data has different classes, which the message names, or classes in a
            different order that can't be matched because two of them have the same name.
    """
    known = tuple(class_names)
    for source in sources.values():
        names = source.class_names
        if names == known:
            continue
        added = [name for name in names if name not in known]
        lacking = [name for name in known if name not in names]
        if added or (lacking and not some):
            differences = [
                *([f"it also has {_some(added)}"] if added else []),
                *([f"it lacks {_some(lacking)}"] if lacking else []),
            ]
            raise RecordError(
                f"The data has {_count(names, 'class')} and {told} was made from "
                f"{len(known)}: {' and '.join(differences)}. Give every class the name that it had."
            )
        if len(set(names)) < len(names) or len(set(known)) < len(known):
            raise RecordError(
                f"The data has the classes of {told} in another order, and two of them have the "
                "same name, so that they can't be told apart."
            )
    return {part: with_classes(source, known) for part, source in sources.items()}


def adopt(
    config: ConfigDict,
    recorded: Mapping[str, Any],
    told: str,
    *,
    flagged: Collection[str],
    free: Collection[str] = (),
) -> tuple[ConfigDict, list[str]]:
    """Return the config with the values that a run or a model recorded.

    Args:
        config: the config of the run.
        recorded: the recorded values by field, such as `data.mean`.
        told: the place where they are recorded.
        flagged: the fields that the command line sets, which take precedence.
        free: the fields that remain as set by the config.

    Returns:
        The config, and a sentence about any differences from the given one.
    """
    before = configuration.values_of(config, recorded)
    values = {
        field: value
        for field, value in recorded.items()
        if field not in flagged and field not in free and before[field] != value
    }
    if not values:
        return config, []
    changes = (f"{field}={value} (config: {before[field]})" for field, value in values.items())
    return configuration.replaced(config, values), [f"As recorded in {told}: {', '.join(changes)}."]


def check_flags(
    config: ConfigDict, recorded: Mapping[str, Any], flagged: Collection[str], workdir: str
) -> None:
    """Check that the command line doesn't change the recorded preprocessing of a resumed run.

    Raises:
        RecordError: a field on the command line differs from the record.
    """
    given = configuration.values_of(config, recorded)
    for field in sorted(set(flagged) & set(recorded)):
        if given[field] != recorded[field]:
            raise RecordError(
                f"{workdir} holds a run with config.{field}={recorded[field]}, and the command "
                f"line says {given[field]}: leave it out, or use another workdir."
            )


def card_of(record: RunRecord | None) -> dict[str, Any]:
    """Return the fields of a model's card that a run's record contains."""
    if record is None:
        return {}
    known = {
        "class_names": record.class_names,
        "preprocessing": record.preprocessing,
        "inference": record.config.get("inference"),
    }
    return {key: value for key, value in known.items() if value}


def fields_of(card: Mapping[str, Any], *, inference: bool = False) -> dict[str, Any]:
    """Return a card's preprocessing by config field, with its inference settings if requested."""
    preprocessing = card.get("preprocessing") or {}
    fields = {f"data.{name}": preprocessing[name] for name in FIELDS if name in preprocessing}
    if inference:
        settings = card.get("inference") or {}
        names = ("short_side", "stride", "scales", "flip")
        fields |= {f"inference.{name}": settings[name] for name in names if name in settings}
    return fields


def fingerprint(sources: Mapping[str, Source]) -> dict[str, Any]:
    """Return what must be the same in all processes' data, see `hosts.check_agreement`."""
    found: dict[str, Any] = {}
    for part, source in sources.items():
        found[f"the number of {part} examples"] = len(source.examples)
        found[f"the digest of the {part} classes"] = _digest(source.class_names)
        if source.names is not None:
            found[f"the digest of the {part} file names"] = _digest(source.names)
    return found


def _read_older(workdir: AnyPath, config: Mapping[str, Any]) -> RunRecord:
    """Return the record of a run from a version without records, whose config determined it."""
    try:
        names = read_card(workdir / "model").get("class_names")
    except UserError:  # it has not been evaluated yet
        names = None
    data = config.get("data")
    data = data if isinstance(data, Mapping) else {}
    preprocessing = {name: data[name] for name in FIELDS if name in data}
    digest = hashlib.sha256(json.dumps(config).encode()).hexdigest()
    return RunRecord(config, None if names is None else tuple(names), preprocessing, None, digest)


def _read_part(workdir: AnyPath, name: str, part: Mapping[str, Any]) -> Part:
    names = None
    if "sha256" in part:
        path = workdir / LISTS / f"{name}.txt"
        content = storage.read_bytes(path)
        if hashlib.sha256(content).hexdigest() != part["sha256"]:
            raise ConfigError(f"{path} is not the list that the run wrote: use another workdir.")
        names = tuple(from_line(line) for line in content.split(b"\n")[:-1])
    return Part(str(part["split"]), int(part["count"]), names)


def _has_same_data(origin: RunRecord, data: ConfigDict, parts: Mapping[str, str]) -> bool:
    theirs = origin.config.get("data", {})
    return (
        theirs.get("source") == data.source
        and _place(theirs.get("data_dir")) == _place(data.data_dir)
        and all(theirs.get(f"{part}_split") == split for part, split in parts.items())
    )


def _place(data_dir: str | None) -> str | None:
    """Return a folder's canonical path, however it is written."""
    if data_dir is None or storage.is_remote(data_dir):
        return data_dir
    return os.path.realpath(os.path.expanduser(data_dir))


def _digest(names: Sequence[str]) -> str:
    return hashlib.sha256(b"".join(map(to_line, names))).hexdigest()[:16]


def _count(items: Sequence[str], noun: str) -> str:
    plural = "classes" if noun == "class" else f"{noun}s"
    return f"{len(items)} {noun if len(items) == 1 else plural}"


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(repr(name) for name in names[:_MOST_NAMES])
    more = len(names) - _MOST_NAMES
    return f"{shown} and {more} more" if more > 0 else shown
