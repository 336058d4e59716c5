"""Every field of a run, with its default. Other configs start from here and change what differs.

    python -m vvt_jax.main --config=configs/digits.py --workdir=runs/digits --config.seed=1

The fields are locked: one that is not listed here is refused. A field that says "None: ..." is
empty until it is given. Older runs lack a field that is added here, and go on with its default: if
that changes what the program did, `_BEFORE` in vvt_jax/training/configuration.py says what it was.
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder


def get_config(_: str = "") -> ConfigDict:
    config = ConfigDict()
    config.seed = 0  # of initialisation, data order, augmentation and drop path
    config.mode = (
        "train"  # "train", or "eval": measure the workdir's run; where there is none, init_from
    )
    config.batch_size = 64  # images a step, over all devices

    # Every duration can be given in three units. Of several in a config, the first one here counts;
    # one on the command line replaces the config's, whatever its unit.
    config.total_steps = placeholder(int)  # updates
    config.total_examples = placeholder(int)  # images seen
    config.total_epochs = placeholder(float)  # passes over the training images
    config.log_every_steps = placeholder(int)  # none given: every 20 steps
    config.log_every_examples = placeholder(int)
    config.log_every_epochs = placeholder(float)
    config.eval_every_steps = placeholder(int)  # on the validation split; none given: every epoch
    config.eval_every_examples = placeholder(int)
    config.eval_every_epochs = placeholder(float)
    config.checkpoint_every_steps = placeholder(int)  # none given: every epoch
    config.checkpoint_every_examples = placeholder(int)
    config.checkpoint_every_epochs = placeholder(float)
    config.keep_checkpoints = 2  # the newest ones; the best is kept beside them
    config.compilation_cache = "~/.cache/vvt_jax"  # folder of jax's compiled programs; "": none
    # What to start from, or to evaluate: a model folder, hf://organisation/name, a published .pth,
    # or another run's workdir
    config.init_from = ""
    config.profile_at_step = 0  # a profiler trace into workdir/profile from that step on; 0: none
    config.profile_steps = 3  # its length

    # How the devices share the work; -1 stands for all that are left.
    config.mesh = ConfigDict()
    config.mesh.data = -1  # images of the batch
    config.mesh.fsdp = 1  # images of the batch, and parameters and optimizer state
    config.mesh.spatial = 1  # rows of each image

    # The processes of a run. None: as a TPU pod, Slurm, MPI or Kubernetes says; else alone.
    config.distributed = ConfigDict()
    config.distributed.coordinator = placeholder(str)  # HOST:PORT, where process 0 listens
    config.distributed.num_processes = placeholder(int)
    config.distributed.process_id = placeholder(int)  # from 0 up
    config.distributed.start_timeout = 300  # seconds to wait for all of them
    config.distributed.heartbeat_timeout = 100  # seconds until a silent one ends the others

    # A field that is None is the named model's own; see vvt_jax.models.VVT for what they mean.
    config.model = ConfigDict()
    config.model.name = "vvt_tiny"
    config.model.embed_dims = placeholder(tuple)
    config.model.depths = placeholder(tuple)
    config.model.num_heads = placeholder(tuple)
    config.model.mlp_ratios = placeholder(tuple)
    config.model.feature_reduction = placeholder(tuple)
    config.model.gate_reduction = placeholder(int)
    config.model.locality = placeholder(str)  # "sum", "product", "1d", "none"
    config.model.attention = placeholder(str)  # "vicinity", "softmax"
    config.model.clamp = placeholder(bool)
    config.model.patch_strides = placeholder(tuple)
    config.model.drop_path_rate = placeholder(float)
    config.model.head = placeholder(str)  # segmentation: "fpn", "upernet"; None: classification
    config.model.head_channels = placeholder(int)  # segmentation: None: the published ones
    config.model.dropout = placeholder(float)  # segmentation: of channels before the classifier
    config.model.num_classes = placeholder(int)  # None: as many as the data set has
    config.model.dtype = placeholder(str)  # "float32", "bfloat16"
    config.model.remat = placeholder(bool)
    config.model.ffn_bands = placeholder(int)  # bands of rows, for images too large for memory
    config.model.unroll = placeholder(bool)

    config.data = ConfigDict()
    config.data.source = (
        "digits"  # "digits", "tfds:NAME", "huggingface:NAME", "folder", "folder_segmentation"
    )
    config.data.data_dir = placeholder(str)  # None: the library's own place
    config.data.train_split = "train"
    config.data.validation_split = "validation"  # "": no evaluation during training
    config.data.test_split = "test"  # evaluated once, after the last step; "": none
    # Measured in mode "eval" as well, tfds data sets of ImageNet's classes: "imagenet_v2",
    # "imagenet2012_real", "imagenet_a", "imagenet_r", "imagenet2012_corrupted" (15 corruptions by 5
    # severities). They lie in data_dir if source is tfds's, and else in tfds's own place.
    config.data.eval_also = ()
    config.data.size = (224, 224)  # height, width of the model's input, pixels
    config.data.crop_fraction = 0.875  # evaluation: side of the centre crop, of the resized image
    config.data.interpolation = "bicubic"
    config.data.mean = (0.485, 0.456, 0.406)  # of red, green, blue, on a scale from 0 to 1
    config.data.std = (0.229, 0.224, 0.225)
    # Turn images as their EXIF orientation says, as prediction always does and image viewers do.
    # False: train and measure on images as they are stored. The published ImageNet recipe does so,
    # since the loaders of torchvision and timm ignore the orientation.
    config.data.upright = True
    config.data.workers = 0  # processes that read and augment; 0: threads of this one
    config.data.threads = 8  # a process
    # Images that can't be decoded: training replaces up to this many, and each evaluation leaves up
    # to this many out of a split
    config.data.broken_limit = 10

    config.augment = ConfigDict()
    config.augment.crop = "random_resized_crop"  # or "resize": as in evaluation
    config.augment.min_scale = 0.08  # smallest part of the image's area that is cropped
    config.augment.flip = True  # left to right, every other time
    config.augment.shift = 0  # pixels, at most, each way; what moves in is black
    config.augment.randaugment = ""  # such as "rand-m9-mstd0.5-inc1"; "": none
    config.augment.color_jitter = 0.0  # of brightness, contrast, saturation; where that is none
    config.augment.scale = (0.5, 2.0)  # segmentation: of the short side, before a crop of data.size
    config.augment.class_share = 0.75  # segmentation: at most so much of a crop is of one class
    config.augment.photometric = False  # segmentation: distort brightness, contrast and colours
    config.augment.repeats = 1  # how often an image comes in turn, each time augmented anew
    config.augment.erase = 0.0  # probability that a rectangle of an image becomes noise
    config.augment.mixup = 0.0  # α of its Beta distribution; 0: none
    config.augment.cutmix = 0.0  # α of its Beta distribution; 0: none
    config.augment.mix_probability = 1.0  # of a step, to mix at all
    config.augment.mix_groups = 1  # parts of the batch, each mixed by itself with its own draw
    config.augment.cutmix_probability = 0.5  # of a step that mixes, where both are on

    # Segmentation: how a whole image is looked at, when it is measured and later on.
    config.inference = ConfigDict()
    config.inference.short_side = placeholder(int)  # pixels it is resized to; None: data.size's
    config.inference.stride = 0  # pixels between windows of data.size; 0: the whole image at once
    config.inference.scales = (1.0,)  # of the short side; several: probabilities are averaged
    config.inference.flip = False  # average with the mirrored image

    config.optimizer = ConfigDict()  # AdamW
    config.optimizer.learning_rate = 1e-3  # at its peak
    config.optimizer.learning_rate_batch = 0  # the batch it is meant for, scaled to ours; 0: ours
    # "cosine" after the warm-up; "polynomial" from the start on; or "cosine_by_epoch", the authors'
    # own: one rate an epoch, an epoch late, and a cosine over the whole run
    config.optimizer.schedule = "cosine"
    config.optimizer.schedule_power = 0.9  # of "polynomial"
    config.optimizer.warmup_steps = placeholder(int)  # rises linearly
    config.optimizer.warmup_examples = placeholder(int)
    config.optimizer.warmup_epochs = 5.0
    config.optimizer.warmup_learning_rate = 0.0  # at step 0
    config.optimizer.final_learning_rate = 0.0
    config.optimizer.b1 = 0.9
    config.optimizer.b2 = 0.999
    config.optimizer.eps = 1e-8
    config.optimizer.weight_decay = 0.05  # none on biases and norms
    config.optimizer.clip_norm = 1.0  # of the gradient over all parameters; 0: not clipped
    config.optimizer.skip_nonfinite = 0  # updates of a run, left out where the loss is not finite
    config.optimizer.label_smoothing = 0.1
    config.optimizer.auxiliary_weight = 0.4  # segmentation: of UPerNet's auxiliary loss
    config.optimizer.ema_decay = 0.0  # moving average of the weights, a step; 0: none
    config.optimizer.accumulate = 1  # parts of a batch, one after the other, for one update
    config.optimizer.layer_decay = 1.0  # learning rate of a block, of the next one's; 1: all equal
    config.optimizer.freeze = ()  # regular expressions: parameters whose path has one stay as set
    return config.lock()
