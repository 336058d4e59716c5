"""Reporting of a run: `metrics.jsonl`, TensorBoard if it is installed, and a progress bar."""

import contextlib
import importlib.util
import io
import json
import time
from collections.abc import Mapping
from typing import Any

import numpy as np
import PIL.Image
from tqdm import tqdm

from vvt_jax.system import storage
from vvt_jax.system.storage import AnyPath, StorageError

_SHARES = {
    "top1": "top-1",
    "top5": "top-5",
    "miou": "mIoU",
    "pixel_accuracy": "pixel accuracy",
}


class Reporter:
    """Writes measurements, one JSON object per step, and shows progress.

    When a run resumes, lines of steps after `start_step` are removed, as they will be written
    again.
    """

    def __init__(self, workdir: AnyPath, *, start_step: int, total_steps: int):
        self._path = workdir / "metrics.jsonl"
        self._journal = storage.open_journal(self._path, self._lines_until(start_step))
        self._tensorboard = None
        # TensorBoard files grow with each number, which object stores don't support.
        if importlib.util.find_spec("tensorboardX") and not storage.is_remote(workdir):
            self._tensorboard = _TensorBoard(workdir, purge_step=start_step + 1)
        self._bar = tqdm(
            total=total_steps,
            initial=start_step,
            unit="step",
            dynamic_ncols=True,
            smoothing=0.1,
        )

    def __enter__(self) -> "Reporter":
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.ExitStack() as stack:  # close all, even if one fails on a full disk
            if self._tensorboard:
                stack.callback(self._tensorboard.close)
            stack.callback(self._journal.close)
            stack.callback(self._bar.close)

    def advance(self) -> None:
        """Advance the progress bar by one step that was dispatched to the devices."""
        self._bar.update()

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Append one line for the step: `{"step": step, **metrics}`.

        The line is on disk when this returns. In an object store, it is stored by `flush`, or by
        the first call that comes a minute or more after the last time that the file was stored.
        """
        if not metrics:
            return
        self._journal.add(json.dumps({"step": step, **metrics}))
        if self._tensorboard:
            self._tensorboard.add_scalars(metrics, step)
        if "train/loss" in metrics:  # there was an update
            self._bar.set_postfix_str(
                f"loss {metrics['train/loss']:.3f}, lr {metrics['train/learning_rate']:.2e}, "
                f"{metrics['train/images_per_second']:.0f} images/s",
                refresh=False,
            )
        for part in ("eval", "eval_ema", "test", "test_ema"):
            if f"{part}/loss" in metrics:
                self.say(f"step {step}: {describe(part, metrics)}")

    def flush(self) -> None:
        """Make sure that everything written so far is stored permanently when this returns.

        This is called before saving a checkpoint, so that no step is missing after resuming from
        it.
        """
        self._journal.flush()

    def show(self, step: int, name: str, picture: PIL.Image.Image) -> None:
        """Save a picture of the given step as a PNG file in `pictures/`, and in TensorBoard."""
        content = io.BytesIO()
        picture.save(content, "PNG")
        folder = self._path.parent / "pictures"
        storage.replace(folder / f"{name}_{step:08}.png", content.getvalue())
        if self._tensorboard:
            self._tensorboard.add_image(name, np.asarray(picture), step)

    def last_line(self) -> dict[str, float]:
        """Return the measurements in the last line written; empty at the start of a run."""
        written = self._written()
        return {k: v for k, v in written[-1].items() if k != "step"} if written else {}

    def has(self, step: int, name: str) -> bool:
        """Return whether a measurement of the given step was written."""
        return any(line["step"] == step and name in line for line in self._written())

    def _written(self) -> list[dict[str, Any]]:
        """Return the readable lines: another process may be writing a line, or the whole file."""
        self.flush()
        lines = map(_parse, _read_lines(self._path) if self._path.exists() else [])
        return [line for line in lines if line is not None]

    def say(self, text: str) -> None:
        """Print a line without disrupting the progress bar."""
        self._bar.write(text)

    def _lines_until(self, step: int) -> list[str]:
        if not self._path.exists():
            return []
        lines = [(line, _parse(line)) for line in _read_lines(self._path)]
        return [line for line, metrics in lines if metrics is not None and metrics["step"] <= step]


def _read_lines(path: AnyPath) -> list[str]:
    try:
        content = storage.read_bytes(path, storage.SizeLimit.METRICS)
    except OSError as error:
        raise StorageError(f"{path} can't be read: {error.strerror}.") from error
    return content.decode(errors="replace").splitlines()


def _parse(line: str) -> dict[str, Any] | None:
    """Return a line's measurements, or None if it is damaged, as by a kill during writing."""
    try:
        metrics = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(metrics, dict) or type(metrics.get("step")) is not int:
        return None
    return metrics


class _TensorBoard:
    """Writes TensorBoard files in the caller's thread, where a full disk raises an error.

    The SummaryWriter of tensorboardX writes in a separate thread, whose failure goes unnoticed.
    """

    def __init__(self, folder: AnyPath, *, purge_step: int):
        from tensorboardX import event_file_writer, summary
        from tensorboardX.proto import event_pb2

        self._summary, self._pb = summary, event_pb2
        self._events = event_file_writer.EventsWriter(str(folder / "events"))
        # Hides what was shown of later steps before the run was resumed.
        self._write(purge_step, session_log=event_pb2.SessionLog(status=event_pb2.SessionLog.START))

    def add_scalars(self, values: Mapping[str, float], step: int) -> None:
        """Add values by name, which are on disk when this returns."""
        for name, value in values.items():
            self._write(step, summary=self._summary.scalar(name, value))
        self._events.flush()

    def add_image(self, name: str, pixels: np.ndarray, step: int) -> None:
        """Add an image, uint8 `[height, width, 3]`, which is on disk when this returns."""
        self._write(step, summary=self._summary.image(name, pixels, dataformats="HWC"))
        self._events.flush()

    def close(self) -> None:
        self._events.close()

    def _write(self, step: int, **content: Any) -> None:
        self._events.write_event(self._pb.Event(step=step, wall_time=time.time(), **content))


class SilentReporter(Reporter):
    """The reporter of all processes but the first one, which writes and shows nothing."""

    def __init__(self, workdir: AnyPath, *, start_step: int, total_steps: int):
        del start_step, total_steps
        self._path = workdir / "metrics.jsonl"

    def __exit__(self, *_: object) -> None:
        pass

    def advance(self) -> None:
        """Do nothing."""

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Do nothing."""

    def flush(self) -> None:
        """Do nothing."""

    def show(self, step: int, name: str, picture: PIL.Image.Image) -> None:
        """Do nothing."""

    def say(self, text: str) -> None:
        """Do nothing."""


def describe(part: str, metrics: Mapping[str, float]) -> str:
    """Describe an evaluation in one line.

    Examples are `eval top-1 97.22 %, top-5 100.00 %, loss 0.1034 (144 images)` and
    `eval mIoU 41.00 %, ...`.
    """
    shares = [
        f"{words} {100 * metrics[f'{part}/{name}']:.2f} %"
        for name, words in _SHARES.items()
        if f"{part}/{name}" in metrics
    ]
    return (
        f"{part} {', '.join(shares)}, loss {metrics[f'{part}/loss']:.4f} "
        f"({metrics[f'{part}/examples']} images)"
    )
