"""The package as others install it: without its repository."""

import os
import subprocess
import sys

import pytest

from tests.conftest import ROOT, WIDTHS

pytestmark = pytest.mark.slow  # builds a wheel, and trains in processes of their own


def test_a_wheel_trains_resumes_and_predicts_in_an_empty_folder(tmp_path, compilation_cache):
    """Installed into a folder that Python looks into first; the dependencies are this test's."""
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    wheels, installed, empty = (tmp_path / name for name in ("wheels", "installed", "empty"))
    empty.mkdir()
    subprocess.run([*pip, "wheel", "--no-deps", "--wheel-dir", wheels, ROOT], check=True)
    (wheel,) = wheels.iterdir()
    subprocess.run([*pip, "install", "--no-deps", "--target", installed, wheel], check=True)
    environment = {**os.environ, "PYTHONPATH": str(installed)}

    def run(*arguments: str) -> str:
        done = subprocess.run(
            [sys.executable, "-m", *arguments],
            cwd=empty,
            env=environment,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    where = run("vvt_jax.main", "--help")
    assert str(installed) in where
    train = (
        "vvt_jax.main",
        "--config=configs/digits.py",
        "--workdir=run",
        "--config.total_steps=2",
        f"--config.compilation_cache={compilation_cache}",
        *(f"--config.model.{name}={value}" for name, value in WIDTHS.items()),
    )
    assert "step 2: test top-1" in run(*train)
    assert "Resumed at step 2 of 2." in run(*train)
    sheet = run("vvt_jax.data.show", "--config=configs/digits.py", "--images=4", "--out=sheet.png")
    assert "4 images of step 1" in sheet
    assert "sheet.png" in run("vvt_jax.predict", "--model=run/model", "sheet.png")
