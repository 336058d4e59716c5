"""Your own images: a folder with one sub-folder per class, or `train/` and `val/` like that.

    python -m vvt_jax.main --config=configs/folder.py --workdir=runs/mine \
        --config.data.data_dir=FOLDER --config.init_from=MODEL_FOLDER

With `train/` and `val/`, add `--config.data.train_split=train --config.data.validation_split=val`.
`init_from` takes a model folder or another run's workdir; without it, training starts from scratch.

Cost: 30 epochs of your images, 18 GFLOP per image for vvt_tiny at 224 pixels. Not run.
"""

from ml_collections import ConfigDict

from configs import common


def get_config(arg: str = "vvt_tiny") -> ConfigDict:
    config = common.get_config()
    config.batch_size = 64
    config.total_epochs = 30.0
    config.model.name = arg or "vvt_tiny"
    config.model.drop_path_rate = 0.1

    config.data.source = "folder"
    config.data.train_split = "train[:90%]"
    config.data.validation_split = "train[90%:]"
    config.data.test_split = ""

    config.augment.randaugment = "rand-m9-mstd0.5-inc1"
    config.augment.min_scale = 0.35
    config.augment.mixup = 0.2
    config.augment.erase = 0.25

    config.optimizer.learning_rate = 2e-4
    config.optimizer.warmup_epochs = 3.0
    config.optimizer.layer_decay = 0.8
    return config
