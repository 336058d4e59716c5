"""What commands share: how they end, how arguments are read, and what is not overwritten."""

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
    """Ends the program with one sentence and status 1 for what the user can mend, and with the
    shell's status 130 after Ctrl-C.

    Args:
        written: what the command writes, for errors of the file system that name no file; None
            leaves these errors alone.
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
