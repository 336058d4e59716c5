"""The parts of orbax that write checksums, and decide what is kept."""

import contextlib
from collections.abc import Iterator, Sequence

import orbax.checkpoint as ocp
from etils import epath
from orbax.checkpoint.checkpoint_managers import (
    PolicyCheckpointInfo,
    PreservationContext,
    PreservationPolicy,
)

from vvt_jax.distributed import failure
from vvt_jax.system.errors import NO_ROOM, USER_ERROR
from vvt_jax.training.checksums import write_sums


class NewestAndBest(PreservationPolicy):
    """Keeps the newest checkpoints and the best one, however old it is."""

    def __init__(self, newest: int):
        self._newest = newest
        self.best_step = 0

    def should_preserve(
        self, checkpoints: Sequence[PolicyCheckpointInfo], *, context: PreservationContext
    ) -> Sequence[bool]:
        """Return whether to keep each checkpoint; the oldest one comes first."""
        first = len(checkpoints) - self._newest
        return [i >= first or found.step == self.best_step for i, found in enumerate(checkpoints)]


class SummedState(ocp.StandardCheckpointHandler):
    def finalize(self, directory: epath.Path) -> None:
        """Write the checksums.

        Orbax calls this in the first process, after all processes have written their files and
        before the folder is renamed.
        """
        with _announcing_full_disks(directory):
            super().finalize(directory)
            write_sums(directory)


class SummedBookkeeping(ocp.JsonCheckpointHandler):
    def finalize(self, directory: epath.Path) -> None:
        with _announcing_full_disks(directory):
            super().finalize(directory)
            write_sums(directory)


@contextlib.contextmanager
def _announcing_full_disks(directory: epath.Path) -> Iterator[None]:
    """Announce a full disk to the other processes, which otherwise wait for twenty minutes."""
    try:
        yield
    except OSError as error:
        if error.errno in NO_ROOM:
            failure.announce(unwritten_message(directory, error), USER_ERROR)
        raise


def unwritten_message(folder: epath.Path, error: Exception) -> str:
    return (
        f"A checkpoint can't be written into {folder} ({describe_error(error)}): those that "
        "are complete stay as they are; with room on the disk, the same command goes on."
    )


def describe_error(error: Exception) -> str:
    reason = str(error).strip().partition("\n")[0][:200]
    return f"{type(error).__name__}: {reason}"
