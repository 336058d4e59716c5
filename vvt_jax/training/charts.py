"""Pictures and tables of an evaluation: confusion matrices, results per class, and metrics."""

import csv
import io
import json
from collections.abc import Mapping, Sequence

import numpy as np

from vvt_jax.system import storage
from vvt_jax.system.errors import MissingPackageError
from vvt_jax.system.storage import AnyPath

_NUMBERS_UP_TO, _NAMES_UP_TO = 20, 50  # most classes to label with counts, or with names


def write_per_class(path: AnyPath, confusion: np.ndarray, class_names: Sequence[str]) -> None:
    """Write a CSV file with the examples, hits, accuracy and most frequent confusion of each class.

    Args:
        path: the path of the file.
        confusion: the confusion matrix, int `[classes, predicted classes]`. Rows are the true
            classes and columns the predicted ones, of which there may be more.
        class_names: the names of the predicted classes, in the order of the labels.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(
        ["class", "name", "examples", "correct", "accuracy", "most_often_taken_for", "times"]
    )
    for index, row in enumerate(confusion.tolist()):
        examples, correct = sum(row), row[index]
        others = [0 if i == index else n for i, n in enumerate(row)]
        wrong = int(np.argmax(others))
        writer.writerow(
            [
                index,
                class_names[index],
                examples,
                correct,
                f"{correct / examples:.4f}" if examples else "",
                class_names[wrong] if others[wrong] else "",
                others[wrong],
            ]
        )
    storage.replace(path, text.getvalue().encode())


def write_per_class_iou(path: AnyPath, confusion: np.ndarray, class_names: Sequence[str]) -> None:
    """Write a CSV file with the pixels, hits, accuracy and intersection over union of each class.

    Args:
        path: the path of the file.
        confusion: the confusion matrix of pixels, int `[classes, classes]`; rows are the true
            classes.
        class_names: the class names, in the order of the labels.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["class", "name", "pixels", "correct", "accuracy", "iou"])
    predicted = confusion.sum(0)
    for index, name in enumerate(class_names):
        pixels, correct = int(confusion[index].sum()), int(confusion[index, index])
        union = pixels + int(predicted[index]) - correct
        writer.writerow(
            [
                index,
                name,
                pixels,
                correct,
                f"{correct / pixels:.4f}" if pixels else "",
                f"{correct / union:.4f}" if union else "",
            ]
        )
    storage.replace(path, text.getvalue().encode())


def write_corruptions(
    path: AnyPath,
    errors: Mapping[str, Sequence[float]],
    relative: Mapping[str, float],
    severities: Sequence[int],
) -> None:
    """Write a CSV file with the errors for each corruption.

    These are the top-1 error at each severity, their mean, and the corruption error, which is
    relative to that of AlexNet.

    Args:
        path: the path of the file.
        errors: the top-1 errors of each corruption as fractions, one per severity.
        relative: the corruption error of each corruption.
        severities: the severities, for the names of the columns.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    columns = [f"error_{severity}" for severity in severities]
    writer.writerow(["corruption", *columns, "error", "corruption_error"])
    for kind, values in errors.items():
        numbers = (*values, float(np.mean(values)), relative[kind])
        writer.writerow([kind, *(f"{number:.4f}" for number in numbers)])
    storage.replace(path, text.getvalue().encode())


def write_metrics(path: AnyPath, step: int, metrics: Mapping[str, float]) -> None:
    """Write all metrics of an evaluation as a JSON object, together with its step."""
    storage.replace(path, (json.dumps({"step": step, **metrics}, indent=2) + "\n").encode())


def draw_confusion(path: AnyPath, confusion: np.ndarray, class_names: Sequence[str]) -> None:
    """Draw a confusion matrix as a PNG picture, with colours for the fraction of each row's total.

    Args:
        path: the path of the file.
        confusion: the confusion matrix, int `[classes, classes]`; rows are the true classes.
        class_names: the class names, in the order of the labels.

    Raises:
        MissingPackageError: matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingPackageError(
            "Pictures need matplotlib: pip install 'vvt_jax[charts]'."
        ) from error
    classes = len(confusion)
    totals = confusion.sum(1, keepdims=True)
    shares = np.where(totals > 0, confusion / np.maximum(totals, 1), np.nan)
    inches = min(16.0, max(5.0, 3 + 0.4 * classes))
    figure = Figure(figsize=(inches + 1, inches), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.set_facecolor("0.85")  # rows without examples
    image = axes.imshow(shares, cmap="viridis", vmin=0, vmax=1, interpolation="nearest")
    figure.colorbar(image, ax=axes, label="share of the class", fraction=0.046)
    if classes <= _NAMES_UP_TO:
        names = [name if len(name) <= 24 else name[:23] + "…" for name in class_names]
        axes.set_xticks(range(classes), names, rotation=90, fontsize=8)
        axes.set_yticks(range(classes), names, fontsize=8)
    if classes <= _NUMBERS_UP_TO:
        for row, column in np.argwhere(confusion > 0):
            axes.text(
                column,
                row,
                str(confusion[row, column]),
                ha="center",
                va="center",
                fontsize=7,
                color="black" if shares[row, column] > 0.6 else "white",
            )
    correct, examples = np.trace(confusion), confusion.sum()
    axes.set(xlabel="predicted", ylabel="true")
    axes.set_title(f"{correct} of {examples} right ({correct / max(1, examples):.2%})")
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=110)
    storage.replace(path, content.getvalue())
