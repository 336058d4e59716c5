"""A pipe in place of each file that the program is given: it would be waited for, for ever.

Images, masks, class names, model folders and .pth files have this test beside their others.
"""

import os

import pytest

from configs import digits
from vvt_jax import predict
from vvt_jax.data.sources import tfrecord
from vvt_jax.system.errors import UserError
from vvt_jax.training import configuration, reporting
from vvt_jax.training.checksums import SUMS, DamagedError, verify_sums


def _settle(folder):
    configuration.settle(digits.get_config(), folder)


def _last_line(folder):
    reporting.SilentReporter(folder, start_step=0, total_steps=1).last_line()


def _read_idx(folder):
    from vvt_jax.data.builders import fashion_mnist

    fashion_mnist.read_idx(folder, "images")


def _class_names(folder):
    from vvt_jax.data.builders import ade20k

    ade20k.class_names(ade20k.Files(folder))


def _open_archives(folder):
    from vvt_jax.data.builders import ilsvrc2012

    ilsvrc2012.open_archives(folder)


@pytest.mark.parametrize(
    ("name", "read"),
    [
        ("config.json", _settle),
        ("metrics.jsonl", _last_line),
        ("labels.txt", lambda folder: predict.read_labels(folder / "labels.txt")),
        ("file.tfrecord", lambda folder: tfrecord.read_offsets(folder / "file.tfrecord")),
        ("file.tfrecord", lambda folder: tfrecord.read_record(folder / "file.tfrecord", 0, 20)),
        ("images", _read_idx),
        ("images.gz", _read_idx),
        ("objectInfo150.txt", _class_names),
        ("ADEChallengeData2016.zip", _class_names),
        ("ILSVRC2012_img_train.tar", _open_archives),
    ],
)
def test_a_pipe_is_named_and_not_waited_for(tmp_path, name, read):
    os.mkfifo(tmp_path / name)
    with pytest.raises(UserError) as refused:
        read(tmp_path)
    assert name in str(refused.value)
    if name != "objectInfo150.txt":
        assert "pipe" in str(refused.value)


def test_a_pipe_among_a_checkpoints_files_is_damage(tmp_path):
    os.mkfifo(tmp_path / SUMS)
    with pytest.raises(DamagedError):
        verify_sums(tmp_path)
    (tmp_path / SUMS).unlink()
    (tmp_path / SUMS).write_text(f"{'0' * 64}  file\n")
    os.mkfifo(tmp_path / "file")
    with pytest.raises(DamagedError):
        verify_sums(tmp_path)


def test_damaged_lines_of_metrics_are_left_out(tmp_path):
    sound = '{"step": 1, "a": 2}'
    (tmp_path / "metrics.jsonl").write_bytes(
        f'{sound}\n[]\n{{"step": "x"}}\n{{"b": 1}}\n'.encode() + b'\xff\xfe\n{"step": 2}\n{"st'
    )
    reporter = reporting.SilentReporter(tmp_path, start_step=0, total_steps=1)
    assert reporter._lines_until(1) == [sound]
