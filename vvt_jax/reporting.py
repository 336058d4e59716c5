"""What a run tells: `metrics.jsonl`, TensorBoard where it is installed, and a progress bar."""

import contextlib
import importlib.util
import json
import os
from collections.abc import Mapping
from pathlib import Path

from tqdm import tqdm


class Reporter:
    """Writes measurements, one object a step, and shows progress.

    On resume, lines of steps after `start_step` are cut off: they will be written again.
    """

    def __init__(self, workdir: Path, *, start_step: int, total_steps: int):
        self._path = workdir / "metrics.jsonl"
        self._keep_lines_until(start_step)
        self._file = self._path.open("a", encoding="utf-8")
        self._tensorboard = None
        if importlib.util.find_spec("tensorboardX"):
            from tensorboardX import SummaryWriter

            self._tensorboard = SummaryWriter(str(workdir), purge_step=start_step + 1)
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
            stack.callback(self._file.close)
            stack.callback(self._bar.close)

    def advance(self) -> None:
        """One more step was given to the devices."""
        self._bar.update()

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Appends one line for the step: `{"step": step, **metrics}`, on disk when this returns."""
        if not metrics:
            return
        self._file.write(json.dumps({"step": step, **metrics}) + "\n")
        self._file.flush()
        os.fsync(self._file.fileno())
        if self._tensorboard:
            for name, value in metrics.items():
                self._tensorboard.add_scalar(name, value, step)
            self._tensorboard.flush()
        if "train/loss" in metrics:  # there was an update
            self._bar.set_postfix_str(
                f"loss {metrics['train/loss']:.3f}, lr {metrics['train/learning_rate']:.2e}, "
                f"{metrics['train/images_per_second']:.0f} images/s",
                refresh=False,
            )
        for part in ("eval", "eval_ema", "test", "test_ema"):
            if f"{part}/top1" in metrics:
                self.say(f"step {step}: {describe(part, metrics)}")

    def last_line(self) -> dict[str, float]:
        """The measurements of the last step that was written, empty at the start of a run."""
        lines = self._path.read_text(encoding="utf-8").splitlines()
        metrics = json.loads(lines[-1]) if lines else {}
        return {name: value for name, value in metrics.items() if name != "step"}

    def say(self, text: str) -> None:
        """Prints a line without tearing the progress bar."""
        self._bar.write(text)

    def _keep_lines_until(self, step: int) -> None:
        if not self._path.exists():
            return
        kept = []
        for line in self._path.read_text(encoding="utf-8").splitlines():
            try:
                if json.loads(line)["step"] <= step:
                    kept.append(line + "\n")
            except json.JSONDecodeError:  # a kill tore the last line
                continue
        temporary = self._path.with_suffix(".tmp")
        temporary.write_text("".join(kept), encoding="utf-8")
        temporary.replace(self._path)


def describe(part: str, metrics: Mapping[str, float]) -> str:
    """One evaluation in words, e.g. `eval top-1 97.22 %, top-5 100.00 %, loss 0.1034 (144)`."""
    return (
        f"{part} top-1 {100 * metrics[f'{part}/top1']:.2f} %, "
        f"top-5 {100 * metrics[f'{part}/top5']:.2f} %, loss {metrics[f'{part}/loss']:.4f} "
        f"({metrics[f'{part}/examples']} images)"
    )
