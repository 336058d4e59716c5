"""Checkpoints of a run, the one place that touches orbax.

A checkpoint holds the `TrainState` (parameters, the model's other collections, optimizer state,
averaged weights, totals, step) and the bookkeeping below. The data's position is not in it: batch i
follows from the seed and i alone, so the step says where the data goes on.

Orbax gives back arrays with a flipped bit without a word: the bookkeeping has a checksum of them.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils
from orbax.checkpoint.checkpoint_managers import (
    PolicyCheckpointInfo,
    PreservationContext,
    PreservationPolicy,
)

from vvt_jax.errors import UserError

FORMAT_VERSION = 2
_MEND = "delete that folder to go on from the one before it."
State = TypeVar("State")


class CheckpointError(UserError):
    """A checkpoint that can't be read."""


@dataclasses.dataclass(frozen=True)
class Best:
    """The best evaluation so far: the bookkeeping of a run beside its state.

    Attributes:
        step: where it was, the earliest of equals; 0 for none.
        score: its validation top-1 or mIoU, a fraction.
    """

    step: int = 0
    score: float = -1.0


class Checkpoints:
    """The checkpoints in a folder; written in the background, the newest and the best are kept.

    Args:
        folder: made if it is missing, unless it is only read.
        keep: how many of the newest are kept; None only reads.
    """

    def __init__(self, folder: Path, *, keep: int | None):
        self._kept = _NewestAndBest(keep or 0)
        self._folder = folder.absolute()
        self._manager = ocp.CheckpointManager(
            self._folder,
            item_handlers={
                "state": ocp.StandardCheckpointHandler(),
                "bookkeeping": ocp.JsonCheckpointHandler(),
            },
            options=ocp.CheckpointManagerOptions(
                preservation_policy=self._kept,
                cleanup_tmp_directories=keep is not None,
                create=keep is not None,
                read_only=keep is None,
            ),
        )

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_: object) -> None:
        self._manager.close()  # waits for what is being written

    def latest_step(self) -> int | None:
        """The step of the newest complete checkpoint, None where there is none."""
        return self._manager.latest_step()

    def save(self, step: int, state: Any, best: Best) -> None:
        """Saves in the background; a step that is already there is left as it is."""
        if step == self.latest_step():
            return
        self._kept.best_step = best.step
        book = {
            "format_version": FORMAT_VERSION,
            "checksum": _checksum(state),
            **dataclasses.asdict(best),
        }
        self._manager.save(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardSave(state),
                bookkeeping=ocp.args.JsonSave(book),
            ),
        )

    def restore(self, abstract_state: State) -> tuple[State, Best]:
        """The newest checkpoint.

        Args:
            abstract_state: shapes, dtypes and shardings of the state to return.

        Raises:
            CheckpointError: it is damaged, of another format version, or of another model.
        """
        state, best = self._read(abstract_state)
        # Arrays of orbax's own making may share memory with what it read: the step donates them.
        return jax.tree.map(lambda x: x.copy(), state), best

    def restore_variables(self) -> dict[str, Any]:
        """What `model.apply` takes, of the newest checkpoint: the averaged weights, if it has some,
        else the parameters, and the model's other collections; on the first device.

        Raises:
            CheckpointError: as `restore`.
        """
        step = self.latest_step()
        layout = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        try:
            saved = self._manager.item_metadata(step)["state"]
            abstract = jax.tree.map(
                lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=layout), saved.tree
            )
        except Exception as error:  # as in `restore`
            raise self._unreadable(error) from error
        state, _ = self._read(abstract)
        return {"params": state.get("ema") or state["params"], **(state.get("mutable") or {})}

    def _read(self, abstract_state: Any) -> tuple[Any, Best]:
        step = self.latest_step()
        folder = self._folder / str(step)
        try:
            found = self._manager.restore(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardRestore(abstract_state),
                    bookkeeping=ocp.args.JsonRestore(),
                ),
            )
        except Exception as error:  # orbax raises whatever its storage layers do
            raise self._unreadable(error) from error
        book = dict(found["bookkeeping"])
        version = book.pop("format_version", None)
        if version != FORMAT_VERSION:
            raise CheckpointError(
                f"The checkpoint {folder} has format version {version}, "
                f"but this program reads version {FORMAT_VERSION}."
            )
        if book.pop("checksum", None) != _checksum(found["state"]):
            raise CheckpointError(
                f"The checkpoint {folder} is damaged: it is not what was saved: {_MEND}"
            )
        return found["state"], Best(**book)

    def _unreadable(self, error: Exception) -> CheckpointError:
        folder = self._folder / str(self.latest_step())
        reason = str(error).strip().partition("\n")[0][:200]
        return CheckpointError(
            f"The checkpoint {folder} can't be read ({type(error).__name__}: {reason}): {_MEND}"
        )


class _NewestAndBest(PreservationPolicy):
    """Keeps the newest checkpoints and the best one, wherever that is."""

    def __init__(self, newest: int):
        self._newest = newest
        self.best_step = 0

    def should_preserve(
        self, checkpoints: Sequence[PolicyCheckpointInfo], *, context: PreservationContext
    ) -> Sequence[bool]:
        """One answer for each checkpoint, the oldest first."""
        first = len(checkpoints) - self._newest
        return [i >= first or found.step == self.best_step for i, found in enumerate(checkpoints)]


def _checksum(state: Any) -> int:
    """The sum of all arrays, read as whole numbers of 32 bits: the same however they are laid out
    on the devices."""
    total = 0
    for leaf in jax.tree.leaves(state):
        for shard in leaf.addressable_shards:
            if shard.replica_id == 0:
                data = np.ascontiguousarray(shard.data).reshape(-1)
                words = data.view(np.uint8 if data.nbytes % 4 else np.uint32)
                total += int(words.sum(dtype=np.uint64))
    total %= 2**32
    if jax.process_count() > 1:
        every = multihost_utils.process_allgather(np.uint32(total))
        total = int(every.sum(dtype=np.uint64)) % 2**32
    return total
