"""PyTorch's files: real ones, hostile ones that would leave a trace, and damaged ones.

The reader is held against a file of PyTorch's own in golden/, the writer against that and, where it
is installed, against PyTorch.
"""

import argparse
import builtins
import collections
import os
import pickle
import pickletools
import struct
import time
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pytest

from vvt_jax.weights import torch_files, torch_pickle
from vvt_jax.weights.checks import WeightsError

PUBLISHED = Path(__file__).parents[1] / "golden" / "micro_weights_only.pth"


@pytest.fixture(scope="module")
def arrays():
    return {name: tensor.read() for name, tensor in torch_files.read_file(PUBLISHED).items()}


def _archive(path, program, entries=None, *, compression=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("archive/data.pkl", program)
        for name, content in (entries or {}).items():
            archive.writestr(f"archive/{name}", content)
    return path


def _refusal(path, *words):
    with pytest.raises(WeightsError) as refused:
        torch_files.read_file(path)
    sentence = str(refused.value)
    assert "\n" not in sentence
    assert sentence.endswith(".")
    for word in (str(path), *words):
        assert word in sentence


def test_what_is_written_reads_back_bit_for_bit(tmp_path, arrays):
    bits = np.random.default_rng(0).integers(2**32, size=(7, 5), dtype=np.uint32).view(np.float32)
    given = {
        **arrays,
        "bits": bits,
        "view": bits.T,
        "none": np.empty((0, 3), "f4"),
        "one": bits[0, 0],
    }
    torch_files.write_file(tmp_path / "w.pth", given)
    back = torch_files.read_file(tmp_path / "w.pth")
    assert list(back) == list(given)
    for name, array in given.items():
        assert back[name].shape == np.shape(array)
        assert back[name].read().tobytes() == np.ascontiguousarray(array).tobytes()
    assert [path.name for path in tmp_path.iterdir()] == ["w.pth"]


def _calls(program):
    """The operations of a pickle, with the memory of what was said before written out."""
    memo, before, calls = {}, None, []
    for operation, argument, _ in pickletools.genops(program):
        step = (operation.name, argument)
        if operation.name in ("BININT", "BININT1", "BININT2"):
            step = ("BININT", argument)
        if operation.name in ("BINPUT", "LONG_BINPUT"):
            memo[argument] = before
            continue
        if operation.name in ("BINGET", "LONG_BINGET"):
            step = memo[argument]
        calls.append(step)
        before = step
    return calls


def test_the_pickle_says_what_pytorchs_own_says(tmp_path, arrays):
    torch_files.write_file(tmp_path / "w.pth", arrays)
    with zipfile.ZipFile(tmp_path / "w.pth") as archive:
        ours = _calls(archive.read("archive/data.pkl"))
        offsets = [
            entry.header_offset + 30 + len(entry.filename) + len(entry.extra)
            for entry in archive.infolist()
        ]
    with zipfile.ZipFile(PUBLISHED) as archive:
        theirs = _calls(archive.read("micro_weights_only/data.pkl"))

    def spelt(calls):  # theirs also says the modules' versions, after the tensors, and lists of one
        return [
            call for call in calls if call[0] in ("GLOBAL", "BINUNICODE", "BININT", "BINPERSID")
        ]

    ours = spelt(ours)
    assert len(ours) > 1000
    assert ours == spelt(theirs)[: len(ours)]
    assert not any(offset % 64 for offset in offsets)


def test_pytorch_itself_reads_what_is_written(tmp_path, arrays):
    torch = pytest.importorskip("torch", reason="PyTorch is no requirement of this package")
    torch_files.write_file(tmp_path / "w.pth", arrays)
    state_dict = torch.load(tmp_path / "w.pth", weights_only=True)
    assert list(state_dict) == list(arrays)
    for name, array in arrays.items():
        assert state_dict[name].dtype == torch.float32
        np.testing.assert_array_equal(state_dict[name].numpy(), array)


class _Call:
    """Pickles as a call of something."""

    def __init__(self, function, *arguments):
        self._call = function, arguments

    def __reduce__(self):
        return self._call


def _hostile(trace):
    touch = f"touch {trace}"
    code = f"open({str(trace)!r}, 'w').close()"
    namespace = argparse.Namespace(output_dir=_Call(os.system, touch))
    return {
        "os.system": _Call(os.system, touch),
        "eval": {"model": _Call(builtins.eval, code)},
        "exec": collections.OrderedDict(a=_Call(builtins.exec, code)),
        "nested in the optimizer": {"model": {}, "optimizer": {"state": [_Call(os.system, touch)]}},
        "nested in args": {"model": {}, "args": namespace},
        "a key": {
            "model": {},
            "scaler": collections.OrderedDict([("x", _Call(os.mknod, str(trace)))]),
        },
        "getattr": _Call(getattr, collections.OrderedDict, "__init__"),
        "numpy": {"model": np.arange(3)},
    }


@pytest.mark.parametrize("name", _hostile("none"))
@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
def test_a_hostile_pickle_is_refused_and_never_run(tmp_path, name, protocol):
    trace = tmp_path / "trace"
    program = pickle.dumps(_hostile(trace)[name], protocol)
    if name not in ("getattr", "numpy"):
        pickle.loads(program)  # it is a weapon
        assert trace.exists()
        trace.unlink()
    path = _archive(tmp_path / "hostile.pth", program)
    _refusal(path, "is refused, since it holds more than weights, numbers and texts")
    bare = tmp_path / "bare.pth"
    bare.write_bytes(program)
    with pytest.raises(WeightsError):
        torch_files.read_file(bare)
    assert not trace.exists()


def _tensor(length, shape, strides, *, offset=0, storage="FloatStorage", key="0"):
    """A pickle of {"x": tensor} in PyTorch's words."""

    def number(value):
        return b"J" + struct.pack("<i", value)

    def text(value):
        return b"X" + struct.pack("<I", len(value)) + value.encode()

    def many(values):
        return b"(" + b"".join(map(number, values)) + b"t"

    return (
        b"\x80\x02}" + text("x") + b"ctorch._utils\n_rebuild_tensor_v2\n(("
        + text("storage") + f"ctorch\n{storage}\n".encode() + text(key) + text("cpu")
        + number(length) + b"tQ" + number(offset) + many(shape) + many(strides)
        + b"\x89ccollections\nOrderedDict\n)RtRs."
    )  # fmt: skip


_FOUR = np.arange(4, dtype="<f4").tobytes()


def test_strides_offsets_and_dtypes_are_pytorchs(tmp_path):
    path = _archive(tmp_path / "a", _tensor(4, (2, 1), (1, 2), offset=1), {"data/0": _FOUR})
    np.testing.assert_array_equal(torch_files.read_file(path)["x"].read(), [[1], [2]])
    path = _archive(tmp_path / "b", _tensor(4, (2, 2), (1, 2)), {"data/0": _FOUR})
    np.testing.assert_array_equal(torch_files.read_file(path)["x"].read(), [[0, 2], [1, 3]])
    big = {"data/0": np.arange(4, dtype=">f4").tobytes(), "byteorder": "big"}
    path = _archive(tmp_path / "c", _tensor(4, (4,), (1,)), big)
    np.testing.assert_array_equal(torch_files.read_file(path)["x"].read(), np.arange(4))
    half = {"data/0": np.array([0x3F80, 0xC000], "<u2").tobytes()}
    path = _archive(tmp_path / "d", _tensor(2, (2,), (1,), storage="BFloat16Storage"), half)
    np.testing.assert_array_equal(torch_files.read_file(path)["x"].read().astype("f4"), [1, -2])


@pytest.mark.parametrize(
    ("program", "word"),
    [
        (_tensor(2**30, (2**30,), (1,)), "it says that archive/data/0 has 4294967296 bytes"),
        (_tensor(4, (8,), (1,)), "reaches beyond its bytes"),
        (_tensor(4, (2**20, 2**20), (0, 0)), "reaches beyond its bytes"),
        (_tensor(4, (2,), (1,), offset=3), "reaches beyond its bytes"),
        (_tensor(4, (2,), (-1,), offset=3), "makes no sense"),
        (_tensor(4, (2, 2), (1,)), "makes no sense"),
        (_tensor(4, (4,), (1,), key="../../../etc/passwd"), "has none"),
        (_tensor(4, (4,), (1,), storage="UntypedStorage"), "torch.UntypedStorage"),
        (b"", "makes no sense"),
        (b"\x80\x02}", "makes no sense"),
        (b"\x80\x02.", "makes no sense"),
        (b"\x80\x02}q\x00X\xff\xff\xff\x7fa.", "makes no sense"),
        (b"\x80\x02r\xff\xff\xff\xff.", "makes no sense"),
        (b"\x80\x02ccollections\nOrderedDict\n}b.", "makes no sense"),
    ],
)  # fmt: skip
def test_a_pickle_that_lies_is_refused_before_memory_is_taken(tmp_path, program, word):
    path = _archive(tmp_path / "x.pth", program, {"data/0": _FOUR})
    tracemalloc.start()
    try:
        _refusal(path, word)
        assert tracemalloc.get_traced_memory()[1] < 2**22
    finally:
        tracemalloc.stop()


def test_a_key_whose_hash_never_ends_is_refused(tmp_path):
    program = b"\x80\x02}(" + b")" + b"q\x00h\x00\x86" * 60 + b"Nu."
    _refusal(_archive(tmp_path / "x.pth", program), "makes no sense")


def test_a_zip_bomb_is_refused(tmp_path):
    entries = {"data/0": bytes(2**24)}
    packed = _archive(
        tmp_path / "x.pth",
        _tensor(2**22, (2**22,), (1,)),
        entries,
        compression=zipfile.ZIP_DEFLATED,
    )
    assert packed.stat().st_size < 2**16
    _refusal(packed, "is compressed")
    _refusal(_archive(tmp_path / "y.pth", bytes(2**22 + 1)), "its pickle has 4194305 bytes")


def test_files_of_another_kind_are_refused(tmp_path):
    path = tmp_path / "x.pth"
    _refusal(path, "can't be read: No such file")
    _refusal(tmp_path, "can't be read: Is a directory")
    path.write_bytes(b"")
    _refusal(path, "is empty")
    path.write_bytes(b"not weights")
    _refusal(path, "is neither a model folder nor a PyTorch file")
    path.write_bytes(pickle.dumps(0x1950A86A20F9469CFC6C, 2))  # how a file of PyTorch 1.5 begins
    _refusal(path, "has PyTorch's format from before 1.6")
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("word/document.xml", "")
    _refusal(path, "not one that torch.save wrote")


@pytest.mark.parametrize("share", [0.01, 0.5, 0.999])
def test_a_cut_file_is_refused(tmp_path, share):
    content = PUBLISHED.read_bytes()
    path = tmp_path / "cut.pth"
    path.write_bytes(content[: int(share * len(content))])
    _refusal(path, "is damaged or cut short")


def test_a_flipped_bit_in_a_tensor_is_found_when_it_is_read(tmp_path, arrays):
    content = bytearray(PUBLISHED.read_bytes())
    largest = max(arrays.values(), key=np.size).tobytes()
    content[bytes(content).index(largest[:64]) + 100] ^= 4
    path = tmp_path / "flipped.pth"
    path.write_bytes(content)
    tensors = torch_files.read_file(path)
    (name,) = (name for name, array in arrays.items() if array.tobytes() == largest)
    with pytest.raises(WeightsError, match="is damaged: Bad CRC"):
        tensors[name].read()


def test_a_pickles_random_damage_never_ends_in_a_traceback():
    with zipfile.ZipFile(PUBLISHED) as archive:
        program = archive.read("micro_weights_only/data.pkl")
        entries = {
            name.partition("/")[2]: archive.read(name)
            for name in archive.namelist()
            if "/data/" in name
        }
    rng = np.random.default_rng(0)
    refused = 0
    for _ in range(150):
        damaged = bytearray(program)
        for place in rng.integers(len(program), size=3):
            damaged[place] = rng.integers(256)
        reader = torch_pickle.PickleReader(
            "x", "archive/", {f"archive/{n}": len(c) for n, c in entries.items()}, "<"
        )
        try:
            reader.run(bytes(damaged))
        except WeightsError:
            refused += 1
    assert refused > 50


def _lying_archive(path, program, stored, claimed):
    """A file whose zip directory says that an entry of `stored` has `claimed` bytes."""
    _archive(path, program, {"data/0": stored})
    content = bytearray(path.read_bytes())
    entry = content.rindex(b"PK\x01\x02", 0, content.rindex(b"archive/data/0"))
    content[entry + 24 : entry + 28] = struct.pack("<I", claimed)
    path.write_bytes(content)
    return path


def test_a_zip_directory_that_lies_about_a_size_never_leads_beyond_the_array(tmp_path):
    claimed = 2**20
    path = _lying_archive(
        tmp_path / "x.pth", _tensor(claimed // 4, (claimed // 4,), (1,)), _FOUR[:4], claimed
    )
    _refusal(path, "archive/data/0", "is damaged")


def test_what_was_read_is_measured_before_it_is_strided(tmp_path):
    """A file that is replaced between the two reads."""
    path = _archive(tmp_path / "x.pth", _tensor(4, (4,), (1,)), {"data/0": _FOUR})
    tensor = torch_files.read_file(path)["x"]
    _archive(path, _tensor(4, (4,), (1,)), {"data/0": _FOUR[:4]})
    with pytest.raises(WeightsError, match=r"is damaged: archive/data/0 has 4 bytes"):
        tensor.read()


def test_a_shape_that_grows_after_its_check_changes_nothing(tmp_path):
    """The list of the shape is in the memo, and grows behind the tensor that was made with it."""

    def text(value):
        return b"X" + struct.pack("<I", len(value)) + value.encode()

    program = (
        b"\x80\x02}" + text("a") + b"](K\x01K\x01eq\x00s" + text("b") + b"](K\x01K\x01eq\x01s"
        + text("x") + b"ctorch._utils\n_rebuild_tensor_v2\n(("
        + text("storage") + b"ctorch\nFloatStorage\n" + text("0") + text("cpu")
        + b"K\x04tQK\x00h\x00h\x01\x89}tRs"
        + text("c") + b"h\x00K\x7fas" + text("d") + b"h\x01K\x7fas."
    )  # fmt: skip
    path = _archive(tmp_path / "x.pth", program, {"data/0": _FOUR})
    content = torch_files.read_file(path)
    assert content["a"] == [1, 1, 127]
    assert content["x"].shape == (1, 1)
    np.testing.assert_array_equal(content["x"].read(), [[0]])


def _nested(levels=60):
    """A tuple of two references to the tuple before, and so on: its hash takes 2^60 steps."""
    return b")" + b"q\x00h\x00\x86" * levels


_TENSOR_HEAD = b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n(("


@pytest.mark.parametrize(
    ("program", "word"),
    [
        (b"\x80\x02cargparse\nNamespace\n)\x81" + _nested() + b"K\x00\x86\x85b.", "no sense"),
        (
            _TENSOR_HEAD + b"X\x07\x00\x00\x00storagectorch\nFloatStorage\n" + _nested()
            + b"X\x03\x00\x00\x00cpuK\x04tQ.",
            "no sense",
        ),
        (_tensor(4, (0, 2**31 - 1, 2**31 - 1, 2**31 - 1), (1, 1, 1, 1)), "no sense"),
        (_tensor(4, (1,) * 200, (1,) * 200), "no sense"),
        (_tensor(4, (1,) * 9, (1,) * 9), "no sense"),
        (_tensor(4, (4,), (1,), key="0" * 1000), "no sense"),
    ],
)  # fmt: skip
def test_what_pytorch_never_writes_makes_no_sense(tmp_path, program, word):
    path = _archive(tmp_path / "x.pth", program, {"data/0": _FOUR})
    started = time.process_time()
    _refusal(path, word)
    assert time.process_time() - started < 10  # what is nested takes hours to write out


def test_the_stride_of_an_axis_of_one_is_never_used(tmp_path):
    program = _tensor(4, (1, 4), (5, 1)).replace(
        b"J\x05\x00\x00\x00", b"\x8a\x08" + b"\xff" * 7 + b"\x7f"
    )
    path = _archive(tmp_path / "x.pth", program, {"data/0": _FOUR})
    np.testing.assert_array_equal(torch_files.read_file(path)["x"].read(), [[0, 1, 2, 3]])


@pytest.mark.parametrize("repeated", [b"ccollections\nOrderedDict\nh\x00\x85R", b"h\x01h\x02b"])
def test_work_that_a_short_program_repeats_is_bounded(tmp_path, repeated):
    """Each repetition of a few bytes copies a list or a dict of 20,000 elements."""
    keys = b"".join(b"M" + struct.pack("<H", i) + b"N\x86" for i in range(20_000))
    made = b"ccollections\nOrderedDict\nh\x00\x85Rq\x02scargparse"
    program = (
        (b"\x80\x02}K\x00](" + keys + b"eq\x00sK\x01" + made + b"\nNamespace\n)\x81q\x01s").replace(
            b"q\x02sc", b"q\x02sK\x02c"
        )
        + (b"K\x03" + repeated + b"s") * 2_000
        + b"."
    )
    path = _archive(tmp_path / "x.pth", program)
    started = time.process_time()
    with pytest.raises(WeightsError):
        torch_files.read_file(path)
    assert time.process_time() - started < 2


def _patched(path, old, new):
    content = path.read_bytes()
    assert old in content
    path.write_bytes(content.replace(old, new))
    return path


def test_a_directory_that_points_nowhere_is_a_sentence(tmp_path):
    good = {"data/0": _FOUR}
    path = _archive(tmp_path / "a.pth", _tensor(4, (4,), (1,)), good)
    end = path.stat().st_size
    content = bytearray(path.read_bytes())
    entry = content.rindex(b"PK\x01\x02")
    content[entry + 42 : entry + 46] = struct.pack("<I", end - 40)  # where its data is said to be
    path.write_bytes(content)
    tensors = torch_files.read_file(path)
    with pytest.raises(WeightsError, match="is damaged"):
        tensors["x"].read()
    with zipfile.ZipFile(tmp_path / "b.pth", "w") as archive:
        archive.writestr("archive/data.pkl", _tensor(4, (4,), (1,)))
        archive.writestr("archive/data/é", _FOUR)
    _refusal(_patched(tmp_path / "b.pth", "é".encode(), b"\xff\xfe"), "is damaged or cut short")


def test_a_directory_beyond_measure_is_not_read(tmp_path):
    path = tmp_path / "x.pth"
    size = 2**33
    with path.open("wb") as file:  # a hole: takes no space
        file.write(b"PK\x03\x04")
        file.seek(size)
        # zip64's end of the directory, its locator, and the end
        file.write(struct.pack("<4sQHHIIQQQQ", b"PK\x06\x06", 44, 45, 45, 0, 0, 1, 1, size, 0))
        file.write(struct.pack("<4sIQI", b"PK\x06\x07", 0, size, 1))
        file.write(struct.pack("<4sHHHHIIH", b"PK\x05\x06", *[0xFFFF] * 4, *[2**32 - 1] * 2, 0))
    tracemalloc.start()
    try:
        _refusal(path, "is damaged or cut short")
        assert tracemalloc.get_traced_memory()[1] < 2**23
    finally:
        tracemalloc.stop()


def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "x.pth")
    (tmp_path / "link.pth").symlink_to("x.pth")
    _refusal(tmp_path / "x.pth", "it is a pipe and not a regular file")
    _refusal(tmp_path / "link.pth", "it is a pipe and not a regular file")


def test_the_view_of_a_large_storage_does_not_keep_it(tmp_path):
    entries = {"data/0": bytes(4 * 2**18)}
    path = _archive(tmp_path / "x.pth", _tensor(2**18, (4,), (1,)), entries)
    assert torch_files.read_file(path)["x"].read().base is None
