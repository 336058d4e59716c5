"""The stamps benchmark's run; see run.py beside it."""

from ml_collections import ConfigDict

from configs import common

STEPS = 4000


def get_config(_: str = "") -> ConfigDict:
    config = common.get_config()
    config.batch_size = 16
    config.total_steps = STEPS
    config.log_every_steps = 50
    config.eval_every_steps = 1000
    config.checkpoint_every_steps = 200
    config.model.name = "vvt_nano"
    config.model.head = "fpn"
    config.model.head_channels = 64

    config.data.source = "folder_segmentation"
    config.data.size = (96, 96)
    config.data.crop_fraction = 1.0
    config.data.interpolation = "bilinear"
    config.data.mean = (0.5, 0.5, 0.5)
    config.data.std = (0.25, 0.25, 0.25)
    config.data.threads = 2

    config.augment.scale = (0.8, 1.5)
    config.augment.class_share = 1.0
    config.augment.photometric = True

    config.optimizer.learning_rate = 2e-3
    config.optimizer.weight_decay = 0.01
    config.optimizer.label_smoothing = 0.0
    config.optimizer.schedule = "polynomial"
    config.optimizer.warmup_epochs = 1.0
    return config
