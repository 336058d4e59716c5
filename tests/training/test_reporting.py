"""What is written while a run goes on, and what is left of it when one is resumed."""

import json
import subprocess
import sys
import textwrap

import pytest

from vvt_jax.training.reporting import Reporter, describe

_TRAINING = {"train/loss": 0.5, "train/learning_rate": 1e-3, "train/images_per_second": 9.0}
_EVALUATION = {"eval/loss": 0.1034, "eval/top1": 35 / 36, "eval/top5": 1.0, "eval/examples": 144}


def _lines(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def _report(workdir, *steps, start_step=0):
    with Reporter(workdir, start_step=start_step, total_steps=10) as reporter:
        for step in steps:
            reporter.write(step, {"train/loss": step / 8, **_TRAINING})


def test_one_object_a_line_in_order(tmp_path):
    with Reporter(tmp_path, start_step=0, total_steps=4) as reporter:
        reporter.write(2, _TRAINING)
        reporter.write(3, {})
        reporter.write(4, {**_TRAINING, **_EVALUATION})
        # on disk already
        assert _lines(tmp_path) == [
            {"step": 2, **_TRAINING},
            {"step": 4, **_TRAINING, **_EVALUATION},
        ]
        assert reporter.last_line() == {**_TRAINING, **_EVALUATION}


def test_last_line_of_a_new_run_is_empty(tmp_path):
    with Reporter(tmp_path, start_step=0, total_steps=4) as reporter:
        assert reporter.last_line() == {}


@pytest.mark.parametrize(("start_step", "kept"), [(0, []), (3, [2]), (4, [2, 4]), (9, [2, 4, 6])])
def test_lines_after_the_resumed_step_are_cut(tmp_path, start_step, kept):
    _report(tmp_path, 2, 4, 6)
    before = (tmp_path / "metrics.jsonl").read_text().splitlines(keepends=True)
    _report(tmp_path, start_step=start_step)
    assert (tmp_path / "metrics.jsonl").read_text() == "".join(before[: len(kept)])
    _report(tmp_path, 10, start_step=start_step)
    assert [line["step"] for line in _lines(tmp_path)] == [*kept, 10]


@pytest.mark.parametrize("torn", ['{"step": 6, "train/lo', "{", '{"step": 6', "\0\0\0\0"])
def test_a_torn_last_line_is_dropped(tmp_path, torn):
    _report(tmp_path, 2, 4)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write(torn)
    _report(tmp_path, 8, start_step=6)
    assert [line["step"] for line in _lines(tmp_path)] == [2, 4, 8]


def test_a_whole_last_line_without_its_end_is_kept(tmp_path):
    _report(tmp_path, 2, 4)
    path = tmp_path / "metrics.jsonl"
    path.write_text(path.read_text().rstrip("\n"))
    _report(tmp_path, 8, start_step=6)
    assert [line["step"] for line in _lines(tmp_path)] == [2, 4, 8]


def test_progress_and_evaluations_are_shown(tmp_path, capsys):
    with Reporter(tmp_path, start_step=3, total_steps=10) as reporter:
        reporter.advance()
        reporter.say("Resumed.")
        reporter.write(4, {**_TRAINING, **_EVALUATION})
    out, err = capsys.readouterr()
    assert "Resumed.\n" in out
    assert "step 4: eval top-1 97.22 %, top-5 100.00 %, loss 0.1034 (144 images)\n" in out
    assert "4/10" in err
    assert "loss 0.500, lr 1.00e-03, 9 images/s" in err


def test_describe():
    metrics = {f"test_{name}": value for name, value in _EVALUATION.items()}
    assert describe("test_eval", metrics) == (
        "test_eval top-1 97.22 %, top-5 100.00 %, loss 0.1034 (144 images)"
    )


def _tensorboard(workdir):
    """The events in a workdir's TensorBoard files."""
    from tensorboardX.proto import event_pb2

    for path in sorted(workdir.glob("events.out.tfevents*")):
        content = path.read_bytes()
        while content:  # length, its checksum, record, its checksum
            length = int.from_bytes(content[:8], "little")
            yield event_pb2.Event.FromString(content[12 : 12 + length])
            content = content[12 + length + 4 :]


def test_tensorboard_has_the_same_numbers(tmp_path):
    pytest.importorskip("tensorboardX")
    with Reporter(tmp_path, start_step=0, total_steps=10) as reporter:
        reporter.write(2, _TRAINING)
        reporter.write(4, {**_TRAINING, **_EVALUATION})
    expected = [(name, 2, value) for name, value in _TRAINING.items()]
    expected += [(name, 4, value) for name, value in {**_TRAINING, **_EVALUATION}.items()]
    found = [
        (v.tag, e.step, v.simple_value) for e in _tensorboard(tmp_path) for v in e.summary.value
    ]
    assert [(tag, step, pytest.approx(value)) for tag, step, value in found] == expected


def test_tensorboard_forgets_the_steps_after_the_resumed_one(tmp_path):
    pytest.importorskip("tensorboardX")
    from tensorboardX.proto.event_pb2 import SessionLog

    _report(tmp_path, 5, start_step=4)
    version, start, first = list(_tensorboard(tmp_path))[:3]
    assert version.file_version == "brain.Event:2"  # what makes it heed the next one
    assert (start.step, start.session_log.status) == (5, SessionLog.START)
    assert (first.step, first.summary.value[0].tag) == (5, "train/loss")


def test_works_without_tensorboard(tmp_path):
    code = """
        import sys
        from pathlib import Path
        sys.modules["tensorboardX"] = None  # import finds nothing
        from vvt_jax.training.reporting import Reporter
        with Reporter(Path(sys.argv[1]), start_step=0, total_steps=1) as reporter:
            reporter.write(1, {"loss": 1.0})
    """
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", textwrap.dedent(code), str(tmp_path)],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert _lines(tmp_path) == [{"step": 1, "loss": 1.0}]
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_tensorboard_file_without_room_is_the_callers_error_alone(tmp_path):
    pytest.importorskip("tensorboardX")
    code = """
        import resource, sys
        from pathlib import Path
        from vvt_jax.training.reporting import Reporter
        workdir = Path(sys.argv[1])
        metrics = {f"m{number}": 0.5 for number in range(20)}
        try:
            with Reporter(workdir, start_step=0, total_steps=9) as reporter:
                reporter.write(1, metrics)
                (events,) = workdir.glob("events.out.tfevents*")
                size = events.stat().st_size  # more than that of the other file
                resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
                reporter.write(2, metrics)
        except OSError as error:
            sys.exit(f"told: {error.strerror}")
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.stderr.splitlines()[-1] == "told: File too large"
    assert "Traceback" not in done.stderr
    assert [line["step"] for line in _lines(tmp_path)] == [1, 2]


@pytest.mark.parametrize(
    "line", [b'{"step": 6, "a', b"3", b"null", b"[1]", b'{"step": "6"}', b"\xff\xfe", b"[" * 99_999]
)
def test_a_damaged_line_is_passed_over(tmp_path, line):
    with Reporter(tmp_path, start_step=0, total_steps=9) as reporter:
        reporter.write(2, {"loss": 1.0})
        with (tmp_path / "metrics.jsonl").open("ab") as file:  # as another process finds it
            file.write(line)
        assert reporter.last_line() == {"loss": 1.0}
    with Reporter(tmp_path, start_step=9, total_steps=9) as reporter:
        assert reporter.last_line() == {"loss": 1.0}
    assert _lines(tmp_path) == [{"step": 2, "loss": 1.0}]
