"""TFRecord files, framed here by hand: what is read, kept and refused."""

import itertools
import os
import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vvt_jax.data.examples import DataError
from vvt_jax.data.sources.tfrecord import TFRecords, masked_crc, read_offsets, read_record


def test_checksum_is_the_one_of_the_format():
    # RFC 3720, B.4: CRC32C of 32 zero bytes is 0x8A9136AA; masked as record_writer.h does
    rotated = (0x8A9136AA >> 15 | 0x8A9136AA << 17) & 0xFFFFFFFF
    assert masked_crc(bytes(32)) == (rotated + 0xA282EAD8) % 2**32


@settings(deadline=None, max_examples=20)
@given(records=st.lists(st.binary(max_size=50), max_size=8))
def test_records_come_back(tmp_path_factory, write_tfrecord, records):
    path = tmp_path_factory.mktemp("records") / "file"
    write_tfrecord(path, records)
    offsets = read_offsets(path)
    assert len(offsets) == len(records) + 1
    assert offsets[-1] == path.stat().st_size
    found = [read_record(path, *map(int, ends)) for ends in itertools.pairwise(offsets)]
    assert found == records


_RECORDS = [bytes([i]) * (10 + i) for i in range(9)]


@pytest.fixture
def files(tmp_path, write_tfrecord):
    for number in range(3):
        write_tfrecord(tmp_path / f"{number}", _RECORDS[3 * number : 3 * number + 3])
    return tmp_path


def _open(files, takes=((0, 3), (0, 3), (0, 3)), cache=None):
    return TFRecords(
        [(str(files / str(i)), skip, take, 3) for i, (skip, take) in enumerate(takes)], cache
    )


def test_files_in_a_row_and_parts_of_them(files):
    assert list(_open(files)) == _RECORDS
    some = pickle.loads(pickle.dumps(_open(files, ((1, 2), (0, 0), (0, 1)))))
    assert [some[i] for i in range(len(some))] == [_RECORDS[1], _RECORDS[2], _RECORDS[6]]
    for index in (-1, 3):
        with pytest.raises(IndexError, match="no record"):
            some[index]


def test_offsets_are_kept_until_a_file_changes(files, write_tfrecord):
    cache = files / "cache"
    assert list(_open(files, cache=cache)) == _RECORDS
    (kept,) = cache.iterdir()
    before = kept.stat().st_mtime_ns
    assert list(_open(files, cache=cache)) == _RECORDS
    assert kept.stat().st_mtime_ns == before
    kept.write_bytes(kept.read_bytes()[:100])  # damaged: made anew
    assert list(_open(files, cache=cache)) == _RECORDS
    with np.load(kept) as content:
        np.testing.assert_array_equal(content["counts"], [4, 4, 4])
    changed = [b"x" * 40, b"y", b"z"]
    write_tfrecord(files / "1", changed)
    assert list(_open(files, cache=cache)) == _RECORDS[:3] + changed + _RECORDS[6:]
    assert len(list(cache.iterdir())) == 2


def test_a_cache_that_cannot_be_written_is_done_without(files):
    (files / "file").write_text("")
    assert list(_open(files, cache=files / "file" / "cache")) == _RECORDS


def test_truncated_files_are_named_with_the_byte(files):
    path = files / "1"
    whole = path.read_bytes()
    second = int(read_offsets(path)[1])
    for length in (second + 5, second + 20, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(DataError, match=rf"{path} is truncated: its record at byte \d+ reach"):
            _open(files)


def test_a_corrupt_header_is_named_with_the_byte(files):
    path = files / "1"
    content = bytearray(path.read_bytes())
    content[int(read_offsets(path)[1])] ^= 1
    path.write_bytes(content)
    with pytest.raises(DataError, match=rf"{path} is damaged, or no TFRecord file: its header at "):
        _open(files)


def test_corrupt_data_is_named_with_the_byte(files):
    path, records = files / "1", _open(files)
    start = int(read_offsets(path)[1])
    content = bytearray(path.read_bytes())
    content[start + 15] ^= 1
    path.write_bytes(content)
    assert records[3] == _RECORDS[3]
    with pytest.raises(DataError, match=rf"{path} is damaged: its record at byte {start} is corr"):
        records[4]
    os.truncate(path, start + 15)
    with pytest.raises(DataError, match=rf"{path} is damaged: its record at byte {start} is corr"):
        records[4]


def test_another_number_of_records_is_refused(files, write_tfrecord):
    write_tfrecord(files / "1", _RECORDS[:2])
    with pytest.raises(DataError, match="1 has 2 records where the data set's description has 3"):
        _open(files)


def test_a_missing_file_is_named(files):
    (files / "2").unlink()
    for cache in (None, files / "cache"):
        with pytest.raises(DataError, match=r"2 can't be read: No such file or directory\."):
            _open(files, cache=cache)


def test_a_record_beyond_measure_is_not_read(tmp_path):
    path = tmp_path / "file"
    length = (2**40).to_bytes(8, "little")
    with path.open("wb") as file:
        file.write(length + masked_crc(length).to_bytes(4, "little"))
        file.truncate(2**40 + 16)  # a hole: takes no space
    with pytest.raises(DataError, match=r"record at byte 0 has 1099511627776 bytes, and a record"):
        read_offsets(path)
