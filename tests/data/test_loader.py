"""The pipeline: the same stream for any workers, threads and start; evaluation counts each once."""

import contextlib
import functools
import gc
import itertools
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vvt_jax.data import loader, sources
from vvt_jax.data.examples import BrokenImageError, DataError, Source

_RECORD = {
    "size": [16, 12],
    "crop_fraction": 1.0,
    "interpolation": "bilinear",
    "mean": [0.5, 0.5, 0.5],
    "std": [0.5, 0.5, 0.5],
}
_PLAIN = {"randaugment": "", "color_jitter": 0.0}
_EXACT = {"crop": "resize", "min_scale": 1.0, "flip": False, "shift": 0} | _PLAIN
_RANDOM = {"crop": "random_resized_crop", "min_scale": 0.08, "flip": True, "shift": 1} | _PLAIN


class _Numbered:
    """Example i is a noisy image labelled i."""

    def __init__(self, count):
        self._count = count

    def __len__(self):
        return self._count

    def __getitem__(self, index):
        image = np.random.default_rng(index).integers(256, size=(20, 20, 3), dtype=np.uint8)
        return {"image": image, "label": index}


_SLOW = functools.partial(pytest.param, marks=pytest.mark.slow)  # each worker imports jax anew


def _numbered(count):
    return Source(_Numbered(count), tuple(map(str, range(count))), "numbered", "all")


def _take(count, source, batch_size=4, seed=0, augment=_RANDOM, threads=0, **options):
    with contextlib.closing(
        loader.train_batches(
            source,
            record=_RECORD,
            augment=augment,
            batch_size=batch_size,
            seed=seed,
            threads=threads,
            **options,
        )
    ) as batches:
        return list(itertools.islice(batches, count))


def _labels(batches):
    return np.concatenate([batch["label"] for batch in batches])


def _assert_equal(one, other):
    assert len(one) == len(other)
    for a, b in zip(one, other, strict=True):
        assert set(a) == set(b)
        for key in a:
            np.testing.assert_array_equal(a[key], b[key])


def test_batches_have_the_promised_types():
    (batch,) = _take(1, _numbered(10))
    assert set(batch) == {"image", "label", "broken"}
    assert (batch["image"].shape, batch["image"].dtype) == ((4, 16, 12, 3), np.uint8)
    assert (batch["label"].shape, batch["label"].dtype) == ((4,), np.int32)


@pytest.mark.parametrize(("workers", "threads"), [(0, 1), (0, 4), (1, 0), _SLOW(2, 2)])
@pytest.mark.parametrize("start_step", [0, 7])
def test_stream_is_the_same_for_any_workers_threads_and_start(workers, threads, start_step):
    source = sources.open_source("digits", "validation")
    whole = _take(start_step + 6, source, batch_size=32)
    part = _take(6, source, batch_size=32, workers=workers, threads=threads, start_step=start_step)
    _assert_equal(part, whole[start_step:])


@settings(deadline=None, max_examples=15)
@given(
    count=st.integers(1, 20),
    batch_size=st.integers(1, 20),
    start_step=st.integers(0, 8),
    seed=st.integers(0, 2**40),
)
def test_stream_starts_anywhere_and_every_epoch_has_each_example_once(
    count, batch_size, start_step, seed
):
    source = _numbered(count)
    options = {"batch_size": batch_size, "seed": seed}
    whole = _take(start_step + 5, source, **options)
    _assert_equal(_take(5, source, start_step=start_step, **options), whole[start_step:])
    labels = _labels(whole)
    for start in range(0, len(labels) - count + 1, count):
        assert sorted(labels[start : start + count]) == list(range(count))


def test_order_and_augmentation_differ_by_epoch_and_seed():
    source = _numbered(50)
    batches = _take(30, source, batch_size=5)
    epochs = np.split(_labels(batches), 3)
    orders = {tuple(epoch) for epoch in epochs}
    # Also under seed 1, whose first epoch would be seed 0's second if grain had the seed as it is.
    orders |= {tuple(epoch) for epoch in np.split(_labels(_take(30, source, 5, seed=1)), 3)}
    assert len(orders) == 6

    images = np.concatenate([batch["image"] for batch in batches])
    versions = [{images[i].tobytes() for i in np.flatnonzero(_labels(batches) == 7)}]
    versions.append({image.tobytes() for image in images})
    assert [len(version) for version in versions] == [3, 150]


