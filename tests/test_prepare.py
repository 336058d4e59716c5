"""Preparing data sets: miniature archives of the real layout, real kills, real limits."""

import gzip
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import PIL.Image
import pytest

from tests import fork_server
from vvt_jax import prepare as prepare_lib
from vvt_jax.data.builders import fashion_mnist
from vvt_jax.data.examples import DataError
from vvt_jax.data.sources import open_source
from vvt_jax.prepare import prepare

_CLASSES = ("n01440764", "n01443537", "n15075141")  # labels 0, 1 and 999


def _image(seed, side=8, kind="JPEG"):
    file = io.BytesIO()
    noise = np.random.default_rng(seed).integers(256, size=(side, side, 3), dtype=np.uint8)
    PIL.Image.fromarray(noise).save(file, kind)
    return file.getvalue()


def _tar(files):
    """A tar archive of `{name: content}`, as ImageNet's are: without compression."""
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w") as archive:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return content.getvalue()


@pytest.fixture(scope="module")
def archives(tmp_path_factory):
    """ImageNet with 4 training images in each of three classes, and 3 validation images."""
    folder = tmp_path_factory.mktemp("archives")
    train = {
        f"{name}.tar": _tar({f"{name}_{i}.JPEG": _image(10 * c + i) for i in (3, 1, 2, 0)})
        for c, name in enumerate(_CLASSES)
    }
    (folder / "ILSVRC2012_img_train.tar").write_bytes(_tar(train))
    validation = {f"ILSVRC2012_val_{i:08}.JPEG": _image(100 + i) for i in (2, 1, 50000)}
    (folder / "ILSVRC2012_img_val.tar").write_bytes(_tar(validation))
    return folder


