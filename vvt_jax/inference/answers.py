"""The output of `predict` for an image, in each of its formats."""

import csv
import dataclasses
import io
import json
import re
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

if TYPE_CHECKING:
    from vvt_jax.inference.predictor import Prediction


@dataclasses.dataclass(frozen=True)
class Areas:
    """The classes of an image's pixels, in order of decreasing area.

    Attributes:
        labels: the indices of the classes, from 0.
        names: the names of the classes.
        shares: the fraction of the image's pixels in each class, from 0 to 1.
    """

    labels: tuple[int, ...]
    names: tuple[str, ...]
    shares: tuple[float, ...]


Answer: TypeAlias = "Prediction | Areas"


def _table(image: str, answer: Answer) -> str:
    _, names, shares = dataclasses.astuple(answer)
    rows = zip(shares, names, strict=True)
    return "\n".join(
        [escaped(image), *(f"  {share:8.2%}  {escaped(name)}" for share, name in rows)]
    )


def escaped(text: str) -> str:
    """Escape characters, as in file names, that would break the line or control a terminal."""
    return re.sub(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff]", lambda found: ascii(found[0])[1:-1], text)


def _json(image: str, answer: Answer) -> str:
    return json.dumps({"image": image, **dataclasses.asdict(answer)})


def _csv(image: str, answer: Answer) -> str:
    rows = zip(*dataclasses.astuple(answer), strict=True)
    return _csv_lines(
        [image, rank, label, name, f"{share:.6f}"]
        for rank, (label, name, share) in enumerate(rows, 1)
    )


def _csv_lines(rows: Iterable[Sequence[Any]]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue().rstrip("\n")


FORMATTERS: dict[str, Callable[[str, Answer], str]] = {
    "table": _table,
    "json": _json,
    "csv": _csv,
}