def test_without_augmentation_an_example_stays_itself():
    batches = _take(6, _numbered(8), augment=_EXACT)
    images = np.concatenate([batch["image"] for batch in batches])
    labels = _labels(batches)
    for label in range(8):
        assert len({image.tobytes() for image in images[labels == label]}) == 1


@pytest.mark.parametrize("start_step", [0, 3])
@pytest.mark.parametrize("workers", [0, _SLOW(2)])
def test_repeats_come_in_turn_each_augmented_anew(start_step, workers):
    source = _numbered(30)
    batches = _take(12, source, batch_size=10, repeats=3)
    epochs = np.split(_labels(batches), 4)
    for epoch in epochs:
        assert len(set(epoch)) == 10
        assert all(len(set(triple)) == 1 for triple in epoch.reshape(10, 3))
    assert len({tuple(epoch) for epoch in epochs}) == 4
    images = np.concatenate([batch["image"] for batch in batches])
    assert len({image.tobytes() for image in images}) == 120
    once = _labels(_take(3, source, batch_size=10))
    np.testing.assert_array_equal(epochs[0][::3], once[:10])  # the order that there would be
    part = _take(3, source, batch_size=10, repeats=3, start_step=start_step, workers=workers)
    _assert_equal(part, batches[start_step : start_step + 3])


class _Damaged(_Numbered):
    """Every third example can't be decoded."""

    def __getitem__(self, index):
        if index % 3 == 0:
            raise BrokenImageError(f"Image number {index} is broken.")
        return super().__getitem__(index)


def _damaged(count):
    return Source(_Damaged(count), tuple(map(str, range(count))), "damaged", "all")


@pytest.mark.parametrize("workers", [0, 2])
def test_a_broken_image_is_replaced_and_flagged(workers):
    whole = _take(12, _damaged(20))
    labels = _labels(whole)
    flags = np.concatenate([batch["broken"] for batch in whole])
    assert not (labels % 3 == 0).any()
    order = _labels(_take(12, _numbered(20)))
    np.testing.assert_array_equal(flags, np.where(order % 3 == 0, order, -1))
    np.testing.assert_array_equal(labels[flags < 0], order[flags < 0])
    assert len(set(labels[flags == 0])) > 1  # not always the same stands in
    _assert_equal(_take(4, _damaged(20), workers=workers, start_step=2), whole[2:6])


def test_broken_images_are_named_once_up_to_a_limit():
    source = _damaged(9)
    told = []

    def read(limit, batches=20):
        stream = loader.train_batches(
            source, record=_RECORD, augment=_EXACT, batch_size=4, seed=0, threads=1
        )
        broken = loader.BrokenImages(source, limit, told.append)
        with contextlib.closing(broken.watch(stream)) as kept:
            read = list(itertools.islice(kept, batches))
        broken.tell(broken.take())
        return read

    assert all(set(batch) == {"image", "label"} for batch in read(limit=3))
    assert [line[:39] for line in told] == [
        f"Replaced a broken image, the run's {n}. I" for n in (1, 2, 3)
    ]
    assert {line.split("number ")[1][0] for line in told} == {"0", "3", "6"}
    with pytest.raises(DataError) as refused:
        read(limit=2)
    assert str(refused.value).startswith(
        "3 broken images are more than config.data.broken_limit=2 allows. The last one: Image "
    )


def test_processes_tell_each_other_of_broken_images():
    """Half the rows each, then what both found is told to both: as one process would."""
    source, told = _damaged(90), [[], []]
    broken = [loader.BrokenImages(source, 30, told[i].append) for i in range(2)]
    for i in range(2):
        options = {"record": _RECORD, "augment": _EXACT, "seed": 0, "threads": 0}
        stream = loader.train_batches(
            source, batch_size=10, rows=np.arange(5 * i, 5 * i + 5), **options
        )
        with contextlib.closing(broken[i].watch(stream)) as kept:
            list(itertools.islice(kept, 18))  # two epochs
    for _ in range(2):  # 16 of a process at a time, of up to 30
        taken = np.stack([one.take() for one in broken])
        assert taken.dtype == np.int32
        for one in broken:
            one.tell(taken)
    assert told[0] == told[1]
    assert sorted(int(line.split("number ")[1].split()[0]) for line in told[0]) == [
        *range(0, 90, 3)
    ]
    assert all(
        line.startswith(f"Replaced a broken image, the run's {n + 1}. ")
        for n, line in enumerate(told[0])
    )