def _contents(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def _decoded(content):
    with PIL.Image.open(io.BytesIO(content)) as image:
        return np.asarray(image.convert("RGB"))


def test_imagenet_from_its_archives(archives, tmp_path):
    folder = prepare("imagenet2012", data_dir=str(tmp_path), manual_dir=str(archives))
    assert folder == tmp_path / "imagenet2012" / "5.1.0"
    train = open_source("tfds:imagenet2012", "train", data_dir=str(tmp_path))
    assert len(train.class_names) == 1000
    assert train.class_names[999] == "toilet tissue"
    assert [train.examples[i]["label"] for i in range(12)] == [0] * 4 + [1] * 4 + [999] * 4
    for i in range(12):
        np.testing.assert_array_equal(
            np.asarray(train.examples[i]["image"]), _decoded(_image(10 * (i // 4) + i % 4))
        )
    validation = open_source("tfds:imagenet2012", "validation", data_dir=str(tmp_path))
    # By the first, second and last line of the 50,000 labels
    names = [validation.class_names[validation.examples[i]["label"]] for i in range(3)]
    assert names == ["sea snake", "alp", "llama"]
    np.testing.assert_array_equal(
        np.asarray(validation.examples[2]["image"]), _decoded(_image(50100))
    )
    before = _contents(folder)
    assert prepare("imagenet2012", data_dir=str(tmp_path), manual_dir=str(archives)) == folder
    assert _contents(folder) == before


def test_only_what_is_there_is_made(archives, tmp_path):
    shutil.copy(archives / "ILSVRC2012_img_val.tar", tmp_path)
    prepare("imagenet2012", data_dir=str(tmp_path / "data"), manual_dir=str(tmp_path))
    with pytest.raises(DataError, match="has no split 'train': it has validation"):
        open_source("tfds:imagenet2012", "train", data_dir=str(tmp_path / "data"))


_KILLED = """
    import sys, time
    from vvt_jax import prepare

    prepare._SHARD_BYTES = 1000  # many files
    write = prepare._write_shard

    def slowly(*arguments):
        write(*arguments)
        print("a shard", flush=True)
        time.sleep(0.05)

    prepare._write_shard = slowly
    prepare.prepare("imagenet2012", data_dir=sys.argv[1], manual_dir=sys.argv[2])
"""


def _start(code, *arguments, **options):
    code = "\n".join(line[4:] for line in code.splitlines())
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


def test_killed_and_started_again_ends_in_the_same_bytes(archives, tmp_path, monkeypatch):
    monkeypatch.setattr(prepare_lib, "_SHARD_BYTES", 1000)
    straight = prepare("imagenet2012", data_dir=str(tmp_path / "a"), manual_dir=str(archives))
    shards = [name for name in _contents(straight) if "array_record" in name]
    assert len(shards) > 4
    for after in (1, 3):
        with _start(_KILLED, tmp_path / "b", archives) as process:
            for _ in range(after):
                assert process.stdout.readline() == "a shard\n"
            process.send_signal(signal.SIGKILL)
    growing = tmp_path / "b" / "imagenet2012" / "5.1.0.incomplete"
    kept = {
        path.name: path.stat().st_mtime_ns for path in growing.glob("*array_record-?????-of-?????")
    }
    assert len(kept) >= 4
    with pytest.raises(DataError, match="was not found"):
        open_source("tfds:imagenet2012", "train", data_dir=str(tmp_path / "b"))
    resumed = prepare("imagenet2012", data_dir=str(tmp_path / "b"), manual_dir=str(archives))
    assert _contents(resumed) == _contents(straight)
    for name, written in kept.items():
        assert (resumed / name).stat().st_mtime_ns == written
    assert not growing.exists()


def test_a_full_disk_is_told_and_the_same_command_goes_on(archives, tmp_path):
    """A limit on the size of files, which fails writes as a full disk does."""
    command = [sys.executable, "-m", "vvt_jax.prepare", "imagenet2012"]
    command += [f"--data_dir={tmp_path}", f"--manual_dir={archives}"]

    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}
    limited = ["prlimit", "--fsize=2000", *command]  # the signal of it is ignored by Python
    done = subprocess.run(limited, capture_output=True, text=True, env=environment)
    assert done.returncode == 1, done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("error: ")
    assert "can't be written" in last
    assert not (tmp_path / "imagenet2012" / "5.1.0").exists()
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (
        0,
        f"imagenet2012 is ready in {tmp_path}/imagenet2012/5.1.0.\n",
    )
    assert len(open_source("tfds:imagenet2012", "train", data_dir=str(tmp_path)).examples) == 12


def test_too_little_space_is_refused_before_anything_is_written(archives, tmp_path):
    with pytest.raises(
        DataError, match=r"needs \d+\.\d\d GB, but \d+\.\d\d GB are free: make room"
    ):
        prepare_lib._check_space(tmp_path, 10**18)


@pytest.fixture(scope="module")
def small_fashion(tmp_path_factory):
    """Fashion-MNIST's four files, with 5 and 3 images."""
    folder = tmp_path_factory.mktemp("fashion")
    rng = np.random.default_rng(0)
    for (images, labels), count in zip(fashion_mnist.FILES.values(), (5, 3), strict=True):
        _write_idx(folder / images, rng.integers(256, size=(count, 28, 28)))
        _write_idx(folder / labels, np.arange(count))
    return folder


def _write_idx(path, array, magic=b"\x00\x00\x08", pack=True):
    header = magic + bytes([array.ndim]) + np.array(array.shape, ">u4").tobytes()
    content = header + array.astype(np.uint8).tobytes()
    if pack:
        path.with_name(f"{path.name}.gz").write_bytes(gzip.compress(content))
    else:
        path.write_bytes(content)


def test_labels_of_another_data_set_are_refused(small_fashion, tmp_path):
    shutil.copytree(small_fashion, tmp_path / "files")
    name = fashion_mnist.FILES["train"][1]
    _write_idx(tmp_path / "files" / name, np.array([0, 1, 2, 3, 10]))
    with pytest.raises(DataError, match="are not Fashion-MNIST's"):
        prepare(
            "fashion_mnist", data_dir=str(tmp_path / "data"), manual_dir=str(tmp_path / "files")
        )


def test_fashion_mnist_from_its_files(small_fashion, tmp_path):
    folder = prepare("fashion_mnist", data_dir=str(tmp_path), manual_dir=str(small_fashion))
    assert folder == tmp_path / "fashion_mnist" / "1.0.0"
    source = open_source("tfds:fashion_mnist", "train", data_dir=str(tmp_path))
    assert source.class_names == fashion_mnist.CLASS_NAMES
    images = np.random.default_rng(0).integers(256, size=(5, 28, 28))
    for i in range(5):
        assert source.examples[i]["label"] == i
        np.testing.assert_array_equal(np.asarray(source.examples[i]["image"])[..., 1], images[i])
    assert len(open_source("tfds:fashion_mnist", "test", data_dir=str(tmp_path)).examples) == 3
    assert prepare("fashion_mnist", data_dir=str(tmp_path), manual_dir=str(small_fashion)) == folder


@pytest.mark.skipif(not fashion_mnist.PACKAGED.exists(), reason="needs dataset-fashion-mnist")
@pytest.mark.slow
def test_fashion_mnist_of_the_package(tmp_path):
    prepare("fashion_mnist", data_dir=str(tmp_path))
    for split, count in (("train", 60_000), ("test", 10_000)):
        source = open_source("tfds:fashion_mnist", split, data_dir=str(tmp_path))
        assert len(source.examples) == count


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        ("missing", "has neither train-images-idx3-ubyte.gz nor train-images-idx3-ubyte: install"),
        ("no gzip", "train-images-idx3-ubyte.gz can't be read: "),
        ("cut gzip", "train-images-idx3-ubyte.gz can't be read: "),
        ("other magic", "train-images-idx3-ubyte is no idx file of bytes."),
        ("cut header", "train-images-idx3-ubyte is no idx file of bytes."),
        ("cut data", "train-images-idx3-ubyte has 3915 elements where its header says 3920."),
        ("other shape", "The train files in"),
    ],
)
def test_damaged_fashion_mnist_is_refused(small_fashion, tmp_path, damage, words):
    given = tmp_path / "given"
    shutil.copytree(small_fashion, given)
    path = given / "train-images-idx3-ubyte"
    packed = given / f"{path.name}.gz"
    content = packed.read_bytes()
    packed.unlink()
    plain = gzip.decompress(content)
    if damage == "no gzip":
        packed.write_bytes(b"text")
    elif damage == "cut gzip":
        packed.write_bytes(content[: len(content) // 2])
    elif damage == "other magic":
        path.write_bytes(b"\x00\x00\x0d" + plain[3:])
    elif damage == "cut header":
        path.write_bytes(plain[:9])
    elif damage == "cut data":
        path.write_bytes(plain[:-5])
    elif damage == "other shape":
        _write_idx(path, np.zeros((5, 28, 27)), pack=False)
    with pytest.raises(DataError) as refused:
        prepare("fashion_mnist", data_dir=str(tmp_path / "data"), manual_dir=str(given))
    assert words in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.fixture(scope="module")
def tfrecord_copy(small_fashion, tmp_path_factory, write_tfrecord):
    """The small Fashion-MNIST in TFRecord."""
    from array_record.python.array_record_module import ArrayRecordReader

    root = tmp_path_factory.mktemp("copy")
    folder = prepare("fashion_mnist", data_dir=str(root), manual_dir=str(small_fashion))
    for path in list(folder.glob("*.array_record*")):
        reader = ArrayRecordReader(str(path))
        write_tfrecord(folder / path.name.replace("array_record", "tfrecord"), reader.read_all())
        reader.close()
        path.unlink()
    info = json.loads((folder / "dataset_info.json").read_text())
    (folder / "dataset_info.json").write_text(json.dumps({**info, "fileFormat": "tfrecord"}))
    return root


def test_from_a_tfrecord_copy(tfrecord_copy, tmp_path):
    folder = prepare("fashion_mnist", data_dir=str(tmp_path), from_tfrecord=str(tfrecord_copy))
    info = json.loads((folder / "dataset_info.json").read_text())
    assert info["fileFormat"] == "array_record"
    for split in ("train", "test"):
        ours, theirs = (
            open_source("tfds:fashion_mnist", split, data_dir=str(root))
            for root in (tmp_path, tfrecord_copy)
        )
        assert ours.class_names == theirs.class_names
        assert len(ours.examples) == len(theirs.examples)
        for i in range(len(ours.examples)):
            a, b = ours.examples[i], theirs.examples[i]
            assert a["label"] == b["label"]
            np.testing.assert_array_equal(np.asarray(a["image"]), np.asarray(b["image"]))
    assert prepare("fashion_mnist", data_dir=str(tmp_path), from_tfrecord=str(tfrecord_copy))


def test_a_damaged_copy_is_named(tfrecord_copy, tmp_path):
    shutil.copytree(tfrecord_copy, tmp_path / "copy")
    (path,) = (tmp_path / "copy").rglob("*-train.tfrecord*")
    content = bytearray(path.read_bytes())
    content[30] ^= 1
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"is damaged: its record at byte 0 is corrupt"):
        prepare("fashion_mnist", data_dir=str(tmp_path), from_tfrecord=str(tmp_path / "copy"))
    assert not (tmp_path / "fashion_mnist" / "1.0.0").exists()


def _refused(*arguments):
    done = fork_server.run(["-m", "vvt_jax.prepare", *arguments])
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr
    return done.stderr.strip().splitlines()[-1]


def test_other_refusals(archives, tfrecord_copy, tmp_path):
    data = f"--data_dir={tmp_path / 'data'}"
    assert "imagenet2012 needs --manual_dir" in _refused("imagenet2012", data)
    cases = [
        (("mnist", data), "There is nothing to make mnist of: give --from_tfrecord"),
        (("imagenet2012", data, f"--manual_dir={tmp_path}"), "has neither ILSVRC2012_img_train"),
        (("mnist", data, f"--from_tfrecord={tmp_path}"), "The data set 'mnist' was not found in"),
        (
            ("fashion_mnist", f"--data_dir={tfrecord_copy}", f"--from_tfrecord={tfrecord_copy}"),
            "is the copy itself: give another --data_dir.",
        ),
    ]
    for arguments, words in cases:
        with pytest.raises(DataError) as refused:
            _in_process(arguments)
        assert words in str(refused.value)


def _in_process(arguments):
    name, *flags = arguments
    prepare(name, **dict(flag.removeprefix("--").split("=", 1) for flag in flags))


@pytest.mark.parametrize("damage", ["no tar", "cut", "cut inside", "other names"])
def test_damaged_archives_are_refused(archives, tmp_path, damage):
    name = "ILSVRC2012_img_train.tar"
    content = (archives / name).read_bytes()
    if damage == "no tar":
        content = b"<html>404</html>" * 100
    elif damage == "cut":
        content = content[: len(content) // 2]
    elif damage == "cut inside":
        content = _tar({f"{_CLASSES[0]}.tar": _tar({"a.JPEG": _image(0, 64)})[:2000]})
    else:
        content = _tar({"readme.txt": b"hello"})
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=name):
        prepare("imagenet2012", data_dir=str(tmp_path / "data"), manual_dir=str(tmp_path))
    assert not Path(tmp_path / "data" / "imagenet2012" / "5.1.0").exists()
