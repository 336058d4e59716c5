"""Checkpoints of a run. This is the only module that uses Orbax.

A checkpoint holds the `TrainState` (parameters, the model's other collections, optimizer state,
averaged weights, totals, step) and the bookkeeping below. It doesn't need the position in the data:
batch i depends only on the seed and i, so the step determines where the data resumes.

Orbax doesn't notice flipped bits in the arrays that it restores. SHA-256 checksums are therefore
stored beside a checkpoint's files, and verified before it is restored. They are checksums of files
rather than arrays, because a different layout over devices or processes reads the same files, and
because they can then be computed in the background, after the arrays have left the devices. They
are written before the folder gets its final name, so every complete checkpoint has them.
"""

import dataclasses
import json
import logging
from collections.abc import Callable, Collection, Mapping
from typing import Any, TypeVar

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils

from vvt_jax.system import storage
from vvt_jax.system.errors import NO_ROOM, UnwrittenError, UserError
from vvt_jax.system.storage import AnyPath
from vvt_jax.training.checkpoint_handlers import (
    NewestAndBest,
    SummedBookkeeping,
    SummedState,
    describe_error,
    unwritten_message,
)
from vvt_jax.training.checksums import SUMS, DamagedError, verify_sums

FORMAT_VERSION = 2
_ITEMS = ("state", "bookkeeping")
State = TypeVar("State")


class CheckpointError(UserError):
    """A checkpoint can't be read or written."""


class UnwrittenCheckpointError(CheckpointError, UnwrittenError):
    """A checkpoint can't be written."""


@dataclasses.dataclass(frozen=True)
class Best:
    """The best evaluation so far, which is the bookkeeping stored with a run's state.

    Attributes:
        step: the step of the best evaluation, the earliest one if several are equal; 0 if there has
            been none.
        score: its validation top-1 accuracy or mIoU, as a fraction.
    """

    step: int = 0
    score: float = -1.0


def check_folder(folder: AnyPath) -> None:
    """Raise CheckpointError if the folder is in an object store that Orbax can't write to."""
    if storage.is_remote(folder) and not str(folder).startswith("gs://"):
        raise CheckpointError(
            f"{folder} can't hold checkpoints: they go into a folder, or to gs://; data and model "
            "folders may be there."
        )


