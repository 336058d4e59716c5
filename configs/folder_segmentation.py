"""Your own images and masks, laid out as in vvt_jax/data/sources/folder_segmentation.py.

    python -m vvt_jax.main --config=configs/folder_segmentation.py:vvt_tiny,fpn \
        --workdir=runs/mine --config.data.data_dir=FOLDER --config.init_from=MODEL_FOLDER

With `train/` and `val/`, add `--config.data.train_split=train --config.data.validation_split=val`.
`init_from` takes the model folder or the workdir of a classifier or a segmenter.

Cost: 60 epochs of your images, 0.2 TFLOP per image of 512 pixels for vvt_tiny. Not run.
"""

from ml_collections import ConfigDict

from configs import common


def get_config(arg: str = "vvt_tiny,fpn") -> ConfigDict:
    name, _, head = arg.partition(",")
    config = common.get_config()
    config.batch_size = 8
    config.total_epochs = 60.0
    config.model.name = name or "vvt_tiny"
    config.model.head = head or "fpn"
    config.model.drop_path_rate = 0.1

    config.data.source = "folder_segmentation"
    config.data.train_split = "train[:90%]"
    config.data.validation_split = "train[90%:]"
    config.data.test_split = ""
    config.data.size = (512, 512)
    config.data.crop_fraction = 1.0
    config.data.interpolation = "bilinear"

    config.augment.photometric = True

    config.optimizer.learning_rate = 2e-4
    config.optimizer.weight_decay = 1e-4
    config.optimizer.label_smoothing = 0.0
    config.optimizer.schedule = "polynomial"
    config.optimizer.warmup_epochs = 1.0
    return config
