"""The probe: figures that are right where the answer is known, and the digits' own."""

import json

import numpy as np
import pytest

from tests import fork_server
from vvt_jax import probe
from vvt_jax.system.errors import UserError


def _clusters(examples, seed, spread=0.1):
    """Features around three directions of very different lengths, and which one each is around."""
    rng = np.random.default_rng(seed)
    centres = np.eye(3, 5, dtype=np.float32) * [[1], [10], [100]]
    labels = np.arange(examples) % 3
    noise = rng.normal(scale=spread, size=(examples, 5)) * [1, 10, 100, 1, 1]
    return (centres[labels] + noise).astype(np.float32), labels


def test_what_can_be_told_apart_is():
    result = probe.probe(_clusters(90, 0, spread=0.01), _clusters(30, 1, spread=0.01))
    assert result == {
        "linear": 1.0,
        "knn": 1.0,
        "neighbours": 20,
        "train_examples": 90,
        "test_examples": 30,
        "channels": 5,
        "converged": True,
    }


def test_what_can_not_be_told_apart_is_not():
    (features, labels), rng = _clusters(300, 0), np.random.default_rng(0)
    result = probe.probe((features, rng.permutation(labels)), _clusters(300, 1))
    assert 0.2 < result["linear"] < 0.5
    assert 0.2 < result["knn"] < 0.5


def test_few_examples_have_few_neighbours():
    # the near one of the class outvotes two that are far
    train = np.array([[1, 0], [0, 1], [0.1, 1]], np.float32), np.array([0, 1, 1])
    result = probe.probe(train, (np.array([[1, 0.05]], np.float32), np.array([0])))
    assert (result["neighbours"], result["knn"]) == (3, 1.0)


def test_features_that_can_not_be_probed_are_told():
    features, labels = _clusters(30, 0)
    with pytest.raises(UserError, match="one class only"):
        probe.probe((features, 0 * labels), (features, labels))
    with pytest.raises(UserError, match="not finite"):
        probe.probe((np.full_like(features, np.nan), labels), (features, labels))


def test_the_digits_weights_have_the_features_that_are_written_down(digits_folder, small_config):
    result = probe.run(str(digits_folder), small_config)
    assert (result["train_examples"], result["test_examples"]) == (1293, 360)
    assert result["channels"] == 64
    assert result["linear"] == pytest.approx(0.9889, abs=0.006)
    assert result["knn"] == pytest.approx(0.9889, abs=0.006)
    told = probe.describe(result)
    assert "\n" not in told
    assert f"linear probe {result['linear']:.2%}, 20-nearest neighbours" in told
    assert "360 examples of digits test, learnt from 1293 of train" in told


def test_without_a_split_to_measure_on_it_says_so(digits_folder, small_config):
    small_config.data.test_split = small_config.data.validation_split = ""
    with pytest.raises(UserError, match="test_split or validation_split"):
        probe.run(str(digits_folder), small_config)


def _process(*flags, anew=False):
    done = fork_server.run(["-m", "vvt_jax.probe", "--config=configs/digits.py", *flags], anew=anew)
    assert "Traceback" not in done.stderr
    return done


@pytest.mark.slow
def test_as_a_process(digits_folder, tmp_path):
    out = tmp_path / "probe.json"
    done = _process(f"--model={digits_folder}", f"--json={out}", "--config.batch_size=16")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\n") == 1
    result = json.loads(out.read_text())
    assert f"{result['linear']:.2%}" in done.stdout
    again = _process(f"--model={digits_folder}", f"--json={out}", anew=True)
    assert again.returncode == 1
    assert again.stderr.startswith(f"error: --json={out} exists: ")
    assert "--force" in again.stderr


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--model=/nowhere"], "error: /nowhere is not a model folder"),
        (["--model=x", "leftover"], "error: Not a flag: leftover"),
        (["--model=x", "--config.data.sourc=1"], "error: There is no field config.data.sourc"),
        (["--model=x", "--config.data.source=folder"], "error: The source 'folder' needs"),
        (["--model=x", "--jsn=1"], "error: Unknown command line flag 'jsn'"),
        ([], "error: flag --model=None: Flag --model must have a value"),
    ],
)
@pytest.mark.slow
def test_bad_input_gets_one_sentence(flags, words):
    done = _process(*flags)
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.strip().splitlines()[-1].startswith(words)
