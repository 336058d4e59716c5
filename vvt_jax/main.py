"""Trains, resumes or evaluates what a config describes.

python -m vvt_jax.main --config=configs/digits.py --workdir=runs/digits [--config.field=value ...]
"""

import sys

from absl import app, flags, logging
from ml_collections import config_flags

from vvt_jax.configuration import ConfigError, unknown_field
from vvt_jax.errors import UserError

_CONFIG = config_flags.DEFINE_config_file(
    "config", None, "A file with get_config(); configs/common.py lists the fields."
)
_WORKDIR = flags.DEFINE_string(
    "workdir", None, "The run's folder; the same command with the same folder resumes."
)
flags.mark_flags_as_required(["config", "workdir"])


def main(argv: list[str]) -> None:
    from vvt_jax.train import Interrupted, train_and_evaluate  # after --help and flag errors

    try:
        if argv[1:]:
            raise ConfigError(f"Not a flag: {argv[1]}; a field is given as --config.field=value.")
        train_and_evaluate(_CONFIG.value, str(_WORKDIR.value))
    except UserError as error:
        sys.exit(f"error: {error}")
    except Interrupted as interrupted:
        print(interrupted, file=sys.stderr)
        sys.exit(interrupted.exit_status)


def _parse_flags(argv: list[str]) -> list[str]:
    try:
        rest = app.parse_flags_with_usage(argv)
        if flags.FLAGS["verbosity"].using_default_value:
            flags.FLAGS.verbosity = logging.WARNING  # type: ignore[assignment]
        _ = "mode" in _CONFIG.value  # a config file that can't be read complains when it is used
        return rest
    except AttributeError as error:
        sys.exit(f"error: {unknown_field(error, argv)}")
    except OSError as error:
        reason = str(error).strip().splitlines()[-1].strip()  # the paths that were tried go before
        sys.exit(f"error: The config file can't be read: {reason}.")


if __name__ == "__main__":
    app.run(main, flags_parser=_parse_flags)
