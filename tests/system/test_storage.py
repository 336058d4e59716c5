"""Object stores, by a real server on this machine: what is written, read, resumed and refused."""

import contextlib
import os
import signal
import socket
import sys
import time

import jax
import numpy as np
import PIL.Image
import pytest
from etils import epath

import vvt_jax
from vvt_jax.data.examples import BrokenImageError, DataError
from vvt_jax.data.sources import open_source
from vvt_jax.data.sources.tfrecord import TFRecords
from vvt_jax.system import storage
from vvt_jax.system.storage import StorageError
from vvt_jax.training.checkpoint import CheckpointError, check_folder
from vvt_jax.training.reporting import Reporter
from vvt_jax.weights.checks import WeightsError

_SHORT = "--config.total_steps=12"


@pytest.fixture(params=["folder", "gs://"])
def place(request, tmp_path):
    """A folder that is not there yet, on this machine and in an object store."""
    if request.param == "folder":
        return storage.locate(tmp_path / "place")
    address = request.getfixturevalue("object_store")
    return storage.locate(f"{address}/{request.node.name.partition('[')[0]}")


def test_files_are_replaced_and_listed(place):
    for content in (b"old and long", b"new"):
        storage.replace(place / "a" / "file", content)
        assert storage.read_bytes(place / "a" / "file") == content
    storage.replace(place / "other", b"0123456789")
    assert storage.list_folder(place) == (["a"], ["other"])
    assert storage.list_folder(place / "a") == ([], ["file"])  # nothing temporary is left
    assert storage.read_range(place / "other", 3, 6) == b"345"
    with storage.open_to_skim(place / "other") as file:
        assert file.seek(0, 2) == 10
        file.seek(8)
        assert file.read(5) == b"89"


def test_what_is_missing_has_a_reason(place):
    for read in (storage.read_bytes, storage.list_folder, lambda p: storage.fingerprints([str(p)])):
        with pytest.raises(OSError, match="No such file") as caught:
            read(place / "nothing")
        assert caught.value.strerror == "No such file or directory"


@pytest.mark.parametrize("kind", ["pipe", "socket", "device", "folder", "link to a pipe"])
def test_only_regular_files_are_opened_and_nothing_is_waited_for(tmp_path, kind):
    path = tmp_path / "file"
    reasons = {
        "pipe": "it is a pipe and not a regular file",
        "link to a pipe": "it is a pipe and not a regular file",
        "device": "it is a device and not a regular file",
        "folder": "Is a directory",
        "socket": "No such device or address",
    }
    with contextlib.ExitStack() as stack:
        if kind == "folder":
            path.mkdir()
        elif kind == "device":
            path.symlink_to("/dev/zero")
        elif kind == "socket":
            stack.enter_context(socket.socket(socket.AF_UNIX)).bind(str(path))
        else:
            os.mkfifo(path)
        if kind.startswith("link"):
            (tmp_path / "link").symlink_to(path)
            path = tmp_path / "link"
        for read in (
            lambda p: storage.open_file(p, None),
            storage.read_bytes,
            lambda p: storage.read_range(p, 0, 1),
            lambda p: storage.open_to_skim(p).__enter__(),
        ):
            with pytest.raises(OSError) as caught:  # noqa: PT011
                read(path)
            assert caught.value.strerror == reasons[kind]
            assert caught.value.filename == str(path)


def test_what_is_larger_than_its_kind_allows_is_not_read(tmp_path):
    with (tmp_path / "file").open("wb") as file:
        file.truncate(2**40)  # a hole: takes no space
    for limit in storage.SizeLimit:
        with pytest.raises(OSError, match=rf"has 1099511627776 bytes, .* at most {limit}"):
            storage.read_bytes(tmp_path / "file", limit)
    (tmp_path / "file").write_bytes(b"1234")
    assert storage.read_bytes(tmp_path / "file", 4) == b"1234"
    with pytest.raises(OSError, match="has 4 bytes"):
        storage.read_bytes(tmp_path / "file", 3)


def test_fingerprints_change_with_the_file(place):
    path = place / "file"
    storage.replace(path, b"one")
    before = storage.fingerprints([str(path)])
    assert storage.fingerprints([str(path)]) == before
    storage.replace(path, b"two")
    assert storage.fingerprints([str(path)]) != before


def test_a_journal_keeps_what_it_is_given_and_grows(place):
    path = place / "lines"
    journal = storage.open_journal(path, [])
    assert storage.read_bytes(path) == b""
    journal.add("one")
    journal.flush()
    assert storage.read_bytes(path) == b"one\n"
    journal.add("two")
    journal.close()
    assert storage.read_bytes(path) == b"one\ntwo\n"
    storage.open_journal(path, ["one"]).close()
    assert storage.read_bytes(path) == b"one\n"


def test_no_step_twice_after_a_resume(place):
    with Reporter(place, start_step=0, total_steps=8) as reporter:
        for step in (2, 4, 6):
            reporter.write(step, {"train/grad_norm": step / 2})
        reporter.flush()
    with Reporter(place, start_step=4, total_steps=8) as reporter:
        assert reporter.last_line() == {"train/grad_norm": 2.0}
        reporter.write(6, {"train/grad_norm": 9.0})
    text = storage.read_bytes(place / "metrics.jsonl").decode()
    assert text.splitlines() == [
        '{"step": 2, "train/grad_norm": 1.0}',
        '{"step": 4, "train/grad_norm": 2.0}',
        '{"step": 6, "train/grad_norm": 9.0}',
    ]


