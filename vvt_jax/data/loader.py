"""The grain pipeline: batches of uint8 images, which are normalised on the device.

The stream of batches depends only on the source, the settings and the seed. It is the same for any
number of threads and worker processes, so a run can resume exactly from its step count.

Both generators hold threads, and worker processes if there are any, from their first batch until
they are exhausted, closed or garbage-collected:

    with contextlib.closing(train_batches(...)) as batches:
        ...

A script that uses workers needs `if __name__ == "__main__":`, since each worker imports the script
again. Workers pass batches through shared memory, of which a container needs more (`/dev/shm`) than
the 64 MB that Docker provides by default.
"""

import contextlib
import functools
import gc
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Generator, Mapping
from typing import Any

import grain
import numpy as np
from absl import flags

from vvt_jax.data import augment as augment_lib
from vvt_jax.data import preprocess
from vvt_jax.data.examples import BrokenImageError, DataError, Examples, Source, describe
from vvt_jax.data.preprocess import UnfitImageError

Batch = dict[str, np.ndarray]
_SUBSTITUTES = 20  # this many broken images in a row are not a coincidence
_REPORTED = 16  # broken images that a process reports at a time


def train_batches(
    source: Source,
    *,
    record: Mapping[str, Any],
    augment: Mapping[str, Any],
    batch_size: int,
    seed: int,
    start_step: int = 0,
    repeats: int = 1,
    prepare: Callable[..., dict[str, Any]] = augment_lib.train_example,
    rows: np.ndarray | None = None,
    workers: int = 0,
    threads: int = 4,
) -> Generator[Batch, None, None]:
    """Generate training batches endlessly, reshuffling the examples every epoch.

    A batch may span the end of one epoch and the start of the next. Batch `i`, counted from 0,
    depends only on the source, the settings, `seed` and `i`.

    An image that can't be used is replaced by another one, chosen by `seed` and its position in the
    stream, and flagged in its batch. `BrokenImages` removes the flags and counts them.

    Args:
        source: the source of the examples.
        record: the preprocessing record.
        augment: the augmentation settings for `prepare`.
        batch_size: the number of examples in a batch.
        seed: an integer, 0 or more, that determines the order of the examples and the augmentation
            of every image.
        start_step: the number of the first batch, for resuming a run.
        repeats: how many times in a row each image is used, with a different augmentation each time
            (repeated augmentation, Hoffer et al., arXiv 1901.09335). The number of examples in an
            epoch stays the same, so an epoch covers only part of the images.
        prepare: a function that takes an example, a random generator, the record and the settings,
            and returns the arrays of one example of the batch.
        rows: the positions in each batch of the examples to read, for several processes that share
            a batch. By default, all examples are read.
        workers: the number of worker processes. With 0, this process does the work.
        threads: the number of threads that prepare batches in each worker. With 0, a batch is
            prepared when it is requested.

    Returns:
        A generator of batches with the stacked results of `prepare`, by default `{"image": uint8
        [batch, height, width, 3], "label": int32 [batch]}`, and with `broken`, int32 `[batch]`,
        the number of the example that was replaced, or -1.

    Raises:
        DataError: if the source is empty, or hardly any of its images can be used.
        ValueError: if a setting is out of range.
    """
    check(source, batch_size, workers, threads)
    preprocess.check_record(record)
    augment_lib.check_augment(augment)
    if repeats < 1:
        raise ValueError(f"`repeats` must be 1 or more, not {repeats}.")
    if start_step < 0:
        raise ValueError(f"`start_step` must be 0 or more, not {start_step}.")
    # grain shuffles epoch e by seed + e: without this, seed 1 would repeat seed 0 an epoch later.
    shuffle_seed, augment_seed = np.random.SeedSequence(seed).generate_state(2)
    order = grain.MapDataset.range(len(source.examples)).shuffle(int(shuffle_seed))
    dataset = (
        (order if repeats == 1 else _RepeatEach(order, repeats))
        .repeat()
        .random_map(
            functools.partial(
                _train_example,
                examples=source.examples,
                record=dict(record),
                augment=dict(augment),
                prepare=prepare,
            ),
            seed=int(augment_seed),
        )
    )
    dataset = _batched(dataset, batch_size, rows)
    return stream(dataset[start_step:], workers, threads)


