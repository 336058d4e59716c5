"""What a run tells: `metrics.jsonl`, TensorBoard where it is installed, and a progress bar."""

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
    """Writes measurements, one object a step, and shows progress.

    On resume, lines of steps after `start_step` are cut off: they will be written again.
    """

    def __init__(self, workdir: AnyPath, *, start_step: int, total_steps: int):
        self._path = workdir / "metrics.jsonl"
        self._journal = storage.open_journal(self._path, self._lines_until(start_step))
        self._tensorboard = None
        # Its files grow with each number: nothing for an object store
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
        with contextlib.ExitStack() as stack:  # each of them, though another has no room to
            if self._tensorboard:
                stack.callback(self._tensorboard.close)
            stack.callback(self._journal.close)
            stack.callback(self._bar.close)

    def advance(self) -> None:
        """One more step was given to the devices."""
        self._bar.update()

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Appends one line for the step: `{"step": step, **metrics}`.

        On disk when this returns, or in an object store within a minute, or by `flush`.
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
        """All that was written is there to last when this returns: before a checkpoint is, so that
        no step is missing after a resume from it."""
        self._journal.flush()

    def show(self, step: int, name: str, picture: PIL.Image.Image) -> None:
        """Keeps a picture of that step: a PNG file in `pictures/`, and in TensorBoard."""
        content = io.BytesIO()
        picture.save(content, "PNG")
        folder = self._path.parent / "pictures"
        storage.replace(folder / f"{name}_{step:08}.png", content.getvalue())
        if self._tensorboard:
            self._tensorboard.add_image(name, np.asarray(picture), step)

    def last_line(self) -> dict[str, float]:
        """The measurements of the last step that was written, empty at the start of a run."""
        written = self._written()
        return {k: v for k, v in written[-1].items() if k != "step"} if written else {}

    def has(self, step: int, name: str) -> bool:
        """Whether a measurement of that step was written."""
        return any(line["step"] == step and name in line for line in self._written())

    def _written(self) -> list[dict[str, Any]]:
        """The lines that can be read: another process may be writing one, or the whole file."""
        self.flush()
        lines = map(_parse, _read_lines(self._path) if self._path.exists() else [])
        return [line for line in lines if line is not None]

    def say(self, text: str) -> None:
        """Prints a line without tearing the progress bar."""
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
    """The measurements of a line; None where it is damaged, as by a kill while it was written."""
    try:
        metrics = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(metrics, dict) or type(metrics.get("step")) is not int:
        return None
    return metrics


class _TensorBoard:
    """Writes TensorBoard's files in the caller's thread, so that a full disk is the caller's error.
    tensorboardX's own SummaryWriter has a thread for it, whose end nobody notices."""

    def __init__(self, folder: AnyPath, *, purge_step: int):
        from tensorboardX import event_file_writer, summary
        from tensorboardX.proto import event_pb2

        self._summary, self._pb = summary, event_pb2
        self._events = event_file_writer.EventsWriter(str(folder / "events"))
        # What a run before this one showed of later steps is no longer shown
        self._write(purge_step, session_log=event_pb2.SessionLog(status=event_pb2.SessionLog.START))

    def add_scalars(self, values: Mapping[str, float], step: int) -> None:
        """Values by their names; on disk when this returns."""
        for name, value in values.items():
            self._write(step, summary=self._summary.scalar(name, value))
        self._events.flush()

    def add_image(self, name: str, pixels: np.ndarray, step: int) -> None:
        """Pixels `[height, width, 3]`, uint8; on disk when this returns."""
        self._write(step, summary=self._summary.image(name, pixels, dataformats="HWC"))
        self._events.flush()

    def close(self) -> None:
        self._events.close()

    def _write(self, step: int, **content: Any) -> None:
        self._events.write_event(self._pb.Event(step=step, wall_time=time.time(), **content))


class SilentReporter(Reporter):
    """The reporter of a process whose group has another one for it: writes and shows nothing."""

    def __init__(self, workdir: AnyPath, *, start_step: int, total_steps: int):
        del start_step, total_steps
        self._path = workdir / "metrics.jsonl"

    def __exit__(self, *_: object) -> None:
        pass

    def advance(self) -> None:
        """Nothing."""

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Nothing."""

    def flush(self) -> None:
        """Nothing."""

    def show(self, step: int, name: str, picture: PIL.Image.Image) -> None:
        """Nothing."""

    def say(self, text: str) -> None:
        """Nothing."""


def describe(part: str, metrics: Mapping[str, float]) -> str:
    """One evaluation in words, e.g. `eval top-1 97.22 %, top-5 100.00 %, loss 0.1034 (144 images)`,
    or `eval mIoU 41.00 %, ...`."""
    shares = [
        f"{words} {100 * metrics[f'{part}/{name}']:.2f} %"
        for name, words in _SHARES.items()
        if f"{part}/{name}" in metrics
    ]
    return (
        f"{part} {', '.join(shares)}, loss {metrics[f'{part}/loss']:.4f} "
        f"({metrics[f'{part}/examples']} images)"
    )