class Checkpoints:
    """The checkpoints in a folder, written in the background. The newest and the best are kept.

    Args:
        folder: the folder, which is created if it is missing, unless `keep` is None.
        keep: the number of newest checkpoints to keep, or None to only read checkpoints.
        say: a function that is called with sentences about damaged checkpoints that were skipped.
    """

    def __init__(self, folder: AnyPath, *, keep: int | None, say: Callable[[str], object] = print):
        self._kept = NewestAndBest(keep or 0)
        check_folder(folder)
        self._folder = epath.Path(storage.absolute(folder))
        self._reads_only = keep is None
        self._say = say
        for logger in ("absl", "asyncio"):
            logging.getLogger(logger).addFilter(_without_traceback)
        handlers = ocp.handlers.DefaultCheckpointHandlerRegistry()
        state, bookkeeping = SummedState(), SummedBookkeeping()
        for arguments in (ocp.args.StandardSave, ocp.args.StandardRestore):
            handlers.add("state", arguments, state)
        if self._reads_only:  # when saving, it would replace the handler with checksums
            handlers.add("state", ocp.args.PyTreeRestore, ocp.PyTreeCheckpointHandler())
        for arguments in (ocp.args.JsonSave, ocp.args.JsonRestore):
            handlers.add("bookkeeping", arguments, bookkeeping)
        self._manager = _Manager(
            self._folder,
            handler_registry=handlers,
            options=ocp.CheckpointManagerOptions(
                preservation_policy=self._kept,
                # In the background, Orbax would wait 20 minutes for a folder it can't create.
                async_options=ocp.AsyncOptions(create_directories_asynchronously=False),
                cleanup_tmp_directories=keep is not None,
                create=keep is not None,
                read_only=keep is None,
            ),
        )

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            self._manager.close()  # waits for what is being written
        except Exception as error:
            if not _is_of_files(error):
                raise
            if kind is None:  # otherwise the block already failed, perhaps for this reason
                raise self._unwritten(error) from error

    def latest_step(self) -> int | None:
        """Return the step of the newest complete checkpoint, or None if there is none."""
        return self._manager.latest_step()

    def save(self, step: int, state: Any, best: Best) -> None:
        """Save a checkpoint in the background, unless the latest one is of the same step.

        Raises:
            CheckpointError: this checkpoint, or the previous one, can't be written.
        """
        if step == self.latest_step():
            return
        self._kept.best_step = best.step
        book = {"format_version": FORMAT_VERSION, **dataclasses.asdict(best)}
        try:
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardSave(state),
                    bookkeeping=ocp.args.JsonSave(book),
                ),
            )
        except Exception as error:  # from this save, or from the previous one in the background
            if not _is_of_files(error):
                raise
            raise self._unwritten(error) from error

    def restore(
        self, abstract_state: State, *, without: Collection[str] = ()
    ) -> tuple[State, Best]:
        """Restore the newest intact checkpoint.

        Damaged checkpoints are skipped and reported. Unless this object only reads, they are also
        renamed to `STEP.damaged`, so that none of them is mistaken for the latest one later.

        Args:
            abstract_state: the shapes, dtypes and shardings of the state to return.
            without: fields of the state that are neither read nor compared. In the returned state,
                they are as in `abstract_state` and hold no arrays. This is only possible if this
                object only reads.

        Returns:
            The state, and the best evaluation when it was saved.

        Raises:
            CheckpointError: all checkpoints are damaged, or the checkpoint has another format
                version or is of another model.
        """
        step = self._newest_sound_step()
        saved = self._saved_tree(step)
        compared = {name: tree for name, tree in saved.items() if name not in without}
        # Compare first: if a restore fails halfway, TensorStore's threads print tracebacks.
        if difference := _first_difference(compared, abstract_state):
            raise CheckpointError(
                f"The checkpoint {self._folder / str(step)} is of another model or optimizer: "
                f"{difference}; use another workdir, or the config that it was made with."
            )
        state, best = self._read(step, abstract_state, without)
        # Copy: Orbax's arrays may share memory with what it read, and the step donates them.
        return jax.tree.map(lambda x: x.copy(), state), best

    def restore_variables(self) -> dict[str, Any]:
        """Restore the variables for `model.apply` from the newest intact checkpoint.

        They are the averaged weights, if the checkpoint has them, otherwise the parameters, and the
        model's other collections. All of them are put on the first device.

        Raises:
            CheckpointError: as for `restore`.
        """
        step = self._newest_sound_step()
        layout = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        saved = self._saved_tree(step)
        params = "ema" if saved.get("ema") else "params"
        wanted = {name: saved[name] for name in (params, "mutable") if saved.get(name)}
        abstract = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=layout), wanted
        )
        found = self._read_item(step, _partial_restore(abstract))["state"]
        return {"params": found[params], **found.get("mutable", {})}

    def _newest_sound_step(self) -> int:
        """Return the step that the first process finds: all of them must restore the same one."""
        step, error = 0, None
        if jax.process_index() == 0:
            try:
                step = self._pass_over_damaged()
            except CheckpointError as found:
                step, error = -1, found
        step = int(multihost_utils.broadcast_one_to_all(np.int32(step)))
        if step < 0:
            raise error or CheckpointError(
                f"The first process can't read the checkpoints in {self._folder}: see what it says."
            )
        self._manager.reload()  # folders may have been renamed
        return step

    def _pass_over_damaged(self) -> int:
        damaged: dict[int, str] = {}
        for step in sorted(self._manager.all_steps(), reverse=True):
            try:
                self._verify(step)
            except DamagedError as error:
                damaged[step] = str(error)
                continue
            for bad, how in damaged.items():  # only now that there is one to resume from
                aside = "" if self._reads_only else f"; it is now {self._put_aside(bad)}"
                self._say(
                    f"The checkpoint {self._folder / str(bad)} is damaged ({how}){aside}. "
                    f"Going on from the one of step {step}."
                )
            return step
        newest, how = next(iter(damaged.items()))
        raise CheckpointError(
            f"The checkpoint {self._folder / str(newest)} is damaged ({how}), and there is no "
            "sound one before it: use another workdir, or start anew by deleting that folder."
        )

    def _verify(self, step: int) -> None:
        folder = self._folder / str(step)
        if not any((folder / item / SUMS).exists() for item in _ITEMS):
            self._check_version(step, _read_version(folder))
        for item in _ITEMS:
            verify_sums(folder / item)
        self._check_version(step, _read_version(folder))

    def _put_aside(self, step: int) -> str:
        folder = self._folder / str(step)
        aside, number = self._folder / f"{step}.damaged", 1
        while aside.exists():
            number += 1
            aside = self._folder / f"{step}.damaged-{number}"
        folder.rename(aside)
        return aside.name

    def _read(
        self, step: int, abstract_state: State, without: Collection[str]
    ) -> tuple[State, Best]:
        if without:
            fields = vars(abstract_state).items()
            wanted = {k: v for k, v in fields if k not in without and jax.tree.leaves(v)}
            found = self._read_item(step, _partial_restore(wanted))
            state = dataclasses.replace(abstract_state, **found["state"])  # type: ignore[type-var]
        else:
            found = self._read_item(step, ocp.args.StandardRestore(abstract_state))
            state = found["state"]
        book = dict(found["bookkeeping"])
        book.pop("format_version", None)
        return state, Best(**book)

    def _read_item(self, step: int, state: ocp.args.CheckpointArgs) -> Mapping[str, Any]:
        try:
            return self._manager.restore(
                step,
                args=ocp.args.Composite(state=state, bookkeeping=ocp.args.JsonRestore()),
            )
        except Exception as error:  # Orbax raises whatever its storage layers raise
            if not _is_of_files(error):
                raise
            raise self._unreadable(step, error) from error

    def _saved_tree(self, step: int) -> Any:
        try:
            return self._manager.item_metadata(step)["state"].tree
        except Exception as error:  # as in `_read`
            raise self._unreadable(step, error) from error

    def _check_version(self, step: int, version: object) -> None:
        if version not in (None, FORMAT_VERSION):
            raise CheckpointError(
                f"The checkpoint {self._folder / str(step)} has format version {version}, "
                f"but this program reads version {FORMAT_VERSION}."
            )

    def _unreadable(self, step: int, error: Exception) -> CheckpointError:
        return CheckpointError(
            f"The checkpoint {self._folder / str(step)} can't be read ({describe_error(error)}), "
            "though its files are as they were written."
        )

    def _unwritten(self, error: Exception) -> CheckpointError:
        return UnwrittenCheckpointError(unwritten_message(self._folder, error))


