"""Trains, resumes or evaluates what a config describes.

python -m vvt_jax.main --config=configs/digits.py --workdir=runs/digits [--config.field=value ...]
"""

import functools
import os
import sys

from absl import app, flags
from ml_collections import config_flags

from vvt_jax.configuration import ConfigError, flagged_fields, parse_flags
from vvt_jax.errors import UnwrittenError, UserError
from vvt_jax.output import outlive_readers

_CONFIG = config_flags.DEFINE_config_file(
    "config", None, "A file with get_config(); configs/common.py lists the fields."
)
_WORKDIR = flags.DEFINE_string(
    "workdir", None, "The run's folder; the same command with the same folder resumes."
)
flags.mark_flags_as_required(["config", "workdir"])


def main(argv: list[str]) -> None:
    from vvt_jax import parallel  # after --help and flag errors
    from vvt_jax.train import Interrupted, train_and_evaluate

    parallel.give_simulated_devices_time()
    try:
        if argv[1:]:
            raise ConfigError(f"Not a flag: {argv[1]}; a field is given as --config.field=value.")
        flagged = flagged_fields(_CONFIG)
        train_and_evaluate(_CONFIG.value, str(_WORKDIR.value), flagged=flagged)
    except UnwrittenError as error:
        # All that can be saved is. What libraries write in the background would fail once more at
        # the program's end, and say so in tracebacks.
        print(f"error: {error}", file=sys.stderr, flush=True)
        os._exit(1)
    except UserError as error:
        sys.exit(f"error: {error}")
    except Interrupted as interrupted:
        print(interrupted, file=sys.stderr)
        sys.exit(interrupted.exit_status)


if __name__ == "__main__":
    outlive_readers()
    app.run(main, flags_parser=functools.partial(parse_flags, config_flag=_CONFIG))
