"""What commands share: how their arguments are read, and what they refuse to overwrite."""

import ast
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vvt_jax.system.errors import UserError


def parse_fields(settings: Sequence[str]) -> dict[str, Any]:
    """Fields of a model from texts `name=value`, as commands take them.

    Raises:
        UserError: a text without `=`.
    """
    fields = {}
    for setting in settings:
        name, equals, value = setting.partition("=")
        if not equals:
            raise UserError(f"{setting!r} is no setting: it has to be name=value.")
        try:
            fields[name] = ast.literal_eval(value)
        except (SyntaxError, ValueError, MemoryError, RecursionError):
            fields[name] = value
    return fields


def check_output(path: Path, *, force: bool) -> None:
    """Refuses to write where something is, unless `force`.

    Raises:
        UserError: there is a file, or a folder that is not empty.
    """
    try:
        taken = any(path.iterdir()) if path.is_dir() else path.exists()
    except OSError as error:
        raise UserError(f"{path} can't be written: {error.strerror}.") from error
    if taken and not force:
        raise UserError(f"{path} is there already: give another place, or --force to replace it.")
