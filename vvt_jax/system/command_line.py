"""Functions shared by all commands: ending with errors, parsing arguments, and checking outputs."""

import ast
import contextlib
import signal
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from vvt_jax.system.errors import UserError


@contextlib.contextmanager
def ending_in_a_sentence(written: Path | None = None) -> Iterator[None]:
    """End the program with one sentence and status 1 on errors that the user can fix.

    After Ctrl-C, it ends with the shell's status 130.

    Args:
        written: the file or folder that the command writes, for file system errors that don't name
            a file. If it is None, file system errors are not handled.
    """
    try:
        yield
    except ValueError as error:  # UserError, and fields that a model does not have
        sys.exit(f"error: {error}")
    except OSError as error:
        if written is None:
            raise
        sys.exit(f"error: {error.filename or written} can't be written: {error.strerror}.")
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)


def parse_fields(settings: Sequence[str]) -> dict[str, Any]:
    """Parse `name=value` arguments of a command into fields of a model.

    Raises:
        UserError: an argument contains no `=`.
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
    """Check that writing to a path would not overwrite anything, unless `force` is set.

    Raises:
        UserError: there is a file, or a folder that is not empty, or the path can't be accessed.
    """
    try:
        taken = any(path.iterdir()) if path.is_dir() else path.exists()
    except OSError as error:
        raise UserError(f"{path} can't be written: {error.strerror}.") from error
    if taken and not force:
        raise UserError(f"{path} is there already: give another place, or --force to replace it.")