def test_local_folders_end_up_where_they_should(place):
    with storage.local_folder(place / "trace") as folder:
        (folder / "plugins").mkdir(parents=True)
        (folder / "plugins" / "trace.json").write_bytes(b"{}")
    assert storage.read_bytes(place / "trace" / "plugins" / "trace.json") == b"{}"


def test_a_model_folder_comes_back(object_store):
    model = vvt_jax.create_model("vvt_nano", num_classes=3, depths=(1, 1, 1, 1))
    shapes = jax.eval_shape(model.init, jax.random.key(0), np.zeros((1, 32, 32, 3)))
    rng = np.random.default_rng(0)
    variables = jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32), shapes)
    card = {"class_names": ["a", "b", "c"]}
    folder = f"{object_store}/model"
    vvt_jax.save_pretrained(folder, model, variables, card)
    loaded, found, found_card = vvt_jax.load_pretrained(folder)
    assert (loaded, found_card) == (model, card)
    jax.tree.map(np.testing.assert_array_equal, found, variables)
    with pytest.raises(WeightsError, match=r"gs://bucket/no is not a model folder: .*No such file"):
        vvt_jax.load_pretrained(f"{object_store}/no")


def test_tfrecord_files_are_read_in_ranges(object_store, write_tfrecord, tmp_path):
    records = [bytes([i]) * (10 + i) for i in range(9)]
    folder, cache = epath.Path(object_store) / "records", epath.Path(object_store) / "offsets"
    for number in range(3):
        write_tfrecord(tmp_path / "file", records[3 * number : 3 * number + 3])
        storage.replace(folder / f"{number}", (tmp_path / "file").read_bytes())
    parts = [(str(folder / f"{number}"), 0, 3, 3) for number in range(3)]
    assert list(TFRecords(parts, cache)) == records
    (kept,) = storage.list_folder(cache)[1]
    assert list(TFRecords(parts, cache)) == records
    assert storage.list_folder(cache)[1] == [kept]
    storage.replace(folder / "1", storage.read_bytes(folder / "1")[:-5])
    with pytest.raises(DataError, match=r"gs://bucket/records/1 is truncated: its record at byte"):
        TFRecords(parts, cache)


def test_images_in_folders_are_read(object_store, tmp_path):
    root = epath.Path(object_store) / "images"
    for index, name in enumerate(("cat", "dog")):
        PIL.Image.new("RGB", (40, 30), (index, 2, 3)).save(tmp_path / "image.png")
        storage.replace(root / name / "one.png", (tmp_path / "image.png").read_bytes())
    storage.replace(root / "dog" / "two.jpg", b"no image")
    source = open_source("folder", "train", data_dir=str(root))
    assert source.class_names == ("cat", "dog")
    assert source.examples[1]["image"].getpixel((0, 0)) == (1, 2, 3)
    with pytest.raises(BrokenImageError, match=r"gs://bucket/images/dog/two\.jpg can't be decoded"):
        source.examples[2]


def test_a_missing_package_and_other_addresses_are_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "gcsfs", None)  # import finds nothing
    with pytest.raises(StorageError, match=r"needs gcsfs: pip install 'vvt_jax\[gcs\]'"):
        storage.locate("gs://bucket/run")
    with pytest.raises(StorageError, match="hdfs://host/run is not known here: use a folder, or"):
        storage.locate("hdfs://host/run")
    with pytest.raises(StorageError, match="lost a slash to pathlib: give gs://"):
        storage.locate("gs:/bucket/run")
    with pytest.raises(CheckpointError, match="s3://bucket/run can't hold checkpoints"):
        check_folder(epath.Path("s3://bucket/run"))


def _wait_for_step(process, workdir, step):
    deadline = time.monotonic() + 600
    while time.monotonic() < deadline:
        assert process.poll() is None, process.communicate()
        try:
            if f'"step": {step}' in storage.read_bytes(workdir / "metrics.jsonl").decode():
                return
        except OSError:  # not there yet, or replaced while it is read
            pass
        time.sleep(0.1)
    raise TimeoutError(f"step {step} was never reported")


@pytest.mark.slow
def test_killed_and_resumed_in_an_object_store_equals_straight(
    object_store, run, tmp_path, read_metrics
):
    assert run(tmp_path, _SHORT).returncode == 0
    workdir = epath.Path(object_store) / "run"
    for step, how in ((4, signal.SIGKILL), (8, signal.SIGTERM)):
        process = run.start(workdir, _SHORT)
        _wait_for_step(process, workdir, step)
        process.send_signal(how)
        _, told = process.communicate(timeout=300)
        assert "Traceback" not in told
    done = run(workdir, _SHORT)
    assert done.returncode == 0, done.stderr
    assert "Resumed at step" in done.stdout

    assert read_metrics(workdir) == read_metrics(tmp_path)
    for name in ("config.json", "model/config.json", "model/model.safetensors"):
        assert storage.read_bytes(workdir / name) == (tmp_path / name).read_bytes()

    measured = run(workdir, _SHORT, "--config.mode=eval")
    assert measured.returncode == 0, measured.stderr
    assert "test_per_class.csv" in storage.list_folder(workdir / "evaluation")[1]
    tuned = run(tmp_path / "tuned", "--config.total_steps=1", f"--config.init_from={workdir}")
    assert tuned.returncode == 0, tuned.stderr
    assert f"Starts from {workdir}." in tuned.stdout