@settings(deadline=None, max_examples=15)
@given(st.data(), st.integers(1, 12), st.integers(0, 3))
def test_rows_are_those_of_the_whole_batch(data, batch_size, start_step):
    source = _numbered(7)
    rows = np.array(sorted(data.draw(st.sets(st.integers(0, batch_size - 1), min_size=1))))
    whole = _take(3, source, batch_size=batch_size, start_step=start_step)
    part = _take(3, source, batch_size=batch_size, start_step=start_step, rows=rows)
    _assert_equal(part, [{k: v[rows] for k, v in batch.items()} for batch in whole])
    given = [
        list(loader.eval_batches(source, record=_RECORD, batch_size=batch_size, threads=0, **own))
        for own in ({}, {"rows": rows})
    ]
    _assert_equal(given[1], [{k: v[rows] for k, v in batch.items()} for batch in given[0]])


def test_rows_read_only_their_own_examples():
    read = []

    class Watched(_Numbered):
        def __getitem__(self, index):
            read.append(index)
            return super().__getitem__(index)

    source = Source(Watched(8), tuple(map(str, range(8))), "watched", "all")
    (batch,) = _take(1, source, batch_size=8, rows=np.array([1, 6]))
    assert read == batch["label"].tolist()


@pytest.mark.slow
def test_rows_with_workers():
    source = _numbered(20)
    rows = np.array([2, 3, 7])
    whole = _take(4, source, batch_size=8)
    part = _take(4, source, batch_size=8, rows=rows, workers=2)
    _assert_equal(part, [{k: v[rows] for k, v in batch.items()} for batch in whole])


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_eval_leaves_broken_images_out_and_flags_them(workers):
    source = _damaged(20)
    flags = set(range(0, 20, 3))
    broken = []
    batches = loader.eval_batches(source, record=_RECORD, batch_size=8, workers=workers)
    with contextlib.closing(loader.without_flags(batches, broken)) as kept:
        found = list(kept)
    assert broken == sorted(flags)
    mask = np.concatenate([batch["mask"] for batch in found])
    assert set(np.flatnonzero(~mask)) == flags | {20, 21, 22, 23}
    assert set(_labels(found)[mask].tolist()) == set(range(20)) - flags
    assert "broken" not in found[0]


def test_nothing_but_broken_images_names_the_first():
    source = Source(_AllDamaged(9), ("a",), "none", "all")
    with pytest.raises(DataError, match=r"None of the images .*: Image number 0 is broken"):
        loader.eval_batches(source, record=_RECORD, batch_size=2)


class _AllDamaged(_Numbered):
    def __getitem__(self, index):
        raise BrokenImageError(f"Image number {index} is broken.")


def test_a_data_set_without_images_is_an_error():
    source = Source(_AllDamaged(9), ("a",), "none", "all")
    with pytest.raises(DataError, match="20 images in a row can't be decoded: is this"):
        _take(1, source)