def eval_batches(
    source: Source,
    *,
    record: Mapping[str, Any],
    batch_size: int,
    rows: np.ndarray | None = None,
    workers: int = 0,
    threads: int = 4,
) -> Generator[Batch, None, None]:
    """Generate batches that contain every example exactly once, in order.

    The last batch is padded with black images. An image that can't be used is also replaced by
    black, is not counted, and is flagged in its batch.

    Args:
        source: the source of the examples.
        record: the preprocessing record.
        batch_size: the number of examples in a batch.
        rows: as for `train_batches`. The number of batches is the same for any rows.
        workers: the number of worker processes. With 0, this process does the work.
        threads: the number of threads that prepare batches in each worker. With 0, a batch is
            prepared when it is requested.

    Returns:
        A generator of `{"image": uint8 [batch, height, width, 3], "label": int32 [batch],
        "mask": bool [batch], "broken": int32 [batch]}`. `mask` is False for padding and for broken
        images, which have the label 0. `broken` is the number of the broken example, or -1. Labels
        that are arrays keep their dtype and become `[batch, ...]`.

    Raises:
        DataError: if the source is empty, or none of its images can be decoded.
        ValueError: if a setting is out of range.
    """
    check(source, batch_size, workers, threads)
    preprocess.check_record(record)
    batches = -(-len(source.examples) // batch_size)
    dataset = grain.MapDataset.range(batches * batch_size).map(
        functools.partial(
            _eval_example,
            examples=source.examples,
            record=dict(record),
            no_label=np.zeros_like(_first_label(source)),
        )
    )
    return stream(_batched(dataset, batch_size, rows), workers, threads)


def check(source: Source, batch_size: int, workers: int, threads: int) -> None:
    """Raise now what would otherwise be an error at the first batch or in a worker.

    Raises:
        DataError: if the source is empty.
        ValueError: if `batch_size`, `workers` or `threads` is out of range.
    """
    if not len(source.examples):
        raise DataError(f"The split {source.split!r} of {source.name!r} has no examples.")
    if batch_size < 1:
        raise ValueError(f"`batch_size` must be 1 or more, not {batch_size}.")
    if workers < 0 or threads < 0:
        raise ValueError(f"`workers` and `threads` must be 0 or more, not {workers}, {threads}.")


def _batched(
    examples: grain.MapDataset, batch_size: int, rows: np.ndarray | None
) -> grain.MapDataset:
    if rows is not None and len(rows) < batch_size:
        # grain's own means (slices, ElasticIterator) deal out the examples in turn. Their order
        # would differ from that of a single process, and so would the pairs that are mixed.
        examples, batch_size = _Rows(examples, batch_size, rows), len(rows)
    # No stream here has a remainder, but to allow for one, grain would divide the length of an
    # endless stream in floats and round it up beyond the largest length.
    return examples.batch(batch_size, drop_remainder=True)


class _Rows(grain.MapDataset):
    """Only those examples of each batch that are at certain positions in it."""

    def __init__(self, parent: grain.MapDataset, batch_size: int, rows: np.ndarray):
        super().__init__(parent)
        self._batch_size, self._rows = batch_size, rows.tolist()

    def __len__(self) -> int:
        return len(self._parent) // self._batch_size * len(self._rows)

    def __getitem__(self, index: Any) -> Any:
        batch, place = divmod(index, len(self._rows))
        return self._parent[batch * self._batch_size + self._rows[place]]


class _RepeatEach(grain.MapDataset):
    """Each element several times in a row, and only the first ones, which keeps the length."""

    def __init__(self, parent: grain.MapDataset, times: int):
        super().__init__(parent)
        self._times = times

    def __len__(self) -> int:
        return len(self._parent)

    def __getitem__(self, index: Any) -> Any:
        epoch, position = divmod(index, len(self))
        # In grain, indices beyond the length belong to later epochs
        return self._parent[epoch * len(self) + position // self._times]


def _train_example(
    index: int,
    rng: np.random.Generator,
    examples: Examples,
    record: Mapping[str, Any],
    augment: Mapping[str, Any],
    prepare: Callable[..., dict[str, Any]],
) -> dict[str, Any]:
    broken = -1
    for _ in range(_SUBSTITUTES):
        try:
            example = prepare(examples[index], rng, record, augment)
        except (BrokenImageError, UnfitImageError):
            broken = index if broken < 0 else broken
            index = int(rng.integers(len(examples)))
            continue
        return {**example, "broken": np.int32(broken)}
    raise DataError(f"{_SUBSTITUTES} images in a row can't be decoded: is this data set damaged?")


class BrokenImages:
    """A counter of the broken examples in a stream, which reports each of them once.

    If several processes share the batches, each finds the broken examples in its own rows. The
    results of `take` from all processes are passed to `tell` in each of them, so that they all have
    the same count and stop together.

    Args:
        source: the source of the batches' examples.
        limit: the largest number of broken examples with which the run continues.
        say: a function that is called with a sentence about each broken example.
    """

    def __init__(self, source: Source, limit: int, say: Callable[[str], None]):
        self._source, self._limit, self._say = source, limit, say
        self._seen: set[int] = set()
        self._untold: list[int] = []
        self._told: set[int] = set()

    def watch(
        self, batches: Generator[Batch, None, None]
    ) -> Generator[dict[str, np.ndarray], None, None]:
        """Yield the batches of `train_batches` without their flags, which are recorded here."""
        with contextlib.closing(batches):
            for batch in batches:
                flags = batch.pop("broken")
                new = sorted(set(flags[flags >= 0].tolist()) - self._seen)
                self._seen.update(new)
                self._untold += new
                yield batch

    def take(self) -> np.ndarray:
        """Return the numbers of the first broken examples found here and not yet taken.

        They are int32 `[_REPORTED]`, padded with -1.
        """
        taken, self._untold = self._untold[:_REPORTED], self._untold[_REPORTED:]
        return np.array(taken + [-1] * (_REPORTED - len(taken)), np.int32)

    def tell(self, taken: np.ndarray) -> None:
        """Report and count the examples that `take` returned, in this process or in several.

        Raises:
            DataError: if there are more broken examples than the limit allows.
        """
        for index in sorted(set(taken[taken >= 0].tolist()) - self._told):
            self._told.add(index)
            why = why_broken(self._source, index)
            if len(self._told) > self._limit:
                raise DataError(
                    f"{len(self._told)} broken images are more than config.data.broken_limit="
                    f"{self._limit} allows. The last one: {why}"
                )
            self._say(f"Replaced a broken image, the run's {len(self._told)}. {why}")


def without_flags(
    batches: Generator[Batch, None, None], broken: list[int]
) -> Generator[Batch, None, None]:
    """Yield the batches of an evaluation without their flags, whose numbers go into `broken`."""
    with contextlib.closing(batches):
        for batch in batches:
            flags = batch.pop("broken")
            broken += flags[flags >= 0].tolist()
            yield batch


def why_broken(source: Source, index: int) -> str:
    """Return a sentence about why an example could not be used."""
    try:
        source.examples[index]
    except BrokenImageError as error:
        return str(error)
    return (
        f"{describe(source.examples, index)} can be read now, so it is either too long and narrow "
        "for the model's input, or its file has changed."
    )


def _first_label(source: Source) -> np.ndarray:
    """Return the label of the first example that can be read, for its shape and dtype."""
    first: BrokenImageError | None = None
    for index in range(len(source.examples)):
        try:
            return _label_of(source.examples[index])
        except BrokenImageError as error:
            first = first or error
    raise DataError(
        f"None of the images of the split {source.split!r} of {source.name!r} can be decoded. The "
        f"first one: {first}"
    ) from first


def _label_of(example: Mapping[str, Any]) -> Any:
    label = example["label"]
    return label if np.ndim(label) else np.int32(label)


def _eval_example(
    index: int, examples: Examples, record: Mapping[str, Any], no_label: np.ndarray
) -> dict[str, Any]:
    broken = -1
    if index < len(examples):  # larger ones pad the last batch
        try:
            example = examples[index]
            image = preprocess.eval_image(example["image"], record)
        except (BrokenImageError, UnfitImageError):
            broken = index
        else:
            return {
                "image": image,
                "label": _label_of(example),
                "mask": np.True_,
                "broken": np.int32(-1),
            }
    black = np.zeros((*record["size"], 3), np.uint8)
    return {"image": black, "label": no_label, "mask": np.False_, "broken": np.int32(broken)}


def stream(dataset: grain.MapDataset, workers: int, threads: int) -> Generator[Batch, None, None]:
    """Yield the elements of a data set in order, preparing them ahead of time."""
    # Each thread prepares a whole batch, and by default grain would keep 500 of them ready.
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=2 * threads)
    batches = dataset.to_iter_dataset(options)
    if workers:
        # grain passes some absl flags to its workers, but notebooks never parse any.
        if not flags.FLAGS.is_parsed():
            flags.FLAGS.mark_as_parsed()
        batches = batches.mp_prefetch(
            grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=2),
            worker_init_fn=_follow_parent,
        )
    with contextlib.closing(iter(batches)) as iterator:
        yield from iterator
    if workers:
        # When grain stops, it leaves its last batches in reference cycles. Their shared memory must
        # be freed now, or it would be reported as leaked when the program exits.
        gc.collect()


def _follow_parent(worker: int, workers: int) -> None:
    """Make a worker process end when its parent does, and not before.

    Otherwise, grain's workers would wait forever for a parent that was killed, and Ctrl-C in a
    terminal, which reaches all processes, would stop them.
    """
    del worker, workers
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None, "this runs in a worker process"

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, name="follow-parent", daemon=True).start()
