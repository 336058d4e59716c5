"""Tables and pictures of evaluations: their numbers, and pictures that open."""

import csv
import subprocess
import sys
import textwrap
import types
from unittest import mock

import numpy as np
import PIL.Image
import pytest

from vvt_jax.training.charts import draw_confusion, write_per_class
from vvt_jax.training.tasks import Classification

_CONFUSION = np.array([[5, 1, 0, 0], [2, 3, 1, 0], [0, 0, 0, 0], [0, 0, 4, 4]])
_NAMES = ("cat", "a, dog", "nothing", "bird")


def test_a_line_for_each_class(tmp_path):
    write_per_class(tmp_path / "deep" / "classes.csv", _CONFUSION, _NAMES)
    with (tmp_path / "deep" / "classes.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert rows == [
        dict(zip(rows[0], values, strict=True))
        for values in (
            ("0", "cat", "6", "5", "0.8333", "a, dog", "1"),
            ("1", "a, dog", "6", "3", "0.5000", "cat", "2"),
            ("2", "nothing", "0", "0", "", "", "0"),
            ("3", "bird", "8", "4", "0.5000", "nothing", "4"),
        )
    ]
    assert list(rows[0]) == [
        "class", "name", "examples", "correct", "accuracy", "most_often_taken_for", "times",
    ]  # fmt: skip
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["classes.csv"]


def test_images_that_are_taken_for_a_class_without_a_name_count(tmp_path):
    task = object.__new__(Classification)
    task.card = {"class_names": ["cat", "dog"]}
    task.model = types.SimpleNamespace(num_classes=4)
    confusion = np.array([[1, 0, 0, 9], [0, 5, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]])
    drawn = []
    with mock.patch("vvt_jax.training.charts.draw_confusion", lambda *given: drawn.append(given)):
        task.write_tables(tmp_path, "test", confusion)
    with (tmp_path / "test_per_class.csv").open(newline="") as file:
        rows = [tuple(row.values()) for row in csv.DictReader(file)]
    assert rows == [
        ("0", "cat", "10", "1", "0.1000", "class 3", "9"),
        ("1", "dog", "5", "5", "1.0000", "", "0"),
    ]
    ((_, shown, names),) = drawn
    assert names == ["cat", "dog", "class 3"]
    assert shown.tolist() == [[1, 0, 9], [0, 5, 0], [0, 0, 0]]


@pytest.mark.parametrize("classes", [4, 30, 1000])
def test_a_picture_of_any_number_of_classes(tmp_path, classes):
    pytest.importorskip("matplotlib")
    confusion = np.zeros((classes, classes), int)
    confusion[:4, :4] = _CONFUSION
    names = [f"class number {i} of a long name" for i in range(classes)]
    draw_confusion(tmp_path / "confusion.png", confusion, names)
    with PIL.Image.open(tmp_path / "confusion.png") as image:
        image.load()
        assert image.format == "PNG"
        assert 500 < image.height < 2500
    draw_confusion(tmp_path / "confusion.png", confusion, names)  # again over it
    assert [path.name for path in tmp_path.iterdir()] == ["confusion.png"]


def test_without_matplotlib_it_says_what_to_install(tmp_path):
    code = """
        import sys
        sys.modules["matplotlib"] = None  # as if it were not installed
        import numpy as np
        from pathlib import Path
        from vvt_jax.system.errors import MissingPackageError
        from vvt_jax.training.charts import draw_confusion

        try:
            draw_confusion(Path(sys.argv[1]) / "x.png", np.eye(2, dtype=int), "ab")
        except MissingPackageError as error:
            print(error)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), str(tmp_path)],
        capture_output=True,
        text=True,
    )
    assert "pip install 'vvt_jax[charts]'" in done.stdout, done.stderr
    assert done.stdout.count("\n") == 1
    assert not list(tmp_path.iterdir())