class _Manager(ocp.CheckpointManager):
    """A checkpoint manager that ignores preemption.

    The run itself asks JAX for the preemption sync point. If Orbax asked as well, with different
    step numbers and from its background thread, JAX would agree on a point that is never reached.
    """

    def reached_preemption(self, step: int) -> bool:
        """Return False, so that Orbax never acts on preemption."""
        del step
        return False


def _partial_restore(wanted: Any) -> ocp.args.PyTreeRestore:
    """Return arguments to read only what is in the given tree from a checkpoint."""
    return ocp.args.PyTreeRestore(
        item=wanted,
        restore_args=ocp.checkpoint_utils.construct_restore_args(wanted),
        partial_restore=True,
    )


def _read_version(folder: epath.Path) -> object:
    """Return a checkpoint's format version, which may differ from ours, or None if it has none."""
    try:
        path = folder / "bookkeeping" / "metadata"
        return json.loads(storage.read_text(path, storage.SizeLimit.CONFIG))["format_version"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


def _first_difference(saved: Any, wanted: Any) -> str | None:
    """Describe the first array that isn't in both trees with the same shape; None if all are."""

    def shapes(tree: Any) -> dict[str, tuple[int, ...]]:
        leaves = jax.tree_util.tree_leaves_with_path(tree)
        return {jax.tree_util.keystr(p, simple=True, separator="/"): x.shape for p, x in leaves}

    there, here = shapes(saved), shapes(wanted)
    for name in there | here:
        if there.get(name) != here.get(name):
            return (
                f"{name} has shape {there.get(name, 'none')} there, {here.get(name, 'none')} here"
            )
    return None


def _is_of_files(error: BaseException | None) -> bool:
    """Return whether an error was caused by files, rather than by another process or the devices.

    The chain of causes is searched, because Orbax turns errors of a barrier into its own errors.
    """
    chain: list[BaseException] = []
    while error is not None and error not in chain:
        chain.append(error)
        error = error.__cause__ or error.__context__
    if any(isinstance(each, OSError) and each.errno in NO_ROOM for each in chain):
        return True
    return not any(isinstance(each, jax.errors.JaxRuntimeError | TimeoutError) for each in chain)


def _without_traceback(record: logging.LogRecord) -> bool:
    """Filter out what Orbax logs about a failed save, which is also raised and reported."""
    return not (record.exc_info and ("orbax" in record.pathname or "orbax" in record.getMessage()))
