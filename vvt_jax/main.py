"""Train, resume or evaluate the run that a config describes.

python -m vvt_jax.main --config=configs/digits.py --workdir=runs/digits [--config.field=value ...]

Exit status: 0 on success; 1 for an error that only the user can fix; 70 for any other error, which
may not occur again; 128 + N after signal N, once the run has been saved.
"""

import functools
import signal
import sys
import traceback

if __name__ == "__main__":  # before jax is imported: the restart would import it twice
    from vvt_jax.system.huge_pages import restart_with_huge_pages

    restart_with_huge_pages()

from absl import app, flags
from ml_collections import config_flags

from vvt_jax.system.errors import CRASH, USER_ERROR, UnwrittenError, UserError
from vvt_jax.system.output import outlive_readers
from vvt_jax.training.config_flags import flagged_fields, parse_flags

_CONFIG = config_flags.DEFINE_config_file(
    "config", None, "A file with get_config(); configs/common.py lists the fields."
)
_WORKDIR = flags.DEFINE_string(
    "workdir", None, "The run's folder; the same command with the same folder resumes."
)
flags.mark_flags_as_required(["config", "workdir"])


def main(argv: list[str]) -> None:
    # Imported late, to keep --help and flag errors fast
    from vvt_jax.distributed import failure, hosts, sharding
    from vvt_jax.train import Interrupted, train_and_evaluate

    sharding.give_simulated_devices_time()
    try:
        flagged = flagged_fields(_CONFIG)
        train_and_evaluate(_CONFIG.value, str(_WORKDIR.value), flagged=flagged)
        failure.finish()
    except hosts.IncompleteGroupError as error:
        failure.end(str(error), CRASH)  # the missing processes may be there the next time
    except UserError as error:
        # After a full disk, what libraries write as Python exits would fail again, with tracebacks.
        # Everything that could be saved has been saved.
        at_once = isinstance(error, UnwrittenError)
        failure.end(str(error), USER_ERROR, at_once=at_once)
    except Interrupted as interrupted:
        print(interrupted, file=sys.stderr)
        failure.finish()
        sys.exit(interrupted.exit_status)
    except Exception as error:
        if not failure.has_happened():  # in another process, which then caused this error
            traceback.print_exc()
        reason = (str(error).strip().splitlines() or ["it gives no reason"])[0]
        failure.end(str(UserError(f"{type(error).__name__}: {reason}")), CRASH)
    except KeyboardInterrupt:
        failure.end("Ctrl-C ended the program.", 128 + signal.SIGINT)


if __name__ == "__main__":
    outlive_readers()
    app.run(main, flags_parser=functools.partial(parse_flags, config_flag=_CONFIG))
