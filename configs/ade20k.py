"""Scene parsing on the 150 classes of ADE20K (Zhou et al. 2017; ADEChallengeData2016).

    python -m vvt_jax.prepare ade20k --manual_dir=FOLDER_OF_THE_ZIP
    python -m vvt_jax.main --config=configs/ade20k.py:vvt_small,fpn --workdir=runs/ade20k \
        --config.init_from=runs/imagenet_small

The argument after the colon names the backbone (vvt_small, vvt_medium or vvt_large) and the head:
`fpn` (Semantic FPN, 80,000 steps) or `upernet` (160,000 steps). `init_from` takes a model folder or
another run's workdir, and the backbone is initialised from that classifier.

Cost: 16 images of 512 pixels per step; for vvt_small, 0.3 TFLOP per image with fpn and 1.4 with
upernet. The published mIoU of the three backbones is 45.6, 47.4 and 47.9 % with fpn, and 46.8, 48.1
and 48.8 % with upernet. Not run here. The authors did not publish their recipes, so these are the
recipes of the papers that they cite for their settings (PVT, arXiv 2102.12122, and Swin, arXiv
2103.14030). Three things differ from the code of those papers:

- Images are downsampled with antialiasing, as everywhere in this package; mmcv does not antialias.
- For evaluation, the sides of a whole image are rounded to the nearest multiple of 32; PVT's code
  rounds up, so that 683 pixels become 704 there and 672 here.
- Biases and norms have no weight decay with either head; PVT's code decays both, Swin's does
  not decay norms.
"""

from ml_collections import ConfigDict

from configs import common

_MODELS = ("vvt_small", "vvt_medium", "vvt_large")
_HEADS = ("fpn", "upernet")


def get_config(arg: str = "vvt_small,fpn") -> ConfigDict:
    name, _, head = (arg or "vvt_small,fpn").partition(",")
    head = head or "fpn"
    if name not in _MODELS or head not in _HEADS:
        raise ValueError(
            f"configs/ade20k.py:{arg} is not known: after the colon stands one of "
            f"{', '.join(_MODELS)}, and one of {', '.join(_HEADS)}."
        )
    config = common.get_config()
    config.batch_size = 16
    config.log_every_steps = 50
    config.eval_every_steps = 8000
    config.checkpoint_every_steps = 2000
    config.model.name = name
    config.model.head = head
    config.model.dtype = "bfloat16"

    config.data.source = "tfds:ade20k"
    config.data.validation_split = "validation"
    config.data.test_split = ""  # its labels are not public
    config.data.size = (512, 512)
    config.data.crop_fraction = 1.0
    config.data.interpolation = "bilinear"
    config.data.workers = 8

    config.augment.photometric = True

    config.optimizer.label_smoothing = 0.0
    config.optimizer.clip_norm = 0.0
    config.optimizer.schedule = "polynomial"
    if head == "fpn":
        config.total_steps = 80_000
        config.model.drop_path_rate = 0.1
        config.optimizer.learning_rate = 1e-4
        config.optimizer.weight_decay = 1e-4
        config.optimizer.schedule_power = 0.9
        config.optimizer.warmup_epochs = 0.0
    else:
        config.total_steps = 160_000
        config.model.drop_path_rate = 0.3
        config.optimizer.learning_rate = 6e-5
        config.optimizer.weight_decay = 0.01
        config.optimizer.schedule_power = 1.0
        config.optimizer.warmup_steps = 1500
    return config
