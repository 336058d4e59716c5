"""Config fields on the command line."""

import importlib.util
import os
import re
import sys
import traceback
from collections.abc import Collection
from typing import NoReturn

from absl import flags, logging
from ml_collections import ConfigDict, config_flags

from vvt_jax.system.errors import UserError
from vvt_jax.training.configuration import DURATIONS, UNITS, ConfigError


def flagged_fields(config_flag: flags.FlagHolder) -> frozenset[str]:
    """Return the fields that the command line sets, such as `data.size`."""
    return frozenset(config_flags.get_override_values(flags.FLAGS[config_flag.name]))


def _replace_units(config: ConfigDict, flagged: Collection[str]) -> None:
    """Let durations from the command line replace those of the config, whatever their units.

    Raises:
        ConfigError: the command line sets one duration in several units.
    """
    for name in DURATIONS:
        values = {unit: config[f"{name}_{unit}"] for unit in UNITS}
        given = [u for u in UNITS if f"{name}_{u}" in flagged and values[u] is not None]
        if len(given) > 1:
            fields = " and ".join(f"--config.{name}_{unit}" for unit in given)
            raise ConfigError(f"{fields} say the same thing in different units: give one of them.")
        if given:
            others = {f"{name}_{unit}": None for unit in UNITS if unit not in given}
            config.update_from_flattened_dict(others)


def parse_flags(argv: list[str], config_flag: flags.FlagHolder) -> list[str]:
    """Parse a command's flags for `absl.app.run` and return the arguments that aren't flags.

    If anything is wrong with the config, the program ends with one sentence.
    """

    def stop(reason: str) -> NoReturn:
        sys.exit(f"error: {UserError(reason)}")  # makes it one printable line

    try:
        rest = flags.FLAGS(_find_config(argv))
        if flags.FLAGS["verbosity"].using_default_value:
            flags.FLAGS.verbosity = logging.WARNING  # type: ignore[assignment]
        getattr(config_flag.value, "mode", None)  # an unreadable file raises an error on first use
        if not isinstance(config_flag.value, ConfigDict):
            kind = type(config_flag.value).__name__
            raise ConfigError(f"The config file's get_config() returns a {kind}, not a ConfigDict.")
        if rest[1:]:
            raise ConfigError(f"Not a flag: {rest[1]}; a field is given as --config.field=value.")
        _replace_units(config_flag.value, flagged_fields(config_flag))
        return rest
    except ConfigError as error:
        stop(str(error))
    except flags.Error as error:
        stop(_flag_error(str(error)))
    except AttributeError as error:
        if re.search(r"has no attribute '?get_config'?$", str(error)):
            stop("The config file can't be read: it has no function get_config().")
        frames = traceback.extract_tb(error.__traceback__)
        if frames and "ml_collections" in frames[-1].filename:
            stop(unknown_field(error, argv))
        stop(f"The config file can't be read: {_described(error)}.")
    except OSError as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        stop(
            f"The config file can't be read: {lines[-1].strip()}."
        )  # the lines before list the paths that were tried
    except SystemExit as error:
        if argv[1:] and any(re.match(r"--?(help|\?)", arg) for arg in argv[1:]):
            sys.exit(0)  # absl would exit with status 1
        stop(f"The config file ends the program, with status {error.code}.")
    except Exception as error:  # whatever the config file's code raises
        stop(f"The config file can't be read: {_described(error)}.")


def _find_config(argv: list[str]) -> list[str]:
    """Return the arguments with the installed path of a config that comes with the package.

    A path such as `configs/digits.py` is replaced, unless the current folder has such a file.
    """
    arguments = list(argv)
    for i, argument in enumerate(argv):
        flag, equals, value = argument.partition("=")
        if flag not in ("-config", "--config"):
            continue
        place = i if equals else i + 1
        value = value if equals else "".join(argv[place : place + 1])
        path, colon, options = value.partition(":")
        if not path.startswith("configs/") or os.path.exists(path):
            continue
        spec = importlib.util.find_spec("configs")
        for folder in (spec and spec.submodule_search_locations) or ():
            installed = os.path.join(folder, path.removeprefix("configs/"))
            if os.path.exists(installed):
                arguments[place] = f"{flag}{equals}" * bool(equals) + installed + colon + options
    return arguments


def _flag_error(text: str) -> str:
    """Reduce absl's error message about a flag to one line.

    An error in a config file comes with its traceback, and its message may have further lines.
    """
    if "--config must have a value other than None" in text and "--config=None" in text:
        return "There is no config: give --config=FILE, whose get_config() returns a ConfigDict."
    lines = [line for line in text.strip().splitlines() if line.strip()] or ["a flag is wrong"]
    if "Traceback" not in text:
        return lines[0]
    raised = [line for line in lines if re.match(r"[\w.]*(Error|Exception)\b", line)]
    return raised[-1].partition(": ")[2] or raised[-1] if raised else lines[-1]


def _described(error: Exception) -> str:
    """Describe an error in a config file's code, with the line that it comes from."""
    reason = str(error).strip().partition("\n")[0].rstrip(".")
    if isinstance(error, SyntaxError):  # it already names the file and the line
        return f"SyntaxError: {reason}"
    frames = traceback.extract_tb(error.__traceback__)
    place = f" ({frames[-1].filename}, line {frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {reason}{place}"


def unknown_field(error: AttributeError, argv: list[str]) -> str:
    """Return one sentence about a field that doesn't exist, and the most similar one that does.

    The field was set on the command line or by a config file.
    """
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
