"""The grain pipeline: batches of uint8 images, which the device normalises.

The stream of batches is a function of the source, the settings and the seed alone. It is the same
for any number of threads and worker processes, so a run resumes exactly from its step count.

Both generators hold threads, and worker processes if asked for, from their first batch until they
are exhausted, closed or collected:

    with contextlib.closing(train_batches(...)) as batches:
        ...

A script that uses workers needs `if __name__ == "__main__":`, since each worker imports it anew.
Workers hand over batches in shared memory: a container needs more of it (`/dev/shm`) than the
64 MB that Docker gives by default.
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
_SUBSTITUTES = 20  # broken images in a row after which it is no accident
_REPORTED = 16  # broken images that a process names at a time


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
    """Endless batches, reshuffled every epoch; a batch may reach from one epoch into the next.

    Batch `i`, counted from 0, depends on the source, the settings, `seed` and `i` only.

    An image that can't be decoded is replaced by another one, which follows from `seed` and its
    place in the stream, and flagged in its batch; `BrokenImages` takes the flags out and counts.

    Args:
        source: the examples.
        record: the preprocessing record.
        augment: the settings that `prepare` follows.
        batch_size: examples in a batch.
        seed: 0 or more; fixes the order and every image's augmentation.
        start_step: the first batch to give, to resume a run.
        repeats: how often an image comes in turn, each time augmented anew (repeated augmentation,
            Hoffer et al., arXiv 1901.09335); an epoch has as many examples as before, of a part
            of the images.
        prepare: of an example, a random generator, the record and the settings makes the arrays of
            the batch's example.
        rows: the examples of each batch that are wanted, by their place in it, where several
            processes share a batch: only these are read. By default all.
        workers: worker processes; 0 works in this process.
        threads: threads that prepare batches, in each worker; 0 works when a batch is asked for.

    Returns:
        A generator of what `prepare` makes, stacked, by default `{"image": uint8 [batch, height,
        width, 3], "label": int32 [batch]}`; and `broken`, int32 `[batch]`: the number of the
        example that was replaced, else -1.

    Raises:
        DataError: the source is empty, or hardly any image of it can be decoded.
        ValueError: a setting is out of range.
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
    """Every example exactly once, in order; the last batch is filled up with black images.

    An image that can't be used is black as well, not counted, and flagged in its batch.

    Args:
        source: the examples.
        record: the preprocessing record.
        batch_size: examples in a batch.
        rows: as for `train_batches`; there are as many batches for any of them.
        workers: worker processes; 0 works in this process.
        threads: threads that prepare batches, in each worker; 0 works when a batch is asked for.

    Returns:
        A generator of `{"image": uint8 [batch, height, width, 3], "label": int32 [batch],
        "mask": bool [batch], "broken": int32 [batch]}`; `mask` is False where the batch is filled
        up and where an image is broken (label 0), whose number is in `broken`, else -1. Labels
        that are arrays keep their dtype, `[batch, ...]`.

    Raises:
        DataError: the source is empty, or none of its images can be decoded.
        ValueError: a setting is out of range.
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
    """Refuses at the call what would otherwise fail at the first batch, or in a worker."""
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
        # grain's own ways (slices, ElasticIterator) deal examples out in turn: in another order
        # than one process has them, which would change what is mixed with what.
        examples, batch_size = _Rows(examples, batch_size, rows), len(rows)
    # No stream here has a remainder, but grain would divide an endless one's length as floats,
    # rounding up beyond the largest length.
    return examples.batch(batch_size, drop_remainder=True)


class _Rows(grain.MapDataset):
    """Of each batch only some examples, by their place in it."""

    def __init__(self, parent: grain.MapDataset, batch_size: int, rows: np.ndarray):
        super().__init__(parent)
        self._batch_size, self._rows = batch_size, rows.tolist()

    def __len__(self) -> int:
        return len(self._parent) // self._batch_size * len(self._rows)

    def __getitem__(self, index: Any) -> Any:
        batch, place = divmod(index, len(self._rows))
        return self._parent[batch * self._batch_size + self._rows[place]]


class _RepeatEach(grain.MapDataset):
    """Each element several times in turn; the first ones only, so that the length stays."""

    def __init__(self, parent: grain.MapDataset, times: int):
        super().__init__(parent)
        self._times = times

    def __len__(self) -> int:
        return len(self._parent)

    def __getitem__(self, index: Any) -> Any:
        epoch, position = divmod(index, len(self))
        # grain tells epochs apart by indices beyond the length
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
    """Names each broken example of a stream once, and counts them.

    Where several processes share the batches, each finds those of its own rows: what `take` gave in
    any of them is told to all, so that they count alike and give up together.

    Args:
        source: the examples that the batches are made of.
        limit: more broken examples than this end the run.
        say: takes one sentence an example.
    """

    def __init__(self, source: Source, limit: int, say: Callable[[str], None]):
        self._source, self._limit, self._say = source, limit, say
        self._seen: set[int] = set()
        self._untold: list[int] = []
        self._told: set[int] = set()

    def watch(
        self, batches: Generator[Batch, None, None]
    ) -> Generator[dict[str, np.ndarray], None, None]:
        """The batches of `train_batches`, without their flags."""
        with contextlib.closing(batches):
            for batch in batches:
                flags = batch.pop("broken")
                new = sorted(set(flags[flags >= 0].tolist()) - self._seen)
                self._seen.update(new)
                self._untold += new
                yield batch

    def take(self) -> np.ndarray:
        """Numbers of examples found here and not taken yet, the first ones: int32
        `[_REPORTED]`, filled up with -1."""
        taken, self._untold = self._untold[:_REPORTED], self._untold[_REPORTED:]
        return np.array(taken + [-1] * (_REPORTED - len(taken)), np.int32)

    def tell(self, taken: np.ndarray) -> None:
        """Names and counts what was taken, in this process or several.

        Raises:
            DataError: the limit is passed.
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
    """The batches of an evaluation without `broken`, whose numbers are added to a list."""
    with contextlib.closing(batches):
        for batch in batches:
            flags = batch.pop("broken")
            broken += flags[flags >= 0].tolist()
            yield batch


