"""The smallest run that has all there is: steps of 8 images, a line for each.

Of the training images some have blue in them, which this normalisation turns into what no float
holds: their steps are skipped, and the count of them has to come through every fault too.
"""

from ml_collections import ConfigDict

from configs import digits


def get_config(_: str = "") -> ConfigDict:
    config = digits.get_config()
    config.batch_size = 8
    config.total_epochs = None
    config.total_steps = 200
    config.log_every_steps = 1
    config.eval_every_steps = 50
    config.checkpoint_every_steps = 10
    config.model.embed_dims = (8, 8, 16, 16)
    config.data.source = "folder"
    config.data.test_split = ""
    config.data.threads = 2
    config.data.mean = (0.5, 0.5, 0.0)
    config.data.std = (0.5, 0.5, 1e-30)
    config.optimizer.skip_nonfinite = 1000
    config.optimizer.ema_decay = 0.9
    return config
