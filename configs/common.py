"""Every field of a run, with its default. The other configs start from here and set what differs.

    python -m vvt_jax.main --config=configs/digits.py --workdir=runs/digits --config.seed=1

The set of fields is locked: a field that is not listed here is refused. A field whose comment says
"None: ..." has no value until you set it. Runs that are older than a field lack it and resume with
its default; if that default changes what the program did, `_BEFORE` in
vvt_jax/training/configuration.py gives the value that such runs resume with instead.
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder


def get_config(_: str = "") -> ConfigDict:
    config = ConfigDict()
    config.seed = 0  # for initialisation, data order, augmentation and drop path
    # "train", or "eval": evaluate the run in the workdir or, if there is none, init_from
    config.mode = "train"
    config.batch_size = 64  # images per step, over all devices

    # Every duration can be given in any of three units. If a config sets more than one, the first
    # in the order below counts; one on the command line replaces the config's, whatever its unit.
    config.total_steps = placeholder(int)  # length of the run, in updates
    config.total_examples = placeholder(int)  # length of the run, in images seen
    config.total_epochs = placeholder(float)  # length of the run, in passes over the training split
    config.log_every_steps = placeholder(int)  # if none of the three is set: every 20 steps
    config.log_every_examples = placeholder(int)
    config.log_every_epochs = placeholder(float)
    # How often to evaluate on the validation split; if none of the three is set: every epoch
    config.eval_every_steps = placeholder(int)
    config.eval_every_examples = placeholder(int)
    config.eval_every_epochs = placeholder(float)
    config.checkpoint_every_steps = placeholder(int)  # if none of the three is set: every epoch
    config.checkpoint_every_examples = placeholder(int)
    config.checkpoint_every_epochs = placeholder(float)
    config.keep_checkpoints = 2  # number of newest checkpoints to keep, besides the best one
    config.compilation_cache = "~/.cache/vvt_jax"  # folder for jax's compiled programs; "": none
    # What to start training from, or what to evaluate: a model folder, hf://organisation/name, a
    # published .pth file, or another run's workdir
    config.init_from = ""
    config.profile_at_step = 0  # first step of a profiler trace in workdir/profile; 0: no trace
    config.profile_steps = 3  # length of the trace, in steps

    # How the devices share the work: the number of devices along each axis; -1: all that remain.
    config.mesh = ConfigDict()
    config.mesh.data = -1  # devices that share the images of the batch
    # devices that share the images of the batch, and the parameters and optimizer state as well
    config.mesh.fsdp = 1
    config.mesh.spatial = 1  # devices that share the rows of each image

    # The processes of a run. None: as reported by a TPU pod, Slurm, MPI or Kubernetes; without any
    # of these, the process runs alone.
    config.distributed = ConfigDict()
    config.distributed.coordinator = placeholder(str)  # HOST:PORT at which process 0 listens
    config.distributed.num_processes = placeholder(int)
    config.distributed.process_id = placeholder(int)  # counted from 0
    config.distributed.start_timeout = 300  # seconds to wait for all processes to join
    config.distributed.heartbeat_timeout = 100  # seconds without contact to one before the rest end

    # A field that is None keeps the named model's own value; vvt_jax.models.VVT documents them.
    config.model = ConfigDict()
    config.model.name = "vvt_tiny"
    config.model.embed_dims = placeholder(tuple)  # channels of the four stages
    config.model.depths = placeholder(tuple)  # blocks of the four stages
    config.model.num_heads = placeholder(tuple)  # attention heads of the four stages
    config.model.mlp_ratios = placeholder(tuple)
    config.model.feature_reduction = placeholder(tuple)
    config.model.gate_reduction = placeholder(int)
    config.model.locality = placeholder(str)  # "sum", "product", "1d", "none"
    config.model.attention = placeholder(str)  # "vicinity", "softmax"
    config.model.clamp = placeholder(bool)
    config.model.patch_strides = placeholder(tuple)
    config.model.drop_path_rate = placeholder(float)
    config.model.head = placeholder(str)  # segmentation: "fpn", "upernet"; None: classification
    config.model.head_channels = placeholder(int)  # segmentation; None: the published number
    config.model.dropout = placeholder(float)  # segmentation: channel dropout before the classifier
    config.model.num_classes = placeholder(int)  # None: the number of classes in the data set
    config.model.dtype = placeholder(str)  # "float32", "bfloat16"
    config.model.remat = placeholder(bool)
    config.model.ffn_bands = placeholder(int)  # bands of rows, for images too large for memory
    config.model.unroll = placeholder(bool)

    config.data = ConfigDict()
    # "digits", "tfds:NAME", "huggingface:NAME", "folder", "folder_segmentation"
    config.data.source = "digits"
    config.data.data_dir = placeholder(str)  # None: the library's default folder
    config.data.train_split = "train"
    config.data.validation_split = "validation"  # "": no evaluation during training
    config.data.test_split = "test"  # evaluated once, after the last step; "": never
    # Further sets to evaluate in mode "eval", all tfds data sets with ImageNet's classes:
    # "imagenet_v2", "imagenet2012_real", "imagenet_a", "imagenet_r", "imagenet2012_corrupted" (15
    # corruptions at 5 severities each). They are read from data_dir if source is a tfds data set,
    # and from tfds's default folder otherwise.
    config.data.eval_also = ()
    config.data.size = (224, 224)  # height and width of the model's input, in pixels
    # Evaluation: side of the centre crop, as a fraction of the resized image's side
    config.data.crop_fraction = 0.875
    config.data.interpolation = "bicubic"
    config.data.mean = (0.485, 0.456, 0.406)  # of red, green and blue, on a scale from 0 to 1
    config.data.std = (0.229, 0.224, 0.225)
    # Turn images upright by their EXIF orientation, as prediction always does and image viewers do.
    # False: train and evaluate on images as they are stored. The published ImageNet recipe does so,
    # since the loaders of torchvision and timm ignore the orientation.
    config.data.upright = True
    config.data.workers = 0  # processes that read and augment; 0: threads of the main process
    config.data.threads = 8  # per process
    # Number of images that may fail to decode: training replaces up to this many, and each
    # evaluation leaves out up to this many per split
    config.data.broken_limit = 10

    config.augment = ConfigDict()
    config.augment.crop = "random_resized_crop"  # or "resize": as in evaluation
    config.augment.min_scale = 0.08  # smallest crop, as a fraction of the image's area
    config.augment.flip = True  # mirror left to right with probability 0.5
    config.augment.shift = 0  # largest shift in each direction, in pixels; the gap is filled black
    config.augment.randaugment = ""  # such as "rand-m9-mstd0.5-inc1"; "": none
    # Strength of changes in brightness, contrast and saturation; only used without randaugment
    config.augment.color_jitter = 0.0
    # Segmentation: range of the random resizing of the short side, as a multiple of data.size's,
    # before a crop of data.size
    config.augment.scale = (0.5, 2.0)
    config.augment.class_share = 0.75  # segmentation: largest fraction of a crop for any one class
    config.augment.photometric = False  # segmentation: distort brightness, contrast and colours
    config.augment.repeats = 1  # consecutive copies of each image, each augmented differently
    config.augment.erase = 0.0  # probability that noise replaces a rectangle of an image
    config.augment.mixup = 0.0  # α of its Beta distribution; 0: none
    config.augment.cutmix = 0.0  # α of its Beta distribution; 0: none
    config.augment.mix_probability = 1.0  # probability that a step mixes images at all
    config.augment.mix_groups = 1  # parts of the batch, each mixed separately with its own draw
    config.augment.cutmix_probability = 0.5  # of cutmix rather than mixup, where both are on

    # Segmentation: how whole images are processed in evaluation and prediction.
    config.inference = ConfigDict()
    config.inference.short_side = placeholder(int)  # pixels after resizing; None: as data.size
    config.inference.stride = 0  # pixels between windows of data.size; 0: the whole image at once
    config.inference.scales = (1.0,)  # multiples of short_side, whose probabilities are averaged
    config.inference.flip = False  # also average with the mirrored image

    config.optimizer = ConfigDict()  # AdamW
    config.optimizer.learning_rate = 1e-3  # peak of the schedule
    # Batch size that learning_rate is meant for; the rate is scaled to batch_size. 0: not scaled
    config.optimizer.learning_rate_batch = 0
    # "cosine", which starts after the warm-up; "polynomial", which decays from the first step; or
    # "cosine_by_epoch", the authors' own: one rate per epoch, one epoch late, on a cosine that
    # spans the whole run
    config.optimizer.schedule = "cosine"
    config.optimizer.schedule_power = 0.9  # exponent of "polynomial"
    config.optimizer.warmup_steps = placeholder(int)  # length of the linear warm-up
    config.optimizer.warmup_examples = placeholder(int)
    config.optimizer.warmup_epochs = 5.0
    config.optimizer.warmup_learning_rate = 0.0  # rate at step 0
    config.optimizer.final_learning_rate = 0.0
    config.optimizer.b1 = 0.9
    config.optimizer.b2 = 0.999
    config.optimizer.eps = 1e-8
    config.optimizer.weight_decay = 0.05  # not applied to biases and norms
    config.optimizer.clip_norm = 1.0  # largest gradient norm, over all parameters; 0: no clipping
    # Number of updates per run that may be skipped because the loss or gradient is not finite
    config.optimizer.skip_nonfinite = 0
    config.optimizer.label_smoothing = 0.1
    config.optimizer.auxiliary_weight = 0.4  # segmentation: weight of UPerNet's auxiliary loss
    config.optimizer.ema_decay = 0.0  # per step, of the weights' moving average; 0: no average
    config.optimizer.accumulate = 1  # number of micro-batches that one update is split into
    # Each block's learning rate, as a fraction of the next block's; 1: the same rate for all
    config.optimizer.layer_decay = 1.0
    # Regular expressions: parameters whose path contains a match of any are not trained
    config.optimizer.freeze = ()
    return config.lock()