@pytest.mark.parametrize("batch_size", [1, 2, 3, 7, 10, 11, 64])
def test_eval_counts_each_example_once_in_order(batch_size):
    source = _numbered(10)
    batches = list(loader.eval_batches(source, record=_RECORD, batch_size=batch_size))
    assert len(batches) == -(-10 // batch_size)
    for batch in batches:
        assert set(batch) == {"image", "label", "mask", "broken"}
        assert (batch["broken"] == -1).all()
        assert batch["image"].shape == (batch_size, 16, 12, 3)
        assert [batch[key].dtype for key in ("image", "label", "mask")] == [
            np.uint8,
            np.int32,
            np.bool_,
        ]
        assert not batch["image"][~batch["mask"]].any()
    mask = np.concatenate([batch["mask"] for batch in batches])
    np.testing.assert_array_equal(mask, np.arange(len(mask)) < 10)
    np.testing.assert_array_equal(_labels(batches)[mask], np.arange(10))


def test_eval_is_the_same_for_any_workers():
    source = sources.open_source("digits", "validation")

    def batches(**options):
        return list(loader.eval_batches(source, record=_RECORD, batch_size=25, **options))

    expected = batches(threads=0)
    assert len(expected) == 6
    _assert_equal(batches(workers=2), expected)


def test_refusals_come_at_the_call():
    source = _numbered(4)
    train = {"record": _RECORD, "augment": _EXACT, "batch_size": 2, "seed": 0}
    for change, words in [
        ({"batch_size": 0}, "batch_size"),
        ({"start_step": -1}, "start_step"),
        ({"workers": -1}, "workers"),
        ({"record": _RECORD | {"interpolation": "x"}}, "interpolation"),
        ({"augment": _EXACT | {"crop": "x"}}, "crop"),
        ({"seed": -1}, "non-negative"),
        ({"repeats": 0}, "repeats"),
    ]:
        with pytest.raises(ValueError, match=words):
            loader.train_batches(source, **(train | change))
    with pytest.raises(ValueError, match="batch_size"):
        loader.eval_batches(source, record=_RECORD, batch_size=0)
    with pytest.raises(DataError, match="no examples"):
        loader.train_batches(_numbered(0), **train)
    with pytest.raises(DataError, match="no examples"):
        loader.eval_batches(_numbered(0), record=_RECORD, batch_size=2)


def _prefetch_threads():
    return [thread for thread in threading.enumerate() if "grain-prefetch" in thread.name]


@pytest.mark.parametrize("end", ["close", "collect"])
def test_threads_end_with_the_iterator(end):
    batches = loader.train_batches(
        _numbered(10), record=_RECORD, augment=_RANDOM, batch_size=4, seed=0
    )
    next(batches)
    assert _prefetch_threads()
    if end == "close":
        batches.close()
    del batches
    gc.collect()
    deadline = time.monotonic() + 120
    while _prefetch_threads() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not _prefetch_threads()


_SCRIPT = """
    import multiprocessing, os, sys, time
    from vvt_jax.data import loader, sources

    if __name__ == "__main__":
        batches = loader.train_batches(
            sources.open_source("digits", "test"), record={record}, augment={augment},
            batch_size=8, seed=0, workers=2, threads=1,
        )
        next(batches)
        print(*[child.pid for child in multiprocessing.active_children()], flush=True)
        {ending}
        batches.close()
        source = sources.open_source("digits", "test")
        print(len(list(loader.eval_batches(source, record={record}, batch_size=50, workers=2))))
        time.sleep(1)  # grain frees shared memory in a thread of its own.
"""


def _alive(pid):
    try:
        with open(f"/proc/{pid}/stat") as stat:
            return stat.read().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.slow
@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="reads process states from /proc")
@pytest.mark.parametrize(
    ("ending", "kill"),
    [("", False), ("raise KeyboardInterrupt", False), ("time.sleep(60)", True)],
    ids=["closed", "interrupted", "killed"],
)
def test_workers_end_with_the_program(tmp_path, ending, kill):
    script = tmp_path / "program.py"
    script.write_text(
        textwrap.dedent(_SCRIPT).format(record=_RECORD, augment=_RANDOM, ending=ending)
    )
    with subprocess.Popen(
        [sys.executable, str(script)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": os.getcwd()},
    ) as program:
        workers = [int(pid) for pid in program.stdout.readline().split()]
        assert len(workers) == 2
        if kill:
            program.send_signal(signal.SIGKILL)
        output, errors = program.communicate(timeout=300)
        if not ending:
            # Nothing about leaked shared memory or ignored exceptions, either.
            assert (output.split(), errors) == (["8"], "")
    deadline = time.monotonic() + 120
    while any(map(_alive, workers)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(map(_alive, workers))


class _Line:
    """One image that is a line of pixels, in a file with a name."""

    def __len__(self):
        return 1

    def __getitem__(self, index):
        return {"image": np.zeros((1, 60_000, 3), np.uint8), "label": 0}

    def describe(self, index):
        return "line.png"


def test_a_line_of_pixels_is_named():
    source = Source(_Line(), ("a",), "lines", "train")
    record = {**_RECORD, "size": [224, 224]}
    (batch,) = loader.eval_batches(source, record=record, batch_size=1, threads=0)
    assert batch["broken"].tolist() == [0]
    assert "line.png" in loader.why_broken(source, 0)
    batches = loader.train_batches(
        source,
        record=record,
        augment={**_RANDOM, "crop": "resize"},
        batch_size=1,
        seed=0,
        threads=0,
    )
    with contextlib.closing(batches), pytest.raises(DataError, match="20 images in a row"):
        next(batches)