def why_broken(source: Source, index: int) -> str:
    """A sentence about an example that could not be used."""
    try:
        source.examples[index]
    except BrokenImageError as error:
        return str(error)
    return (
        f"{describe(source.examples, index)} can be read now, so it is either too long and narrow "
        "for the model's input, or its file has changed."
    )


def _first_label(source: Source) -> np.ndarray:
    """The label of the first example that can be read, for its shape and dtype."""
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
    if index < len(examples):  # others fill up the last batch
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
    """The elements of a data set in their order, prepared ahead."""
    # Each thread prepares a whole batch. grain would keep 500 of them ready if not told otherwise.
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=2 * threads)
    batches = dataset.to_iter_dataset(options)
    if workers:
        # grain hands some absl flags to its workers, and notebooks never parse any.
        if not flags.FLAGS.is_parsed():
            flags.FLAGS.mark_as_parsed()
        batches = batches.mp_prefetch(
            grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=2),
            worker_init_fn=_follow_parent,
        )
    with contextlib.closing(iter(batches)) as iterator:
        yield from iterator
    if workers:
        # grain's end leaves its last batches in reference cycles. Their shared memory must be freed
        # now: at the program's exit it would be reported as leaked.
        gc.collect()


def _follow_parent(worker: int, workers: int) -> None:
    """Lets a worker process end with its parent and only with it.

    grain's would wait for ever for a parent that was killed, and a terminal sends Ctrl-C to all.
    """
    del worker, workers
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None, "this runs in a worker process"

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, name="follow-parent", daemon=True).start()
