"""Handwritten digits (1,797 images of 8x8 pixels, part of scikit-learn): a whole run in a minute.

    python -m vvt_jax.main --config=configs/digits.py --workdir=runs/digits

On two CPU cores, a run takes 48 to 50 s from a cold start; the test top-1 accuracy is 99.17, 99.44
and 98.89 % with seeds 0, 1 and 2.
"""

from ml_collections import ConfigDict

from configs import common


def get_config(_: str = "") -> ConfigDict:
    config = common.get_config()
    config.total_epochs = 20.0
    config.eval_every_steps = 100
    config.checkpoint_every_steps = 100
    config.model.name = "vvt_nano"

    config.data.source = "digits"
    config.data.size = (32, 32)
    config.data.crop_fraction = 1.0
    config.data.interpolation = "bilinear"
    config.data.mean = (0.5, 0.5, 0.5)
    config.data.std = (0.5, 0.5, 0.5)

    config.augment.crop = "resize"
    config.augment.flip = False
    config.augment.shift = 2

    config.optimizer.learning_rate = 3e-3
    config.optimizer.warmup_epochs = 1.0
    config.optimizer.label_smoothing = 0.0
    return config
