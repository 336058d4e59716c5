"""The contact sheet: what it shows is what the step sees."""

import jax
import numpy as np
import PIL.Image
import pytest

from tests import fork_server
from vvt_jax.data.contact_sheet import draw_sheet
from vvt_jax.data.loader import train_batches
from vvt_jax.data.sources import open_source
from vvt_jax.show import training_batch
from vvt_jax.training.mixing import augmentation_key, prepare_batch


@pytest.fixture
def mixed_config(small_config):
    small_config.augment.mixup = 0.8
    small_config.augment.cutmix = 1.0
    small_config.augment.erase = 0.4
    small_config.optimizer.label_smoothing = 0.1
    return small_config


@pytest.mark.slow
@pytest.mark.parametrize("step", [1, 3])
def test_shows_what_the_step_sees(mixed_config, step):
    images, targets, names = training_batch(mixed_config, step)
    assert tuple(names) == tuple("0123456789")
    record = {
        "size": [32, 32],
        "crop_fraction": 1.0,
        "interpolation": "bilinear",
        "mean": [0.5] * 3,
        "std": [0.5] * 3,
    }
    batches = train_batches(
        open_source("digits", "train"),
        record=record,
        augment=mixed_config.augment.to_dict(),
        batch_size=64,
        seed=0,
        start_step=step - 1,
    )
    batch = next(batches)
    batches.close()
    expected, shares = jax.jit(
        lambda batch, key: prepare_batch(
            batch,
            key,
            preprocessing=record,
            augment=mixed_config.augment.to_dict(),
            label_smoothing=0.1,
            num_classes=10,
        )
    )({k: batch[k] for k in ("image", "label")}, augmentation_key(0, step))
    np.testing.assert_allclose(targets, shares, rtol=1e-6)
    shown = np.clip(np.asarray(expected) * 127.5 + 127.5, 0, 255)
    assert abs(images.astype(float) - shown).max() <= 0.51


def test_tiles_and_captions_are_drawn():
    images = np.zeros((5, 20, 30, 3), np.uint8)
    images[:, :, :, 0] = 200
    targets = np.full((5, 4), 0.025) + 0.9 * np.eye(4)[[0, 1, 2, 3, 0]]
    targets[4] = 0.025 + 0.9 * np.array([0.4, 0.6, 0, 0])
    names = ("cat", "dog", "a name that is far too long for its tile", "x")
    sheet = draw_sheet(images, targets, names)
    assert sheet.size == (5 * (30 * 5 + 6) + 6, 20 * 5 + 6 + 18 + 6)
    pixels = np.asarray(sheet)
    assert pixels[10, 10].tolist() == [200, 0, 0]
    captions = pixels[106:124].min(-1) < 128
    inked = [captions[:, i * 156 : (i + 1) * 156].sum() for i in range(5)]
    assert all(count > 0 for count in inked)
    assert inked[4] > inked[0]  # two shares take more ink than a name


def _show(*flags, anew=False):
    done = fork_server.run(["-m", "vvt_jax.data.show", *flags], anew=anew)
    assert "Traceback" not in done.stderr
    return done


def test_the_command_writes_a_picture(tmp_path):
    out = tmp_path / "sheet.png"
    done = _show("--config=configs/digits.py", f"--out={out}", "--images=10", "--step=2", anew=True)
    assert done.returncode == 0, done.stderr
    assert str(out) in done.stdout
    with PIL.Image.open(out) as image:
        assert image.size == (10 * 102 + 6, 96 + 6 + 18 + 6)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--step=0"], "error: --step and --images count from 1."),
        (["--out=/nowhere/sheet.png"], "error: --out=/nowhere/sheet.png can't be written: No such"),
        (["--config.data.source=nothing"], "error: Unknown data source 'nothing'"),
        (["--config.stepp=1"], "error: There is no field config.stepp"),
        (["leftover"], "error: Not a flag: leftover"),
    ],
)
@pytest.mark.slow
def test_bad_input_gets_one_sentence(flags, words):
    done = _show("--config=configs/digits.py", *flags)
    assert done.returncode == 1
    assert done.stderr.strip().splitlines()[-1].startswith(words)
